"""Tiny pipelines with random weights, made on the spot, with tokenizers and without a download.

`make_tiny("sana", folder)` and `make_tiny("sd3", folder)` write one in about a second;
`tiny_model` describes it as a plan does. Sizes: one latent is 8 x 8 pixels; Sana takes edges that
are multiples of 8 (the pipeline: of 32), SD3 of 16, up to 192 pixels.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from compiler.families import FAMILIES
from compiler.plan import Component, Model

LETTERS = string.ascii_letters + string.digits + string.punctuation
MADE: dict[str, dict[Path, bytes]] = {}  # by everything that a pipeline is made from


def make_tiny(family: str, folder: Path, seed: int = 0, **transformer: Any) -> Path:
    """Write a tiny pipeline of `family` into `folder` and return it.

    The same seed gives the same weights; `transformer` overrides its configuration. Each is made
    once and then copied.
    """
    key = repr((family, seed, sorted(transformer.items())))
    if key not in MADE:
        MADE[key] = _files(family, seed, transformer)
    for name, content in MADE[key].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _files(family: str, seed: int, transformer: dict[str, Any]) -> dict[Path, bytes]:
    """The files of a pipeline, a megabyte or so."""
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as name:
        torch.manual_seed(seed)
        pipeline = _maker(family)(transformer)
        _wake(getattr(pipeline, FAMILIES[family].trained_component))
        pipeline.save_pretrained(name)
        written = [path for path in Path(name).rglob("*") if path.is_file()]
        return {path.relative_to(name): path.read_bytes() for path in written}


def _maker(family: str) -> Callable[[dict[str, Any]], Any]:
    """Others than the first two have a module each."""
    own = {"sana": _sana, "sd3": _sd3}.get(family)
    return own or import_module(f"tests.runtime.tinies.{family}").pipeline


def tiny_model(
    family: str, folder: Path, init: Literal["pretrained", "random"] = "pretrained"
) -> Model:
    """What a plan says of the pipeline in `folder`."""
    card = FAMILIES[family]
    files = {name: _config_file(folder / name) for name in card.components}
    return Model(
        family=family,
        base=str(folder),
        local=True,
        revision="",
        init=init,
        trained_component=card.trained_component,
        components=tuple(
            Component(
                name=name,
                class_name=class_name,
                parameters=0,
                dtype="float32",
                trained=name == card.trained_component,
            )
            for name, class_name in card.components.items()
        ),
        configs={name: file.read_text() for name, file in files.items() if file.exists()},
    )


def _config_file(folder: Path) -> Path:
    return folder / ("scheduler_config.json" if folder.name == "scheduler" else "config.json")


@torch.no_grad()
def _wake(transformer: Any) -> None:
    """Give weight to what starts near zero, so that prompts and adapters show in the pictures."""
    for parameter in transformer.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)


def _sana(overrides: dict[str, Any]) -> SanaPipeline:
    tokenizer = gemma_tokenizer()
    encoder = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=4096,
        sliding_window=512,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "sample_size": 32,
        **overrides,
    }
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(encoder).eval(),
        vae=AutoencoderDC(
            latent_channels=config["in_channels"],
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(4, 8, 8, 16),
            decoder_block_out_channels=(4, 8, 8, 16),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,), (5,)),
            decoder_qkv_multiscales=((), (), (5,), (5,)),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _sd3(overrides: dict[str, Any]) -> StableDiffusion3Pipeline:
    tokenizers = [clip_tokenizer(pad) for pad in ("<|endoftext|>", "!")]
    clips = [_clip(tokenizers[0], 16, "quick_gelu"), _clip(tokenizers[1], 24, "gelu")]
    tokenizer_3 = t5_tokenizer()
    t5 = T5Config(
        vocab_size=len(tokenizer_3),
        d_model=48,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    config: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 40,
        "pos_embed_max_size": 12,
        **overrides,
    }
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            block_out_channels=(4, 4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=config["in_channels"],
            layers_per_block=1,
            norm_num_groups=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        ),
        text_encoder=clips[0],
        tokenizer=tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=T5EncoderModel(t5).eval(),
        tokenizer_3=tokenizer_3,
    )


def _clip(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def gemma_tokenizer() -> GemmaTokenizer:
    """One token a letter, and bytes for what is not ASCII."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{n:02X}>" for n in range(256)), "\u2581", "\n", *LETTERS]
    vocab = {token: n for n, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True)


def clip_tokenizer(pad: str) -> CLIPTokenizer:
    """One token a letter; `</w>` marks the last one of a word."""
    letters = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: n for n, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """One token a letter, two for the commonest words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [("\u2581a", -1.0), ("\u2581of", -1.0), *((letter, -3.0) for letter in LETTERS)]
    pieces += [(f"<extra_id_{n}>", 0.0) for n in (1, 0)]
    return T5Tokenizer(vocab=pieces, extra_ids=2, model_max_length=512)
