"""Figures that others published, and how the estimate moves.

Published: "Stable Diffusion 3.5 Large Fine-tuning Tutorial" (a LoRA of to_q, to_k, to_v and
to_out.0 with activation checkpointing at 1024 px; its trainer reads 77 CLIP and 77 T5 tokens), the
device's total in 10^9 bytes; "about 12G" as the least that Sana 1.6B needs, in 2^30 bytes. Others
come without all of their settings, and are bounds.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from attrs import evolve

from compiler.families import FAMILIES
from compiler.memory import Candidate, Simulation
from compiler.plan import Layout, Phase
from runtime.memory.buckets import worst
from runtime.memory.constants import ALL, CUDA_CONTEXT
from runtime.memory.rounding import rounded
from runtime.memory.simulate import RuntimeMemoryModel
from tests.runtime.memory_cases import (
    IMAGE_ATTENTION,
    SANA,
    SD35_LARGE,
    candidate,
    known,
    small,
)

MODEL = RuntimeMemoryModel()
MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


def train_phase(*arguments: Any, **options: Any) -> Phase:
    """The training step's memory."""
    return phases_of(MODEL.simulate(candidate(*arguments, **options)))["train"]


def phases_of(found: Simulation) -> dict[str, Phase]:
    """By name; every phase's parts add up."""
    for phase in found.phases:
        assert sum(phase.parts.values()) == phase.device_bytes
    return {phase.name: phase for phase in found.phases}


@pytest.mark.parametrize(
    ("rank", "batch", "published"), [(768, 6, 32e9), (128, 1, 19.65e9), (64, 1, 18.83e9)]
)
def test_sd35_large_lora(rank: int, batch: int, published: float) -> None:
    train = train_phase(
        known(SD35_LARGE),
        rank=rank,
        targets=IMAGE_ATTENTION,
        tokens=77,
        checkpointing=1,
        shapes=((1024, 1024, batch),),
    )
    assert train.device_bytes == pytest.approx(published, rel=0.03)
    assert train.parts["weights"] == pytest.approx(2 * 8_056_627_520 + 179_306_496, rel=0.001)


@pytest.mark.parametrize(("rank", "published"), [(128, 23.37e9), (64, 21.50e9)])
def test_sd35_large_validation(rank: int, published: float) -> None:
    """The tutorial's pictures: 1024 px with guidance, decoded by the VAE in float32, in which
    convolutions use TF32 unless a program says otherwise."""
    given = candidate(
        known(SD35_LARGE),
        rank=rank,
        targets=IMAGE_ATTENTION,
        tokens=77,
        checkpointing=1,
        pictures=((1024, 1024),),
        guidance=7.5,
    )
    found = MODEL.simulate(evolve(given, tf32=True))
    assert phases_of(found)["validate"].device_bytes == pytest.approx(published, rel=0.08)


def test_sd35_text_encoders_are_freed() -> None:
    """The tutorial: about 10.4 GB (of 2^30 bytes) are saved by caching what they say."""
    found = phases_of(MODEL.simulate(candidate(known(SD35_LARGE), rank=64, tokens=77)))
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    freed = sum(found[name].parts["weights"] for name in names)
    assert freed == pytest.approx(10.4 * 2**30, rel=0.01)


@pytest.mark.parametrize(("checkpointing", "tensors"), [(1, 12.84e9), (0, 13.62e9)])
def test_sana_full_bfloat16(checkpointing: int, tensors: float) -> None:
    train = train_phase(known(SANA), trained="bfloat16", checkpointing=checkpointing)
    constants = sum(train.parts[name] for name in ALL if name in train.parts)
    assert train.device_bytes - constants == pytest.approx(tensors, rel=0.01)
    if checkpointing:
        assert train.device_bytes == pytest.approx(12 * 2**30, rel=0.05)


FLUX, XL = "black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-xl-base-1.0"
LESS = {"optimizer": "adafactor", "fused": False, "max_grad_norm": 0.0, "trained": "bfloat16"}
FUSED = {**LESS, "layout": Layout(fused_backward=True, activation_checkpointing=1)}
LORA = {"rank": 16, "checkpointing": 1, "optimizer": "adamw-8bit"}
WHOLE = pytest.mark.skipif("TUNER_WHOLE_SHELF" not in os.environ, reason="half a minute")
BOUNDS: list[Any] = [  # base, its quantiser, settings as far as they are told, bytes
    pytest.param(FLUX, "fp8", {**LORA, "shapes": ((1024, 1024, 2),)}, 24 * 2**30, id="flux-2",
                 marks=WHOLE),
    pytest.param(FLUX, "fp8", LORA, 16 * 2**30, id="flux-1", marks=WHOLE),
    pytest.param(XL, "none", FUSED, 10.3e9, id="xl-full-fused-backward", marks=WHOLE),
    pytest.param(XL, "none", LORA, 8e9, id="xl-lora", marks=WHOLE),
    pytest.param(MEDIUM, "none", {**LESS, "shapes": ((512, 512, 1),)}, 27.2e9, id="medium-512",
                 marks=WHOLE),
    pytest.param(MEDIUM, "none", {**FUSED, "shapes": ((512, 512, 1),)}, 10.2e9,
                 id="medium-512-fused-backward"),
    pytest.param(SANA, "none", {"trained": "bfloat16", "checkpointing": 1,
                                "shapes": ((1024, 1024, 6),)}, 24 * 2**30, id="sana-6"),
]  # fmt: skip


KLEIN = "black-forest-labs/FLUX.2-klein-base-4B"
BESIDE = 460_000_000
"""Bytes that the measured program had on the device besides: another model, cached prompts and
latents."""


@WHOLE
def test_flux2_klein_full() -> None:
    """huggingface/peft, method_comparison/image-gen: full, in bfloat16, on an L40S (512 pixels,
    batch 2, 512 tokens). Allocated between two steps, and at most reserved: an upper bound. There
    gradients are there between two steps."""
    found = phases_of(
        MODEL.simulate(
            evolve(
                candidate(
                    known(KLEIN),
                    trained="bfloat16",
                    checkpointing=1,
                    fused=False,
                    tokens=512,
                    shapes=((512, 512, 2),),
                ),
                capability="8.9",
            )
        )
    )
    names = ("context", "pages of the allocator")
    update = found["update"].device_bytes - sum(found["update"].parts[n] for n in names) + BESIDE
    assert 0.97 * 39.873e9 < update < 39.873e9
    held = ("weights", "optimizer", "gradients", "workspace of cuBLAS")
    rest = sum(found["update"].parts[name] for name in held) + BESIDE
    assert rest == pytest.approx(31.505e9, rel=0.005)


@WHOLE
def test_flux_lora() -> None:
    """Hugging Face's blog "(LoRA) Fine-Tuning FLUX.1-dev on Consumer Hardware": 26 GB on an RTX
    4090, LoRA of rank 4 of the base in bfloat16, 512 x 768 pixels."""
    train = train_phase(
        known(FLUX),
        rank=4,
        targets=(r".*\.to_[qkv]", r".*\.to_out\.0"),
        tokens=77,
        checkpointing=1,
        optimizer="adamw-8bit",
        shapes=((512, 768, 1),),
    )
    assert train.device_bytes == pytest.approx(26e9, rel=0.05)


@WHOLE
def test_qwen_image_lora() -> None:
    """musubi-tuner, docs/qwen_image.md: 42 GB (of 2^30 bytes) for a LoRA of the base in bfloat16 at
    1024 pixels, batch 1."""
    train = train_phase(
        known("Qwen/Qwen-Image"),
        rank=16,
        targets=(r".*\.attn\..*", r".*_mlp\..*"),
        checkpointing=1,
        optimizer="adamw-8bit",
        shapes=((1024, 1024, 1),),
    )
    assert train.device_bytes == pytest.approx(42 * 2**30, rel=0.03)


@pytest.mark.parametrize(("base", "kind", "settings", "published"), BOUNDS)
def test_figures_with_incomplete_settings(
    base: str, kind: Any, settings: dict[str, Any], published: float
) -> None:
    """What others report that a like run takes, of settings that are told in part: here it is
    enough. The weights alone are the lower bound."""
    step = candidate(known(base), **settings)
    parts = tuple(evolve(p, quantize=kind) if p.trained else p for p in step.model.components)
    train = phases_of(MODEL.simulate(evolve(step, model=evolve(step.model, components=parts))))[
        "train"
    ]
    assert train.parts["weights"] < train.device_bytes < published


def test_t5_encodes_in_what_is_published() -> None:
    """T5-XXL in bf16: about 10 GB."""
    found = phases_of(MODEL.simulate(candidate(known(SD35_LARGE), rank=64, tokens=77)))
    assert found["text_encoder_3"].device_bytes == pytest.approx(10e9, rel=0.05)


@pytest.mark.parametrize(
    ("capability", "mib"), [("", 8.125), ("8.9", 8.125), ("9.0", 32), ("12.0", 32)]
)
def test_each_thread_s_workspace_of_cublas(capability: str, mib: float) -> None:
    """The passes have two threads, encoding has one."""
    asked = small("sd3", rank=4, device="cuda", compute="bfloat16", trained="float32")
    found = phases_of(MODEL.simulate(evolve(asked, capability=capability)))
    for name, threads in {"text_encoder": 1, "load": 1, "train": 2, "update": 2, "save": 2}.items():
        assert found[name].parts["workspace of cuBLAS"] == threads * mib * 2**20, name


def test_counts() -> None:
    found = MODEL.simulate(
        small("sd3", rank=4, device="cuda", compute="bfloat16", trained="float32")
    )
    assert found.adapted_modules == 4 * 8 - 1  # the last block has no to_add_out
    assert found.trainable == 4 * (96 + 96) * found.adapted_modules
    phases = phases_of(found)
    assert phases["train"].parts["optimizer"] >= 8 * found.trainable
    assert phases["latents"].parts["context"] == rounded(CUDA_CONTEXT)
    assert list(phases["train"].parts)[-1] == "context"
    assert 0 < phases["load"].host_bytes < phases["load"].parts["weights"] / 4  # one at a time
    assert phases["latents"].host_bytes == phases["latents"].parts["weights"]
    kept = phases["save"].parts["adapter"] + phases["save"].parts["optimizer"]
    assert phases["save"].host_bytes == kept
    assert phases["train"].host_bytes == kept  # the copy is written while training goes on


def test_flops_of_a_full_step() -> None:
    """Three times the forward pass, and four with recomputation (all blocks, not the ends)."""
    off, on = (
        MODEL.simulate(small("sd3", checkpointing=every, device="cuda")).flops for every in (0, 1)
    )
    assert 1.30 < on / off < 1.34


def peak(family: str, **options: Any) -> int:
    """Bytes of a small model's step on a CUDA device."""
    given = {"rank": 4, "device": "cuda", "compute": "bfloat16", **options}
    return phases_of(MODEL.simulate(small(family, **given)))["train"].device_bytes


@pytest.mark.parametrize("family", ["sana", "sd3"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rank", [1, 4, 5, 16]),
        ("checkpointing", [1, 2, 3, 0]),
        ("tokens", [16, 17, 64]),
        ("shapes", [((256, 256, n),) for n in (1, 2, 3, 5)]),
        ("shapes", [((w, h, 2),) for w, h in ((128, 128), (256, 128), (256, 192), (384, 384))]),
        ("accumulate", [1, 2, 3]),
        ("ema", [False, True]),
    ],
)
def test_more_never_needs_less(family: str, name: str, values: list[Any]) -> None:
    peaks = [peak(family, **{name: value}) for value in values]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_worst_bucket_is_found(family: str) -> None:
    shapes = ((256, 128, 2), (128, 256, 3), (256, 192, 2), (128, 128, 4))
    each = [peak(family, shapes=(shape,)) for shape in shapes]
    assert peak(family, shapes=shapes) == max(each)


def test_worst_keeps_what_no_other_exceeds() -> None:
    shapes = ((64, 64, 8), (64, 64, 4), (128, 64, 4), (128, 128, 2), (128, 128, 1), (512, 16, 4))
    assert worst(shapes) == [(128, 128, 2), (512, 16, 4), (64, 64, 8)]
    assert worst(((1024, 1024, 4), (512, 512, 5))) == [(1024, 1024, 4)]


def test_model_that_cannot_be_built_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="nothing_like_it"):
        MODEL.simulate(small("sana", rank=4, targets=("nothing_like_it",)))


def kept_as(kind: str, family: str, **options: Any) -> Candidate:
    """A small step on a base that is quantised."""
    step = small(family, rank=4, device="cuda", compute="bfloat16", **options)
    parts = tuple(
        evolve(part, quantize=kind) if part.name == "transformer" else part
        for part in step.model.components
    )
    return evolve(step, model=evolve(step.model, components=parts))


def bytes_of(step: Candidate, phase: str) -> int:
    return phases_of(MODEL.simulate(step))[phase].device_bytes


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_saving_never_needs_more(family: str) -> None:
    kinds = [bytes_of(kept_as(kind, family), "train") for kind in ("none", "int8", "nf4")]
    assert kinds == sorted(kinds, reverse=True) and kinds[0] > kinds[-1]
    four = {"shapes": ((256, 256, 4),)}
    parts = [bytes_of(evolve(kept_as("none", family, **four), micro_batch=n), "train")
             for n in (0, 3, 2, 1)]  # fmt: skip
    assert parts == sorted(parts, reverse=True) and parts[0] > parts[-1]
    states = [
        bytes_of(small(family, optimizer=name, device="cuda", compute="bfloat16"), "train")
        for name in ("adamw", "adamw-8bit")
    ]
    assert states[0] > states[1]


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_larger_pictures_and_guidance_never_need_less(family: str) -> None:
    def drawn(size: tuple[int, int], guidance: float) -> int:
        return bytes_of(kept_as("none", family, pictures=(size,), guidance=guidance), "validate")

    sizes = [drawn(size, 4.5) for size in ((128, 128), (192, 128), (192, 192), (256, 256))]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert drawn((128, 128), 1.0) <= drawn((128, 128), 4.5)


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_longer_prompts_never_need_less(family: str) -> None:
    encoder = FAMILIES[family].text_encoders[-1]
    found = [bytes_of(small(family, tokens=n, device="cuda"), encoder) for n in (8, 32, 128)]
    assert found == sorted(found) and found[0] < found[-1]
