"""The table of devices: names as drivers give them, and figures that agree with each other."""

import pytest

from compiler.devices import _ROWS, GIB, facts_of, peak_flops


@pytest.mark.parametrize(
    ("name", "tflops", "gib"),
    [
        ("NVIDIA GeForce RTX 4090", 165.2, 24),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2, 16),
        ("NVIDIA GeForce RTX 3080 Ti", 68.2, 12),
        ("NVIDIA GeForce RTX 3060", 25.5, 12),
        ("NVIDIA A100-SXM4-40GB", 312, 40),
        ("NVIDIA A100 80GB PCIe", 312, 80),
        ("NVIDIA A10G", 70, 24),
        ("NVIDIA A10", 125, 24),
        ("NVIDIA RTX A6000", 154.8, 48),
        ("NVIDIA L4", 121, 24),
        ("NVIDIA L40S", 362.05, 48),
        ("NVIDIA H100 80GB HBM3", 989.4, 80),
        ("NVIDIA H100 PCIe", 756, 80),
        ("NVIDIA H200", 989.4, 141),
        ("NVIDIA H200 NVL", 835.5, 141),
        ("Tesla T4", 65, 16),
        ("Tesla V100-SXM2-32GB", 125, 32),
        ("AMD Instinct MI300X", 1307.4, 192),
    ],
)
def test_names_find_their_row(name: str, tflops: float, gib: int) -> None:
    row = facts_of(name)
    assert row is not None and (row.half_tflops, row.memory_bytes) == (tflops, gib * GIB)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H200 MIG 1g.18gb",
        "Apple M3",
        "NVIDIA RTX A4500",
        "",
    ],
)
def test_an_unknown_device_has_no_figure(name: str) -> None:
    assert facts_of(name) is None and peak_flops(name, "bfloat16") is None


def test_geforce_cards_do_twice_their_float32_with_float32_accumulation() -> None:
    cards = [row for row in _ROWS if row.pattern.startswith("RTX ") and row.bf16]
    cards = [row for row in cards if row.pattern[4:8].isdigit() and row.pattern[4:8] != "6000"]
    assert len(cards) > 15
    for row in cards:
        assert row.half_tflops == pytest.approx(2 * row.float_tflops, rel=0.01), row.pattern


def test_bf16_without_hardware_is_as_slow_as_float32() -> None:
    assert peak_flops("Tesla T4", "bfloat16") == peak_flops("Tesla T4", "float32") == 8.1e12
    assert peak_flops("Tesla T4", "float16") == 65e12
    assert peak_flops("NVIDIA H200", "bfloat16") == 989.4e12
