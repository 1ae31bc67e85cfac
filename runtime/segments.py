"""What is said to CUDA and to PyTorch's allocator before they begin. No torch.

The allocator may take and give back device memory page by page. Otherwise it keeps segments that
can't grow, with holes in them that no later tensor fits in: a third of the memory and more (16.4
against 10.8 GiB in meta-pytorch/torchtune, issue 1185). And a tensor that is up to 1 MiB smaller
than the hole it is put in takes, and is counted as, all of it (`should_split` in
c10/cuda/CUDACachingAllocator.cpp), so that no plan can agree with its figures.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, MutableMapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables by which a person tells the allocator what to do."""
BY_PAGES = "expandable_segments:True"
FIXED = "expandable_segments:False"


def spills() -> bool:
    """Whether the driver is that of Windows, also below its subsystem for Linux: it may move device
    memory to the host's without a word, and fails where memory is mapped by pages
    (pytorch/pytorch, issue 192330)."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def map_by_pages(environment: MutableMapping[str, str] = os.environ) -> None:
    """See the module. To be called before torch is imported. What a person has set stays."""
    if sys.platform == "linux" and not spills() and not setting(environment):
        environment[VARIABLES[0]] = BY_PAGES


def number_by_bus(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let CUDA number devices as nvidia-smi does, not the fastest first: what is planned for the
    first is then run on the same one. To be called before CUDA begins; a person's order stays."""
    environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def setting(environment: Mapping[str, str] = os.environ) -> str:
    """What the allocator is told, by us or by a person; "" for nothing."""
    return next((environment[name] for name in VARIABLES if environment.get(name)), "")
