"""What a process holds on a CUDA device besides tensors: stated constants, with their sources. No
torch."""

from __future__ import annotations

from compiler.memory import Candidate
from runtime.memory.rounding import rounded

CONTEXT = "context"
CUBLAS = "workspace of cuBLAS"
PAGES = "pages of the allocator"
NCCL = "buffers of NCCL"
OUTSIDE = (CONTEXT, PAGES, NCCL)
"""What the allocator's peak of bytes handed out does not tell of."""
ALL = (CUBLAS, PAGES, NCCL, CONTEXT)
"""All constants, in the order in which a phase has them."""

# The context with its loaded kernels is outside of PyTorch's count ("some context needs to be
# created on GPU", documentation of torch.cuda.memory_allocated); 0.4 to 0.6 GB with lazy module
# loading, here the middle.
CUDA_CONTEXT = 500_000_000
# cuBLAS: 2 x 4 MiB + 8 x 16 KiB (CUBLAS_WORKSPACE_CONFIG ":4096:2:16:8", PyTorch's default before
# compute capability 9.0; 32 MiB from there on), taken through PyTorch's allocator. Each thread has
# a handle of its own, and each handle a workspace, which it keeps: the backward pass runs in a
# second thread (PyTorch's notes "CUDA semantics", cuBLAS workspaces; "Autograd mechanics").
CUBLAS_WORKSPACE = rounded((2 * 4096 + 8 * 16) * 1024)
HOPPER_WORKSPACE = rounded(32 * 2**20)
HOPPER = 9.0
# The allocator's segments grow and shrink by pages (see `runtime.segments`), of which the last one
# of each pool is full only in part: 20 MiB for large blocks, 2 MiB for small ones (kLargeBuffer,
# kSmallBuffer in c10/core/AllocatorConfig.h). All our blocks belong to one stream.
PAGE_BYTES = 20 * 2**20 + 2 * 2**20
# NCCL, for each channel and each neighbour: buffers to receive into, of its three protocols (4 MiB;
# 120 words of 8 bytes x 640 threads x 8 steps; 8 lines of 16 bytes x 512 threads x 8 steps), and
# one to send from, in pages of 2 MiB: 10 and 2 MiB, as NCCL itself logs (NVIDIA/nccl, issue 1685).
# A ring's neighbours are two, of two devices one.
NCCL_CONNECTION = 12 * 2**20
# How many channels follows from the links: 24 are logged on HGX A100 (NVIDIA/nccl-tests, issue
# 100), 16 to 24 on H100; 2 to 4 where devices have PCIe alone (issue 307 there).
CHANNELS, CHANNELS_PCIE = 24, 4
LINKED = frozenset({7.0, 8.0, 9.0, 10.0})
"""Compute capabilities of which there are devices with NVLink between all of them."""


def constants(candidate: Candidate, *, backward: bool) -> dict[str, int]:
    """Bytes by part on the candidate's device that belong to no tensor; nothing on others than
    CUDA's. `backward`: in or after a backward pass."""
    if candidate.device != "cuda":
        return {}
    capability = float(candidate.capability or 0)
    workspace = HOPPER_WORKSPACE if capability >= HOPPER else CUBLAS_WORKSPACE
    found = {CUBLAS: (2 if backward else 1) * workspace, PAGES: PAGE_BYTES}
    if candidate.ranks > 1:
        channels = CHANNELS if capability in LINKED else CHANNELS_PCIE
        found[NCCL] = channels * min(candidate.ranks - 1, 2) * NCCL_CONNECTION
    return found | {CONTEXT: rounded(CUDA_CONTEXT)}
