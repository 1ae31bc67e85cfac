"""Trains the small Sana pipeline of the quickstart and writes it to `base/`, in Diffusers layout.

    python recipes/quickstart/train_base.py [--output FOLDER] [--threads 1]

Everything is made here from the drawings of `draw.py`: tokenizer, text encoder (random, frozen),
autoencoder, transformer. Seeds are fixed, so the same machine and libraries give the same weights.
It takes 15 to 30 minutes on one CPU core, and ends with the measure of prompt following.
"""

import argparse
import copy
import inspect
import json
import math
import string
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from draw import CAPTIONS, HERE, Pair, caption, draw, pairs
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from runtime.scores.shapes import BASE_SHAPES, COLOURS, coverage, paint, score

TEXT_WIDTH = 64
LATENT_CHANNELS = 16
WIDTH = 128
BASE_PAIRS = pairs(COLOURS, BASE_SHAPES)
SHIFT = 3.0  # of the noise levels, in training as in the scheduler


# Text: a tokenizer that knows the captions' words and spells the others, and a random encoder.


def instruction() -> list[str]:
    """The instruction that the stock pipeline puts before a prompt unless told otherwise."""
    parameters = inspect.signature(SanaPipeline.__call__).parameters
    lines: list[str] = parameters["complex_human_instruction"].default
    return lines


def make_tokenizer() -> GemmaTokenizer:
    """Byte-pair merges learnt within words; a word never seen falls apart into known pieces."""
    spelled = [text.format(colour=c, shape=s) for text in CAPTIONS for c, s in BASE_PAIRS]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    learner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=list(string.printable[:95]),
        show_progress=False,
    )
    learner.train_from_iterator(["\n".join(instruction()), *spelled * 3], trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    return GemmaTokenizer(
        vocab=learnt["vocab"],
        merges=merges,
        model_max_length=1024,
        padding_side="right",
        add_bos_token=True,
    )


def make_text_encoder(vocabulary: int) -> Gemma2Model:
    """Random and frozen: its states tell words and their order apart, which is all that is needed.

    The embeddings are made large, or the normalised outputs of the layers would drown the words.
    """
    torch.manual_seed(7)
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=1024,
        sliding_window=512,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    encoder = Gemma2Model(config)
    with torch.no_grad():
        encoder.embed_tokens.weight.mul_(3.0)
    return encoder.eval().requires_grad_(False)


# Autoencoder: 64x64 pixels to 4x4 latents, so that the transformer has only 16 tokens.


def make_autoencoder() -> AutoencoderDC:
    """A deep-compression autoencoder with 16-fold compression and no full-resolution stage."""
    torch.manual_seed(1)
    scales = ((), (), (), (), (5,))
    blocks = ("ResBlock", "ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    widths = (16, 16, 32, 64, 64)
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=16,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 2, 2, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="conv",
        upsample_block_type="pixel_shuffle",
        decoder_act_fns="silu",
        scaling_factor=1.0,
    )


def scribble(rng: np.random.Generator) -> Image.Image:
    """A shape with others cut out of it and stuck on: teaches the autoencoder more than shapes."""

    def piece(smallest: float, largest: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        x, y = rng.uniform(14.0, 50.0, size=2)
        radius, degrees = rng.uniform(smallest, largest), rng.uniform(-180, 180)
        shape = str(rng.choice(BASE_SHAPES))
        return coverage(shape, (float(x), float(y)), float(radius), float(degrees), samples=3)

    cover = piece(10.0, 20.0)
    for _ in range(int(rng.integers(1, 4))):
        other = piece(3.0, 9.0)
        cut = rng.random() < 0.6
        cover = np.minimum(cover, 1.0 - other) if cut else np.maximum(cover, other)
    red, green, blue = COLOURS[str(rng.choice(list(COLOURS)))]
    if rng.random() < 0.3:
        red, green, blue = (int(part) for part in rng.integers(0, 256, size=3))
    return paint(cover, (red, green, blue))


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Pictures as the trainer sees them: (N, 3, SIZE, SIZE) in -1..1."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def train_autoencoder(steps: int) -> AutoencoderDC:
    """Reconstruction through slightly noised latents that are kept at zero mean and unit spread.

    The noise makes the decoder forgive the transformer's small errors; the spread makes a scaling
    factor of about 1 right for every channel.
    """
    rng = np.random.default_rng(5)
    shapes = to_tensor([draw(BASE_PAIRS[i % len(BASE_PAIRS)], rng) for i in range(1800)])
    scribbles = to_tensor([scribble(rng) for _ in range(1800)])
    autoencoder = make_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), betas=(0.9, 0.99), fused=True)
    chance = torch.Generator().manual_seed(2)
    for step in progress("autoencoder", steps, optimizer, peak=3e-3):
        picked = [
            shapes[torch.randint(len(shapes), (6,), generator=chance)],
            scribbles[torch.randint(len(scribbles), (2,), generator=chance)],
        ]
        pixels = torch.cat(picked).to(memory_format=torch.channels_last)
        latents = autoencoder.encode(pixels).latent
        noise = 0.1 * torch.randn(latents.shape, generator=chance)
        error = autoencoder.decode(latents + noise).sample - pixels
        spread = (latents.std(dim=(0, 2, 3)) - 1.0).square().mean()
        centre = latents.mean(dim=(0, 2, 3)).square().mean()
        loss = error.abs().mean() + 0.5 * error.square().mean() + 0.05 * (spread + centre)
        update(loss, autoencoder, optimizer)
        step["loss"] = float(loss.detach())
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(part).latent for part in shapes.chunk(20)])
    autoencoder.register_to_config(scaling_factor=round(1.0 / float(latents.std()), 5))
    return autoencoder.to(memory_format=torch.contiguous_format)


# Transformer: flow matching on the latents of the base's drawings.


def make_transformer() -> SanaTransformer2DModel:
    torch.manual_seed(3)
    return SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        num_layers=6,
        num_cross_attention_heads=WIDTH // 32,
        cross_attention_head_dim=32,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        mlp_ratio=2.5,
        sample_size=4,
        patch_size=1,
        interpolation_scale=1,  # positions matter on a grid of 4x4
    )


def make_pipeline(autoencoder: AutoencoderDC, transformer: SanaTransformer2DModel) -> SanaPipeline:
    """The parts together, with the scheduler of the published Sana folders."""
    tokenizer = make_tokenizer()
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(len(tokenizer)),
        vae=autoencoder,
        transformer=transformer,
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encode(pipeline: SanaPipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """States and mask of the prompts and, last, of no prompt: as at inference, without padding.

    Masked positions add exactly nothing to cross attention, so leaving them out changes nothing.
    """
    states, mask, _, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, complex_human_instruction=instruction()
    )
    _, _, blank, blank_mask = pipeline.encode_prompt("", complex_human_instruction=instruction())
    states, mask = torch.cat([states, blank]), torch.cat([mask, blank_mask])
    longest = int(mask.sum(dim=1).max())
    return states[:, :longest], mask[:, :longest]


def train_transformer(pipeline: SanaPipeline, pictures: int, steps: int) -> None:
    """Velocity n - x of the path (1 - s) x + s n, s logit-normal and shifted as in sampling."""
    rng = np.random.default_rng(6)
    wanted: list[Pair] = [BASE_PAIRS[i % len(BASE_PAIRS)] for i in range(pictures)]
    images = to_tensor([draw(pair, rng) for pair in wanted])
    texts = [caption(pair, rng) for pair in wanted]
    known = sorted(set(texts))
    states, mask = encode(pipeline, known)
    which = torch.tensor([known.index(text) for text in texts])
    with torch.no_grad():
        latents = torch.cat([pipeline.vae.encode(part).latent for part in images.chunk(20)])
    latents = latents * pipeline.vae.config.scaling_factor
    transformer, average = pipeline.transformer, copy.deepcopy(pipeline.transformer)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    chance = torch.Generator().manual_seed(4)
    for step in progress("transformer", steps, optimizer, peak=2e-3):
        picked = torch.randint(len(latents), (32,), generator=chance)
        dropped = torch.rand(32, generator=chance) < 0.1
        text = torch.where(dropped, len(known), which[picked])
        loss = flow_loss(transformer, latents[picked], states[text], mask[text], chance)
        update(loss, transformer, optimizer)
        follow(average, transformer, min(0.998, (1 + step["index"]) / (10 + step["index"])))
        step["loss"] = float(loss.detach())
    pipeline.transformer.load_state_dict(average.state_dict())
    pipeline.transformer.eval().requires_grad_(False)


def flow_loss(
    transformer: SanaTransformer2DModel,
    latents: Tensor,  # (B, C, H, W), scaled
    states: Tensor,  # (B, L, D)
    mask: Tensor,  # (B, L)
    chance: torch.Generator,
) -> Tensor:
    """Mean squared error of the predicted velocity."""
    uniform = torch.sigmoid(torch.randn(len(latents), generator=chance))
    sigma = SHIFT * uniform / (1.0 + (SHIFT - 1.0) * uniform)
    noise = torch.randn(latents.shape, generator=chance)
    level = sigma.view(-1, 1, 1, 1)
    (velocity,) = transformer(
        (1.0 - level) * latents + level * noise,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        timestep=1000.0 * sigma,
        return_dict=False,
    )
    return functional.mse_loss(velocity, noise - latents)


# What both trainings share.


def progress(
    name: str, steps: int, optimizer: torch.optim.Optimizer, peak: float
) -> Iterator[dict[str, float]]:
    """Steps with a warmed-up cosine rate; the caller leaves the loss in what it is given."""
    start, recent = time.monotonic(), 0.0
    for index in range(steps):
        rate = peak * min(1.0, (index + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * index / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        step = {"index": float(index), "loss": math.nan}
        yield step
        recent = step["loss"] if index == 0 else 0.98 * recent + 0.02 * step["loss"]
        if (index + 1) % 100 == 0 or index + 1 == steps:
            seconds = time.monotonic() - start
            print(f"{name} {index + 1}/{steps}  loss {recent:.4f}  {seconds:.0f} s", flush=True)


def update(loss: Tensor, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def follow(average: torch.nn.Module, module: torch.nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), module.parameters(), strict=True):
        slow.lerp_(fast, 1.0 - decay)


# The measure.


def measure(pipeline: SanaPipeline, rounds: int = 4) -> dict[str, float]:
    """Share of samples that show their prompt: of every base pair, `rounds` times, by shape."""
    prompts = [f"a {colour} {shape}" for colour, shape in BASE_PAIRS]
    scores: dict[str, list[float]] = {shape: [] for shape in BASE_SHAPES}
    for seed in range(rounds):
        for prompt, image in zip(prompts, sample(pipeline, prompts, seed), strict=True):
            scores[prompt.split()[-1]].append(score(image, prompt) or 0.0)
    shares = {shape: sum(values) / len(values) for shape, values in scores.items()}
    return {**shares, "all": sum(shares.values()) / len(shares)}


def sample(pipeline: SanaPipeline, prompts: list[str], seed: int) -> list[Image.Image]:
    """One picture a prompt, in the pipeline's own way with its default text settings."""
    chance = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
    images: list[Image.Image] = pipeline(
        prompts,
        height=64,
        width=64,
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=chance,
        use_resolution_binning=False,
    ).images
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description="train the base pipeline of the quickstart")
    parser.add_argument("--output", type=Path, default=HERE / "base")
    parser.add_argument("--autoencoder-steps", type=int, default=3000)
    parser.add_argument("--transformer-steps", type=int, default=3000)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reuse-autoencoder", action="store_true", help="take it from the output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.reuse_autoencoder:
        autoencoder = train_autoencoder(options.autoencoder_steps)
        autoencoder.to(torch.float16).save_pretrained(options.output / "vae")
    # The transformer is trained with the rounded weights that are shipped.
    autoencoder = AutoencoderDC.from_pretrained(options.output / "vae")
    pipeline = make_pipeline(autoencoder.requires_grad_(False), make_transformer())
    train_transformer(pipeline, options.pictures, options.transformer_steps)
    pipeline.transformer.to(torch.float16)
    pipeline.vae.to(torch.float16)  # the text encoder stays: transformers keeps the stored dtype
    pipeline.save_pretrained(options.output)
    stored = SanaPipeline.from_pretrained(options.output)
    stored.set_progress_bar_config(disable=True)
    for name, share in measure(stored).items():
        print(f"prompt following, {name}: {100 * share:.1f} %")


if __name__ == "__main__":
    main()
