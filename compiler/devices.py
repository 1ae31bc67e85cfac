"""Peak arithmetic of devices, from their vendors' data sheets: dense matrix products, no sparsity.

Sources: NVIDIA's data sheets of A100, A30, A40, A10, L4, L40, L40S, H100, H200, HGX B200, T4, V100,
RTX A6000 and RTX 6000 Ada, and the appendices of its architecture white papers (GA102, Ada, RTX
Blackwell), where bfloat16 is the row "with FP32 accumulate": GeForce cards do half of what the
advertised row with FP16 accumulate says. AMD's data sheets of MI210, MI250X, MI300X and MI325X.
Apple publishes no such figure. float32 is without TF32, as PyTorch multiplies by default.

Of its memory a device offers less than is advertised: the driver keeps a share, and where error
correction is on by default, it takes about a 16th of GDDR6. `offered_gib` is what PyTorch said to
be a device's total capacity when it ran out of memory, in public reports of such errors: the lowest
of a device's figures. A10G and L4 are taken as A10, A40 as L40, which have memory of the same kind
and size; H100 as A100. Of others `DRIVER` is taken off: the most that was seen without error
correction is 2.4 % (16 GiB: RTX A4000, 15.61).
"""

from __future__ import annotations

import re

from attrs import frozen

from compiler.plan import Dtype

GIB = 2**30
DRIVER = 0.025  # of the advertised memory, what the driver keeps at most


@frozen
class DeviceFacts:
    """One device. `half_tflops` is of bfloat16, or of float16 where `bf16` is False."""

    pattern: str  # of the name as the driver gives it; the first row that matches counts
    memory_bytes: int  # as advertised; 0: the name alone does not tell
    half_tflops: float
    float_tflops: float
    bf16: bool = True
    offered_gib: float = 0.0  # as PyTorch sees it; 0: not known
    capability: str = ""  # CUDA compute capability, of NVIDIA's list of its devices

    @property
    def offered_bytes(self) -> int:
        """What a program can have of the memory, its own CUDA context included."""
        known = int(self.offered_gib * GIB)
        return known or int(self.memory_bytes * (1 - DRIVER))


_ROWS = (
    DeviceFacts(r"B200", 180 * GIB, 2250, 75, capability="10.0"),
    DeviceFacts(r"GH200|H200(?! NVL)", 141 * GIB, 989.4, 66.9, offered_gib=139.7, capability="9.0"),
    DeviceFacts(r"H200 NVL", 141 * GIB, 835.5, 60.3, offered_gib=139.7, capability="9.0"),
    DeviceFacts(r"H100 NVL", 94 * GIB, 835.5, 60.3, capability="9.0"),
    DeviceFacts(r"H100 PCIe", 80 * GIB, 756, 51.2, offered_gib=79.1, capability="9.0"),
    DeviceFacts(r"H[18]00", 80 * GIB, 989.4, 66.9, offered_gib=79.1, capability="9.0"),
    DeviceFacts(r"A[18]00.*40GB", 40 * GIB, 312, 19.5, offered_gib=39.4, capability="8.0"),
    DeviceFacts(r"A[18]00\b", 80 * GIB, 312, 19.5, offered_gib=79.1, capability="8.0"),
    DeviceFacts(r"A40\b", 48 * GIB, 149.7, 37.4, offered_gib=44.4, capability="8.6"),
    DeviceFacts(r"A30\b", 24 * GIB, 165, 10.3, offered_gib=23.5, capability="8.0"),
    DeviceFacts(r"A10G", 24 * GIB, 70, 35, offered_gib=21.9, capability="8.6"),
    DeviceFacts(r"A10\b", 24 * GIB, 125, 31.2, offered_gib=21.9, capability="8.6"),
    DeviceFacts(r"L40S", 48 * GIB, 362.05, 91.6, offered_gib=44.4, capability="8.9"),
    DeviceFacts(r"L40\b", 48 * GIB, 181.05, 90.5, offered_gib=44.4, capability="8.9"),
    DeviceFacts(r"L4\b", 24 * GIB, 121, 30.3, offered_gib=21.9, capability="8.9"),
    DeviceFacts(r"V100.*32GB", 32 * GIB, 125, 15.7, bf16=False, capability="7.0"),
    DeviceFacts(r"V100", 16 * GIB, 125, 15.7, bf16=False, capability="7.0"),
    DeviceFacts(
        r"Tesla T4|\bT4\b", 16 * GIB, 65, 8.1, bf16=False, offered_gib=14.5, capability="7.5"
    ),
    DeviceFacts(r"RTX PRO 6000", 96 * GIB, 503.8, 125, capability="12.0"),
    DeviceFacts(r"RTX 6000 Ada", 48 * GIB, 364.2, 91.1, offered_gib=44.4, capability="8.9"),
    DeviceFacts(r"RTX A6000", 48 * GIB, 154.8, 38.7, capability="8.6"),
    DeviceFacts(r"RTX A5000", 24 * GIB, 111.1, 27.8, capability="8.6"),
    DeviceFacts(r"RTX A4000", 16 * GIB, 76.7, 19.2, offered_gib=15.6, capability="8.6"),
    DeviceFacts(
        r"RTX 5090(?! Laptop)", 32 * GIB, 209.5, 104.8, offered_gib=31.3, capability="12.0"
    ),
    DeviceFacts(r"RTX 5080(?! Laptop)", 16 * GIB, 112.6, 56.3, capability="12.0"),
    DeviceFacts(r"RTX 5070 Ti(?! Laptop)", 16 * GIB, 87.9, 43.9, capability="12.0"),
    DeviceFacts(r"RTX 5070(?! Laptop)", 12 * GIB, 61.7, 30.9, capability="12.0"),
    DeviceFacts(r"RTX 4090(?! Laptop)", 24 * GIB, 165.2, 82.6, offered_gib=23.5, capability="8.9"),
    DeviceFacts(r"RTX 4080 SUPER", 16 * GIB, 104.4, 52.2, capability="8.9"),
    DeviceFacts(r"RTX 4080(?! Laptop)", 16 * GIB, 97.5, 48.7, capability="8.9"),
    DeviceFacts(r"RTX 4070 Ti SUPER", 16 * GIB, 88.2, 44.1, capability="8.9"),
    DeviceFacts(r"RTX 4070 Ti", 12 * GIB, 80.2, 40.1, capability="8.9"),
    DeviceFacts(r"RTX 4070 SUPER", 12 * GIB, 71.0, 35.5, capability="8.9"),
    DeviceFacts(r"RTX 4070(?! Laptop)", 12 * GIB, 58.3, 29.1, capability="8.9"),
    DeviceFacts(r"RTX 4060 Ti.*16GB", 16 * GIB, 44.1, 22.1, capability="8.9"),
    DeviceFacts(r"RTX 4060 Ti.*8GB", 8 * GIB, 44.1, 22.1, capability="8.9"),
    DeviceFacts(r"RTX 4060 Ti", 0, 44.1, 22.1, capability="8.9"),  # the driver tells no size
    DeviceFacts(r"RTX 4060(?! Laptop)", 8 * GIB, 30.2, 15.1, capability="8.9"),
    DeviceFacts(r"RTX 3090 Ti", 24 * GIB, 80.0, 40.0, capability="8.6"),
    DeviceFacts(r"RTX 3090", 24 * GIB, 71.0, 35.6, offered_gib=23.6, capability="8.6"),
    DeviceFacts(r"RTX 3080 Ti(?! Laptop)", 12 * GIB, 68.2, 34.1, capability="8.6"),
    DeviceFacts(r"RTX 3080 12GB", 12 * GIB, 61.3, 30.6, capability="8.6"),
    DeviceFacts(r"RTX 3080 10GB", 10 * GIB, 59.5, 29.8, capability="8.6"),
    DeviceFacts(r"RTX 3080(?! Laptop)", 0, 59.5, 29.8, capability="8.6"),  # nor here
    DeviceFacts(r"RTX 3070 Ti(?! Laptop)", 8 * GIB, 43.5, 21.7, capability="8.6"),
    DeviceFacts(r"RTX 3070(?! Laptop)", 8 * GIB, 40.6, 20.3, capability="8.6"),
    DeviceFacts(r"RTX 3060 Ti", 8 * GIB, 32.4, 16.2, capability="8.6"),
    DeviceFacts(r"RTX 3060(?! Laptop)", 12 * GIB, 25.5, 12.7, offered_gib=11.7, capability="8.6"),
    DeviceFacts(r"RTX 2080 Ti", 11 * GIB, 53.8, 13.4, bf16=False, capability="7.5"),
    DeviceFacts(r"MI325X", 256 * GIB, 1307.4, 163.4),
    DeviceFacts(r"MI300X", 192 * GIB, 1307.4, 163.4),
    DeviceFacts(r"MI250X", 128 * GIB, 383, 47.9),
    DeviceFacts(r"MI210", 64 * GIB, 181, 22.6),
)


def facts_of(name: str) -> DeviceFacts | None:
    """The row of the device that its driver calls `name`; None if it is not in the table."""
    if " MIG " in name:  # a slice of a device does a share of its work
        return None
    return next((row for row in _ROWS if re.search(row.pattern, name, re.IGNORECASE)), None)


def named(word: str) -> tuple[str, DeviceFacts] | None:
    """The device that a person calls `word` ("rtx-4090", "a100 80gb"), as its driver would.

    None if the table has none whose name tells its memory.
    """
    name = re.sub(r"[\s_-]+", " ", word.strip())
    card = re.sub(r"^(?=a?\d{4}(?:ti)?\b)", "RTX ", name, flags=re.I)  # "4090", "a6000"
    for form in (name, card, re.sub(r"^(geforce |nvidia |amd |instinct )+", "", name, flags=re.I)):
        # "4070ti" first apart: the plain card's name is a part of it.
        apart = re.sub(
            r"(?<=[a-z])(?=\d{4})|(?<=\d{4})(?=ti|super)|(?<=\d{4}ti)(?=super)",
            " ",
            form,
            flags=re.I,
        )
        for spelt in (apart, form):
            row = facts_of(spelt)
            if row is not None and row.memory_bytes:
                return spelt.upper(), row
    return None


def names() -> tuple[str, ...]:
    """Names that `named` knows, as a person may write them."""
    found = []
    for row in _ROWS:
        plain = re.sub(r"\(\?!.*?\)|\\b", "", row.pattern).split("|")[0].replace(".*", " ")
        if row.memory_bytes and re.fullmatch(r"[\w ]+", plain):
            found.append(plain.lower().replace(" ", "-"))
    return tuple(dict.fromkeys(found))


def peak_flops(name: str, compute: Dtype) -> float | None:
    """Floating-point operations a second at most, of matrix products in `compute`.

    bfloat16 without hardware for it is emulated in float32. None where no figure is known.
    """
    row = facts_of(name)
    if row is None:
        return None
    half = compute == "float16" or (compute == "bfloat16" and row.bf16)
    return 1e12 * (row.half_tflops if half else row.float_tflops)
