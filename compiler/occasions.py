"""After which steps of a plan something happens."""

from __future__ import annotations

from compiler.plan import Plan


def validation_steps(plan: Plan) -> list[int]:
    """Steps after which pictures are drawn; 0 is the untrained model."""
    if not plan.validation.prompts:
        return []
    start = [0] if plan.validation.at_start else []
    return start + _due(plan.validation.every, plan.steps.total)


def checkpoint_steps(plan: Plan) -> list[int]:
    """Steps after which a checkpoint is written; the last step always is one."""
    return _due(plan.checkpoints.every, plan.steps.total)


def _due(every: int, total: int) -> list[int]:
    regular = list(range(every, total + 1, every)) if every else []
    return regular if regular and regular[-1] == total else [*regular, total]
