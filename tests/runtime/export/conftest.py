"""Runs that several tests export from, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiler.plan import Plan
from tests.runtime.export.runs import finished

Make = Callable[..., Plan]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Finished runs by family and what else `finished` takes. Not to be written into."""
    folder: Path = tmp_path_factory.mktemp("export")
    made: dict[str, Plan] = {}

    def run(family: str, *, full: bool = False, **settings: Any) -> Plan:
        key = repr((family, full, sorted(settings.items())))
        if key not in made:
            made[key] = finished(folder, family, full=full, **settings)
        return made[key]

    return run
