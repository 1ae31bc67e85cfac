"""What a CUDA process holds besides tensors."""

from __future__ import annotations

import pytest
from attrs import evolve

from runtime.memory.constants import constants
from tests.runtime.memory_cases import small

MIB = 2**20


def parts(ranks: int = 1, capability: str = "", *, backward: bool = True) -> dict[str, float]:
    """In MiB."""
    asked = small("sana", rank=4, device="cuda", compute="bfloat16", trained="float32")
    found = constants(evolve(asked, ranks=ranks, capability=capability), backward=backward)
    return {name: n / MIB for name, n in found.items()}


def test_one_device() -> None:
    assert list(parts()) == ["workspace of cuBLAS", "pages of the allocator", "context"]
    assert parts()["pages of the allocator"] == 22
    assert parts()["context"] == pytest.approx(500e6 / MIB, rel=1e-5)


def test_nothing_on_the_processor() -> None:
    assert constants(evolve(small("sana", rank=4), ranks=4), backward=True) == {}


@pytest.mark.parametrize(
    ("ranks", "capability", "mib"),
    [(2, "8.9", 4 * 12), (4, "8.9", 4 * 24), (2, "9.0", 24 * 12), (8, "9.0", 24 * 24)],
)
def test_buffers_of_nccl(ranks: int, capability: str, mib: int) -> None:
    """Per channel and neighbour: three protocols' buffers to receive into, in pages of 2 MiB, and
    2 MiB to send from."""
    protocols = 4 * MIB + 120 * 640 * 8 * 8 + 8 * 512 * 8 * 16
    received = -(-protocols // (2 * MIB)) * 2
    assert received + 2 == 12
    assert parts(ranks, capability)["buffers of NCCL"] == mib


def test_eight_linked_devices_as_published() -> None:
    """8 x H100, communicator initialised, PyTorch's own memory left out: 1.06 GB (NVIDIA/nccl,
    issue 1685)."""
    found = parts(8, "9.0")
    assert (found["context"] + found["buffers of NCCL"]) * MIB == pytest.approx(1.06e9, rel=0.05)
