"""What PyTorch's allocator is told before it begins."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime import device, segments
from runtime.segments import BY_PAGES, map_by_pages, number_by_bus, setting

ROOT = Path(__file__).parents[2]


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")


def told(**environment: str) -> dict[str, str]:
    map_by_pages(environment)
    return environment


def test_pages_where_nothing_is_said(linux: None) -> None:
    assert told() == {"PYTORCH_ALLOC_CONF": BY_PAGES} and setting(told()) == BY_PAGES


@pytest.mark.parametrize("name", segments.VARIABLES)
def test_what_a_person_says_stays(linux: None, name: str) -> None:
    own = {name: "max_split_size_mb:512"}
    assert told(**own) == own and setting(own) == "max_split_size_mb:512"


@pytest.mark.parametrize(
    ("system", "release"),
    [("win32", "10"), ("darwin", "24.1"), ("linux", "5.15.153.1-microsoft-standard-WSL2")],
)
def test_not_where_drivers_fail(
    linux: None, monkeypatch: pytest.MonkeyPatch, system: str, release: str
) -> None:
    monkeypatch.setattr(segments, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr(platform, "release", lambda: release)
    assert told() == {}


def test_devices_are_numbered_as_the_driver_s_tool_does() -> None:
    environment: dict[str, str] = {}
    number_by_bus(environment)
    assert environment == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    own = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    number_by_bus(own)
    assert own == {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}


@pytest.mark.skipif(sys.platform != "linux", reason="where memory is mapped by pages")
def test_torch_hears_it() -> None:
    """The command line says it before torch is imported, and this torch knows the word."""
    code = (
        "import os, sys; from tuner.cli import run_command; run_command(['--version'])\n"
        "assert 'torch' not in sys.modules\n"
        "assert os.environ['CUDA_DEVICE_ORDER'] == 'PCI_BUS_ID'\n"
        "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    )
    names = {"PATH": "/usr/bin:/bin"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=names, capture_output=True, text=True
    )
    assert found.stdout.splitlines()[-1] == BY_PAGES, found.stderr


class TestClaimed:
    """The first tensor on a device whose driver may not map by pages."""

    @pytest.fixture
    def said(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        said: list[str] = []
        monkeypatch.setattr(device, "tell_allocator", said.append)
        monkeypatch.setattr(device, "setting", lambda: BY_PAGES)
        return said

    def _fails(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        coming = list(errors)

        def empty(*_: Any, **__: Any) -> None:
            if coming:
                raise coming.pop(0)

        monkeypatch.setattr(device, "torch", SimpleNamespace(empty=empty, cuda=torch.cuda))

    def test_falls_back(self, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._fails(monkeypatch, RuntimeError("CUDA driver error: operation not supported"))
        assert device.claimed(torch.device("cuda", 0)) == torch.device("cuda", 0)
        assert said == ["expandable_segments:False"]

    def test_not_when_memory_is_short(
        self, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._fails(monkeypatch, torch.OutOfMemoryError("CUDA out of memory."))
        with pytest.raises(torch.OutOfMemoryError):
            device.claimed(torch.device("cuda", 0))
        assert said == []

    def test_not_against_what_a_person_said(
        self, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(device, "setting", lambda: "backend:native")
        self._fails(monkeypatch, RuntimeError("CUDA driver error: operation not supported"))
        with pytest.raises(RuntimeError, match="driver"):
            device.claimed(torch.device("cuda", 0))
        assert said == []

    def test_the_processor_claims_nothing(self) -> None:
        assert device.claimed(torch.device("cpu")) == torch.device("cpu")
