"""A plan as one JSON object, for programs. Fields may be added, never renamed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compiler.diagnostics import Diagnostic, to_json
from compiler.plan import Dtype, Plan, plain
from tuner.plan_view import checkpoint_steps, peak, result_folder, validation_steps

FORMAT_VERSION = 1
BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


def json_object(plan: Plan | None, diagnostics: Sequence[Diagnostic]) -> dict[str, Any]:
    """What `tuner plan --json` prints; without a plan, only why there is none."""
    found: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "valid": plan is not None,
        "diagnostics": [to_json(fault) for fault in diagnostics],
        "warnings": [to_json(fault) for fault in diagnostics if fault.severity == "warning"],
    }
    return found if plan is None else found | _plan(plan)


def _plan(plan: Plan) -> dict[str, Any]:
    tree = plain(plan)
    taken = (
        "name seed run_folder cache_folder device model adapter precision text sources buckets "
        "optimizer schedule objective max_grad_norm ema decisions track"
    )
    return {
        "digest": plan.digest,
        **{key: tree.get(key) for key in taken.split()},
        "steps": tree["steps"],
        "checkpoints": tree["checkpoints"] | {"at": checkpoint_steps(plan)},
        "validation": tree["validation"] | {"at": validation_steps(plan)},
        "memory": _memory(plan),
        "disk": _disk(plan),
        "result": result_folder(plan),
    }


def _memory(plan: Plan) -> dict[str, Any]:
    top = peak(plan)
    return {
        "budget_bytes": plan.memory.budget_bytes,
        "peak_bytes": top.device_bytes if top else None,
        "peak_phase": top.name if top else None,
        "activation_checkpointing": plan.memory.activation_checkpointing,
        "phases": [plain(phase) for phase in plan.memory.phases],
        "counts": dict(plan.memory.counts),
    }


def _disk(plan: Plan) -> dict[str, int]:
    """What is known of disk space: what is free, and the size of the result's weights."""
    found = {"free_bytes": shutil.disk_usage(_existing(Path(plan.run_folder))).free}
    trainable = plan.memory.counts.get("trainable", 0)
    if trainable:
        found["result_bytes"] = trainable * BYTES[plan.precision.trained]
    return found


def _existing(folder: Path) -> Path:
    """The nearest folder that is there already."""
    return next(path for path in (folder, *folder.parents) if path.exists())
