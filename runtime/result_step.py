"""Which step's weights a run's result holds. Imports no torch.

result.json         {"step": 400}, written before the result itself
"""

from __future__ import annotations

import json
from pathlib import Path

from compiler.plan import Plan
from runtime import files

RESULT = "result.json"


def note(run_folder: Path, step: int) -> None:
    """Write down that the result is that of `step`. Raises OSError."""
    files.write_whole(run_folder / RESULT, json.dumps({"step": step}) + "\n")


def result_step(run_folder: Path, plan: Plan) -> int:
    """Updates behind the result of the run in `run_folder`: all that the plan makes, but where
    the best checkpoint is the result."""
    try:
        return int(json.loads((run_folder / RESULT).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return plan.steps.total
