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
    ("name", "reported"),
    [
        ("Tesla T4", 14.56),
        ("NVIDIA A10", 21.99),
        ("NVIDIA A30", 23.53),
        ("NVIDIA L40", 44.40),
        ("NVIDIA L40S", 44.42),
        ("NVIDIA RTX 6000 Ada Generation", 44.43),
        ("NVIDIA RTX A4000", 15.61),
        ("NVIDIA GeForce RTX 4090", 23.52),
        ("NVIDIA GeForce RTX 5090", 31.36),
        ("NVIDIA GeForce RTX 3060", 11.75),
        ("NVIDIA A100-SXM4-40GB", 39.50),
        ("NVIDIA A100 80GB PCIe", 79.14),
    ],
)
def test_what_is_offered_is_what_out_of_memory_errors_report(name: str, reported: float) -> None:
    """Total capacity (GiB) in public reports of PyTorch's errors: no more, not far less."""
    row = facts_of(name)
    assert row is not None
    assert 0.99 * reported <= row.offered_bytes / GIB <= reported


def test_capabilities_go_with_number_formats() -> None:
    """bfloat16 is there from capability 8.0 on; AMD's devices have none."""
    for row in _ROWS:
        if row.pattern.startswith("MI"):
            assert not row.capability and row.bf16
        else:
            assert row.bf16 == (float(row.capability) >= 8.0), row.pattern


def test_every_device_offers_less_than_is_advertised() -> None:
    for row in _ROWS:
        assert 0.9 * row.memory_bytes <= row.offered_bytes <= 0.995 * row.memory_bytes, row.pattern


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
