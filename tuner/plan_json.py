"""A plan as one JSON object, for programs. Fields may be added, never renamed.

`docs/plan.schema.json` describes it; a test holds real output against that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import fields_dict

from compiler.costs import Disk, Outlook
from compiler.diagnostics import Diagnostic, to_json
from compiler.occasions import checkpoint_steps, evaluation_steps, validation_steps
from compiler.plan import Objective, Plan, Text, plain
from compiler.schedules import multiplier
from compiler.secrets import shown_address
from compiler.site import Counted, Present
from tuner.plan_memory import peak
from tuner.plan_view import result_folder, whole_parameters

FORMAT_VERSION = 1
LISTED = 1000  # steps of checkpoints and of validation, at most
POINTS = 33  # of the learning rate's curve, at most


def json_object(
    plan: Plan | None,
    diagnostics: Sequence[Diagnostic],
    outlook: Outlook | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `tuner plan --json` prints; without a plan, only why there is none. `texts` are those
    that the diagnostics point into, by file name."""
    told = [to_json(fault, texts or {}) for fault in diagnostics]
    found: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "valid": plan is not None,
        "diagnostics": told,
        "warnings": [fault for fault in told if fault["severity"] == "warning"],
    }
    return found if plan is None else found | _plan(plan) | _costs(plan, outlook)


def _published(rules: dict[str, Any] | None) -> dict[str, Any] | None:
    """`[publish]` without the webhook's address, which is a secret."""
    return None if rules is None else {**rules, "webhook": shown_address(rules["webhook"])}


def _plan(plan: Plan) -> dict[str, Any]:
    tree = plain(plan)
    taken = (
        "name seed run_folder cache_folder device adapter embeddings precision speed text sources "
        "buckets sharing optimizer objective sprint max_grad_norm ema guard decisions track "
        "track_project vae_batch"
    )
    return {
        "digest": plan.digest,
        **{key: tree.get(key) for key in taken.split()},
        "publish": _published(tree.get("publish")),
        "model": tree["model"]
        | {
            "parameters": _parameters(plan),
            "components": [{"file": None} | part for part in tree["model"]["components"]],
        },
        "text": dict.fromkeys(fields_dict(Text)) | tree["text"],
        "text_training": tree.get("text_training") and {"adapter": None} | tree["text_training"],
        "objective": dict.fromkeys(fields_dict(Objective)) | tree["objective"],
        "sources": [{"mask": None} | source for source in tree["sources"]],
        "steps": tree["steps"],
        "schedule": tree["schedule"] | {"points": schedule_points(plan)},
        "checkpoints": tree["checkpoints"] | _times(checkpoint_steps(plan)),
        "validation": _validation(plan, tree),
        "evaluation": _evaluation(plan, tree),
        "memory": _memory(plan),
        "result": result_folder(plan),
    }


def _validation(plan: Plan, tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"picture": None, "weights": None} | tree["validation"]
    return found | _times(validation_steps(plan))


def _evaluation(plan: Plan, tree: dict[str, Any]) -> dict[str, Any] | None:
    found = tree.get("evaluation")
    return None if found is None else found | _times(evaluation_steps(plan))


def _times(steps: Sequence[int]) -> dict[str, Any]:
    """After which steps, the first of them; and how often in all."""
    return {"at": list(steps[:LISTED]), "times": len(steps)}


def _parameters(plan: Plan) -> dict[str, Any]:
    """Of what is trained or adapted, with adapters: all, and those that the optimizer updates."""
    counts = plan.memory.counts
    if not counts:
        return {"total": None, "trainable": None}
    return {"total": whole_parameters(plan), "trainable": counts["trainable"]}


def schedule_points(plan: Plan) -> list[dict[str, Any]]:
    """The learning rate of some steps, the first and the last among them."""
    total = plan.steps.total
    count = min(POINTS, total)
    steps = sorted({round(n * (total - 1) / max(count - 1, 1)) for n in range(count)})
    return [
        {"step": step + 1, "lr": plan.optimizer.lr * multiplier(plan.schedule, step)}
        for step in steps
    ]


def _memory(plan: Plan) -> dict[str, Any]:
    top = peak(plan)
    return {
        "budget_bytes": plan.memory.budget_bytes,
        "peak_bytes": top.device_bytes if top else None,
        "peak_phase": top.name if top else None,
        "activation_checkpointing": plan.memory.layout.activation_checkpointing,
        "layout": plain(plan.memory.layout),
        "on_oom": plan.memory.on_oom,
        "ladder": [plain(rung) for rung in plan.memory.ladder],
        "phases": [plain(phase) for phase in plan.memory.phases],
        "counts": dict(plan.memory.counts),
        "overhead": plan.memory.overhead,
    }


def _costs(plan: Plan, outlook: Outlook | None) -> dict[str, Any]:
    """What depends on this machine; null where nobody looked."""
    present = outlook.present if outlook else None
    return {
        "skipped": [plain(row) for row in outlook.skipped] if outlook else [],
        "hidden": [plain(row) for row in outlook.hidden] if outlook else [],
        "disk": _disk(outlook.disk) if outlook else None,
        "duration": _duration(outlook) if outlook else None,
        "cached": _cached(present) if present else None,
        "resume": _resume(plan, present),
    }


def _disk(disk: Disk) -> dict[str, Any]:
    return {
        "cache_bytes": disk.cache_bytes,
        "checkpoint_bytes": disk.checkpoint_bytes,
        "result_bytes": disk.result_bytes,
        "free_bytes": disk.free_bytes,
        "cache_free_bytes": disk.cache_free_bytes,
        "latents_bytes": disk.latents_bytes,
        "texts_bytes": disk.texts_bytes,
        "pictures_bytes": disk.pictures_bytes,
        "one_checkpoint_bytes": disk.one_checkpoint_bytes,
        "checkpoints": disk.checkpoints,
    }


def _duration(outlook: Outlook) -> dict[str, Any]:
    found = outlook.duration
    if found is None:
        nothing = dict.fromkeys(("total_seconds", "left_seconds", "basis"))
        return {**nothing, "why": outlook.unknown}
    whole = found.train_seconds + found.validate_seconds
    return {"total_seconds": whole, "left_seconds": outlook.left_seconds} | plain(found)


def _cached(present: Present) -> dict[str, Any]:
    return {"texts": _counted(present.texts), "latents": _counted(present.latents)}


def _counted(found: Counted) -> dict[str, int]:
    return {
        "total": found.total,
        "cached": found.cached,
        "missing": found.missing,
        "unknown": found.unknown,
    }


def _resume(plan: Plan, present: Present | None) -> dict[str, Any] | None:
    found = present.resume if present else None
    if found is None:
        return None
    return {
        "step": found.step,
        "of": plan.steps.total,
        "finished": found.finished,
        "differs": [{"key": key, "old": old, "new": new} for key, old, new in found.changes],
        "problem": found.problem,
    }
