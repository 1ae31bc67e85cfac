"""Whether each weight can be updated in the backward pass, as soon as its gradient is complete."""

from __future__ import annotations

from compiler.draft import Draft
from compiler.optimizers import OPTIMIZERS
from compiler.spans import KeyPath

WHERE: KeyPath = ("memory", "fused_backward")


def fused_backward_possible(draft: Draft) -> str | None:
    """Why the draft's weights can't be updated in the backward pass; None if they can.

    Looks at the draft's optimizer, so that it may be asked again after another was chosen.
    """
    train, memory = draft.recipe.train, draft.recipe.memory
    if draft.recipe.sprint is not None:
        return "a student's and a discriminator's updates take turns"
    if train.max_grad_norm > 0:
        return (
            "`max_grad_norm` clips by the norm of all gradients together, "
            "which are never there at once"
        )
    if train.accumulate > 1:
        return "`accumulate` adds up the gradients of several batches before the update"
    asked = memory.micro_batch
    in_parts = draft.steps is not None and draft.steps.micro_batch > 0
    largest = max((bucket.batch_size for bucket in draft.buckets), default=1)
    if in_parts or (asked != "auto" and asked < largest):
        return "`micro_batch` adds up the gradients of a batch's parts before the update"
    if draft.precision is not None and draft.precision.compute == "float16":
        return "in float16 an update may be left out, which all gradients together decide"
    if draft.speed.compile != "off":
        return "a compiled block hands over all its gradients at once"
    if draft.steps is not None and draft.steps.ranks > 1:
        return "gradients are averaged over the devices before the update"
    return _optimizer_reason(draft)


def refuse_fused_backward(draft: Draft) -> None:
    """An error if the recipe demands what can't be."""
    if draft.recipe.memory.fused_backward is not True:
        return
    reason = fused_backward_possible(draft)
    if reason is not None:
        draft.error(
            "fused-backward",
            WHERE,
            f"weights can't be updated in the backward pass: {reason}",
            help=_advice(draft),
        )


def _optimizer_reason(draft: Draft) -> str | None:
    if draft.optimizer is None:
        return None
    row = OPTIMIZERS[draft.optimizer.name]
    if row.not_in_backward:
        return f"`{row.name}` can't be taken apart: {row.not_in_backward}"
    if row.bf16 == "stochastic" and draft.precision and draft.precision.trained == "bfloat16":
        return f"`{row.name}` would draw its random roundings in another order"
    return None


def _advice(draft: Draft) -> str:
    train = draft.recipe.train
    if train.max_grad_norm > 0 and draft.recipe.sprint is None:
        also = " and accumulate = 1" if train.accumulate > 1 else ""
        return f"max_grad_norm = 0{also} in [train], or leave `fused_backward` out"
    if train.accumulate > 1:
        return "accumulate = 1 in [train], or leave `fused_backward` out"
    return "leave `fused_backward` out"
