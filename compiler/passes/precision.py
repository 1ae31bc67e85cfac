"""Number formats, the device they are chosen for, and its threads."""

from __future__ import annotations

from compiler.draft import Draft
from compiler.families import FAMILIES
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Dtype, Precision
from compiler.spans import KeyPath

SMALL_MODEL = 20_000_000  # parameters; below, one thread was up to ten times faster than two
FORMATS: dict[str, Dtype] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def resolve_precision(draft: Draft) -> None:
    """Fill in `draft.device` and `draft.precision`."""
    asked = draft.recipe.launch.device
    draft.device = draft.machine.device if asked == "auto" else asked
    draft.decide(
        ("launch", "device"), draft.device, by="this machine", why=draft.machine.device_name
    )
    draft.threads = _threads(draft)
    compute = _compute(draft)
    recipe = draft.recipe.precision
    weights = compute if recipe.weights == "auto" else FORMATS[recipe.weights]
    trained: Dtype = "float32" if recipe.trained == "auto" else FORMATS[recipe.trained]
    cached = draft.recipe.cache.precision
    cache = compute if cached == "auto" else FORMATS[cached]
    draft.decide(("precision", "weights"), weights, by="decided", why="as compute")
    why = "bf16 steps lose small updates (10.7 % of entries change where 100 % do in fp32)"
    draft.decide(("precision", "trained"), trained, by="decided", why=why)
    draft.decide(("cache", "precision"), cache, by="decided", why="as compute")
    draft.precision = Precision(compute=compute, weights=weights, trained=trained, cache=cache)
    _conflicts(draft, draft.precision)


def _threads(draft: Draft) -> int:
    where = ("launch", "threads")
    asked = draft.recipe.launch.threads
    if asked != "auto":
        draft.decide(where, asked)
        return asked
    facts = draft.model
    size = facts.parameters.get(facts.family.trained_component, 0) if facts else 0
    if draft.device == "cpu" and 0 < size < SMALL_MODEL:
        draft.decide(where, 1, by="decided", why="threads of a small model wait for each other")
        return 1
    count = max(1, draft.machine.cores)
    draft.decide(where, count, by="this machine", why=f"{draft.machine.cores} cores")
    return count


def _compute(draft: Draft) -> Dtype:
    where = ("precision", "compute")
    asked = draft.recipe.precision.compute
    if asked != "auto":
        draft.decide(where, FORMATS[asked])
        return FORMATS[asked]
    elsewhere = draft.device != draft.machine.device  # planned for a device that is not here
    if draft.device == "cpu":
        value: Dtype = "float32"
        why = "processors are quickest and most exact in float32"
    elif elsewhere or draft.machine.bf16 or draft.device == "mps":
        value, why = "bfloat16", f"{draft.device} multiplies bfloat16 natively"
    else:
        value, why = "float32", f"{draft.machine.device_name} has no bfloat16"
    draft.decide(where, value, by="decided", why=why)
    return value


def refuse_half(draft: Draft, title: str, path: KeyPath) -> None:
    """An error: a family called `title` that overflows is to be trained in float16."""
    draft.error(
        "fp16-overflow",
        path,
        f"{title} can't be trained in fp16: activations exceed what fp16 holds (65504)",
        help='say "bf16", or "fp32" where the device has no bf16',
    )


def _conflicts(draft: Draft, precision: Precision) -> None:
    family = FAMILIES.get(draft.recipe.model.family)  # the base itself may be missing
    halves = [key for key in ("compute", "weights") if getattr(precision, key) == "float16"]
    for key in halves[:1]:
        if family is not None and family.fp16_overflows:
            refuse_half(draft, family.title, ("precision", key))
    if family is not None and family.fp16_overflows and draft.recipe.cache.precision == "fp16":
        draft.warn(
            "fp16-cache",
            ("cache", "precision"),
            f"what {family.title}'s encoders make may exceed what fp16 holds (65504): a run ends "
            "where it does",
            help='say "bf16", which takes as much room, or "fp32"',
        )
    if precision.trained == "float16":
        draft.error(
            "fp16-trained",
            ("precision", "trained"),
            "fp16 weights can't be trained: updates and gradients underflow",
            help='say "fp32" (the default) or "bf16"',
        )
    row = OPTIMIZERS.get(draft.recipe.train.optimizer.name)
    if precision.trained == "bfloat16" and (row is None or row.bf16 == "rounds"):
        draft.warn(
            "bf16-trained",
            ("precision", "trained"),
            "plain bf16 weights lose small updates: at a low rate most entries never change",
            help='leave it out for masters in fp32, or take optimizer "adamw-bf16", which rounds '
            "stochastically",
        )
