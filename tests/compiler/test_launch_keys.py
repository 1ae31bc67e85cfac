"""Keys of `[launch]` that say how to share, where one device trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compiler.recipes import RECIPE, compiled, project

STAGE = "launch.deepspeed={stage=3}"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return project(tmp_path, RECIPE)


@pytest.mark.parametrize("devices", [(), ("launch.devices=1",), ('launch.devices="auto"',)])
@pytest.mark.parametrize(
    "given",
    [('launch.strategy="fsdp"',), ('launch.strategy="deepspeed"',),
     ('launch.strategy="deepspeed"', STAGE)],
)  # fmt: skip
def test_a_strategy_for_one_device_is_the_only_fault(
    full: Path, given: tuple[str, ...], devices: tuple[str, ...]
) -> None:
    found = compiled(full, *given, *devices)
    (fault,) = found.diagnostics
    assert found.plan is None and (fault.code, fault.path) == ("no-effect", "launch.strategy")
    assert "this recipe trains on one" in fault.message and "`devices` in [launch]" in fault.help


@pytest.mark.parametrize(
    "given",
    [
        ("launch.devices=1", 'launch.strategy="auto"'),
        ("launch.devices=1", 'launch.reshard_after_forward="auto"'),
        ('launch.strategy="auto"',),
        ('launch.strategy="ddp"',),  # what one device does anyway
    ],
)
def test_what_one_device_does_anyway_passes(full: Path, given: tuple[str, ...]) -> None:
    found = compiled(full, *given)
    assert found.plan is not None and not found.diagnostics
    assert found.plan.sharing.strategy == "ddp"


@pytest.mark.parametrize("given", [(), ('launch.strategy="auto"',), ('launch.strategy="ddp"',)])
def test_keys_of_zero_ask_for_its_strategy(full: Path, given: tuple[str, ...]) -> None:
    (fault,) = compiled(full, STAGE, *given).diagnostics
    assert (fault.code, fault.path) == ("no-effect", "launch.deepspeed.stage")
    assert 'strategy = "deepspeed"' in fault.help
