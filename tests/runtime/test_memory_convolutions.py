"""What convolutions take on CUDA while they run, against published peaks."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from compiler.families import FAMILIES
from runtime.families import family_of
from runtime.memory import convolutions
from runtime.memory.attention import workspace
from runtime.memory.counters import COUNTERS
from runtime.memory.meta import MetaKernels
from runtime.memory.pretend import as_on
from runtime.memory.rounding import rounded
from runtime.memory.tracker import Tracker
from tests.runtime.memory_cases import known

META = torch.device("meta")
GIB = 2**30
CUBLAS_H100 = 32 * 2**20  # which the measured programs had, and these peaks have not


def tracker(capability: float = 0.0, tf32: bool = False) -> Tracker:
    inside = {**workspace("cuda"), **convolutions.workspaces(capability, tf32)}
    return Tracker({"meta"}, MetaKernels(COUNTERS, "cuda"), inside)


def vae_peak(family: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the weights, and at most while `shape` (pictures of 3 channels, or latents) is
    encoded or decoded."""
    card = FAMILIES[family]
    kind = getattr(diffusers, card.components["vae"])
    with META:
        vae = kind.from_config(dict(card.known[0].configs["vae"])).to(dtype).eval()
    counted = tracker()
    with as_on("cuda"), torch.no_grad(), counted:
        counted.register([*vae.parameters(), *vae.buffers()], "weights")
        held = counted.current
        given = torch.zeros(shape, dtype=dtype, device=META)
        counted.reset_peak()
        (vae.encode if shape[1] == 3 else vae.decode)(given, return_dict=False)
    return held, counted.peak


@pytest.mark.parametrize(
    ("width", "height", "decoding", "encoding"),
    [
        (512, 512, 1.274, 0.900),
        (1248, 832, 4.331, 2.854),
        (1024, 1024, 4.369, 2.879),
        (1920, 1088, 8.468, 5.498),
        (1536, 1536, 9.532, 6.179),
        (2048, 2048, 16.754, None),
    ],
)
def test_vae_of_qwen_image(
    width: int, height: int, decoding: float, encoding: float | None
) -> None:
    """InvokeAI's pull request 9305: GiB that PyTorch had allocated at most on an RTX 4090, weights
    in float16 included."""
    latents = (1, 16, 1, height // 8, width // 8)
    for shape, published in ((latents, decoding), ((1, 3, 1, height, width), encoding)):
        if published is not None:
            _, peak = vae_peak("qwen_image", shape, torch.float16)
            assert peak / GIB == pytest.approx(published, rel=0.004)


@pytest.mark.parametrize(("batch", "published"), [(1, 33.851), (4, 39.490), (8, 47.509)])
def test_vae_of_flux(batch: int, published: float) -> None:
    """sayakpaul/diffusers-torchao, README: memory in inference less that of the model, pictures of
    1024 pixels in bfloat16 on an H100. What the attention of several gives lies channels last, and
    so does what follows it; of a single one its strides don't tell."""
    held, peak = vae_peak("flux", (batch, 16, 128, 128), torch.bfloat16)
    assert (peak - held + CUBLAS_H100) / GIB == pytest.approx(published - 31.438, rel=0.005)


def test_whole_pipeline_of_sd3() -> None:
    """Hugging Face's blog "Diffusers welcomes Stable Diffusion 3": 18.765 GB (of 2^30 bytes) of the
    whole pipeline in float16 at 1024 pixels on an A100. T5 keeps some of its layers in float32."""
    family, model = family_of("sd3"), known("stabilityai/stable-diffusion-3-medium-diffusers")
    held = 0
    for name in (model.trained_component, *family.card.text_encoders):
        part: nn.Module = family.empty(model, name, torch.float16, META)
        held += sum(rounded(p.nbytes) for p in {id(p): p for p in part.parameters()}.values())
    _, peak = vae_peak("sd3", (1, 16, 128, 128), torch.float16)
    assert (held + peak) / GIB == pytest.approx(18.765, rel=0.01)


def step_of(layer: nn.Module, given: Tensor, **options: Any) -> int:
    """Bytes beside tensors at most, of a forward and a backward pass."""
    counted = tracker(**options)
    with as_on("cuda"), counted:
        out = layer(given)
        out.backward(torch.empty_like(out))
    return max((b.nbytes for b in counted._all if b.category == "workspace"), default=0)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=META, requires_grad=True)


@pytest.mark.parametrize(
    ("layer", "result"),
    [
        (nn.Conv2d(8, 16, 3, padding=1, device=META), 16 * 64 * 32),
        (nn.Conv2d(8, 16, 3, stride=2, padding=1, device=META), 16 * 32 * 16),
        (nn.Conv2d(8, 16, (3, 1), dilation=2, device=META), 16 * 60 * 32),
        (nn.Conv2d(8, 16, 1, groups=2, device=META), 16 * 64 * 32),
        (nn.ConvTranspose2d(8, 16, 4, stride=2, padding=1, device=META), 16 * 128 * 64),
    ],
)
def test_copies_of_all_three(layer: nn.Module, result: int) -> None:
    half = layer.to(torch.float16)
    given = meta(2, 8, 64, 32)
    assert half(given)[0].numel() == result
    weight = next(half.parameters())
    expected = given.nbytes + weight.nbytes + 2 * 2 * result  # bytes of each of two samples
    assert step_of(half, given) == rounded(expected)


def test_no_copies() -> None:
    """Where there are no tensor cores, each channel is by itself, or channels lie last."""
    half = nn.Conv2d(8, 16, 3, device=META, dtype=torch.float16)
    exact = nn.Conv2d(8, 16, 3, device=META)
    given, single = meta(2, 8, 64, 32), meta(2, 8, 64, 32, dtype=torch.float32)
    apart = nn.Conv2d(8, 8, 3, groups=8, device=META, dtype=torch.float16)
    assert not step_of(apart, given) and not step_of(half, given, capability=6.1)
    assert step_of(half, given, capability=7.5)
    assert not step_of(exact, single) and step_of(exact, single, tf32=True)
    assert not step_of(exact, single, tf32=True, capability=7.5)
    last = half.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    moved = given.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert not step_of(last, moved)
    assert step_of(last, given) == rounded(given.nbytes)  # PyTorch copies what lies otherwise
