"""The optimizer: its name, its arguments, and whether it can do what the recipe asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from compiler import plan
from compiler.diagnostics import choices, nearest
from compiler.draft import Draft
from compiler.machine import COMPILER, TRITON
from compiler.optimizers import DEFAULT, OPTIMIZERS, OptimizerFacts, called_here
from compiler.source import dotted
from compiler.spans import KeyPath

WHERE: KeyPath = ("train", "optimizer")
NAME: KeyPath = (*WHERE, "name")
LR: KeyPath = (*WHERE, "lr")
DEFAULT_WHY = "the reference scripts' own"
LEAST_LR = 1e-10  # a weight of 0.01 in float32 is a multiple of 1e-9
WARNINGS = ("unusual-lr", "missing-package")


def optimizer_name(draft: Draft) -> str:
    """The name that the recipe gives, `DEFAULT` for "auto"; "" with an error if it is unknown."""
    asked = draft.recipe.train.optimizer.name
    if asked == "auto":
        return DEFAULT
    if asked in OPTIMIZERS:
        return asked
    here = called_here(asked, OPTIMIZERS)
    guess = here or nearest(asked, OPTIMIZERS)
    advice = f"it is called `{guess}` here" if here else f"did you mean `{guess}`?"
    draft.error(
        "unknown-value",
        NAME,
        f"unknown optimizer `{asked}`",
        help=advice if guess else f"known: {choices(tuple(OPTIMIZERS))}",
    )
    return ""


def resolve_optimizer(draft: Draft, name: str, why: str = DEFAULT_WHY) -> plan.Optimizer:
    """The plan's optimizer for a name of the table, with the recipe's arguments.

    Adds decisions, and diagnostics for what it can't take and can't do. May be called again for
    another name, where the recipe leaves it open: what was said of the first one is taken back.
    `planned` and `suits` tell of a name without a word.
    """
    row = OPTIMIZERS[name]
    _take_back(draft)
    draft.decide(NAME, name, by="decided", why=why)
    made = planned(draft, name)
    for key, value in made.arguments.items():
        draft.decide((*WHERE, key), value, by=f"optimizer {name}")
    for key, value in given_arguments(draft).items():
        _judge_argument(draft, row, key, value)
    draft.decide(LR, made.lr)
    _judge_lr(draft, row, made.lr)
    _judge_place(draft, row)
    return made


def _take_back(draft: Draft) -> None:
    prefix = dotted(WHERE) + "."
    draft.decisions[:] = [d for d in draft.decisions if not d.key.startswith(prefix)]
    draft.diagnostics[:] = [
        d for d in draft.diagnostics if d.code not in WARNINGS or not d.path.startswith(prefix)
    ]


def suits(draft: Draft, name: str) -> bool:
    """Whether another optimizer could take the place of the draft's without a complaint."""
    row = OPTIMIZERS[name]
    return (
        draft.device in row.devices
        and (draft.precision is None or draft.precision.trained in row.weights)
        and given_arguments(draft).keys() <= set(row.arguments)
        and not _lacking(draft, row)
    )


def planned(draft: Draft, name: str) -> plan.Optimizer:
    """As `resolve_optimizer`, but says and records nothing."""
    row = OPTIMIZERS[name]
    arguments: dict[str, Any] = dict(row.defaults)
    arguments |= {k: v for k, v in given_arguments(draft).items() if k in row.arguments}
    return plan.Optimizer(
        name=name,
        lr=float(draft.recipe.train.optimizer.lr),
        arguments={k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()},
        # One kernel for the whole update where an accelerator has it. The processor's own rounds
        # otherwise than the reference scripts and gains nothing there.
        fused=draft.device in row.fused and draft.device != "cpu",
    )


def given_arguments(draft: Draft) -> Mapping[str, Any]:
    """The keys of `[train.optimizer]` that the recipe states, besides `name` and `lr`."""
    values = attrs.asdict(draft.recipe.train.optimizer, recurse=False)
    return {k: v for k, v in values.items() if k not in ("name", "lr") and v is not None}


def averages(draft: Draft) -> bool:
    """Whether the draft's optimizer is a schedule-free one."""
    return draft.optimizer is not None and OPTIMIZERS[draft.optimizer.name].averages


def _judge_argument(draft: Draft, row: OptimizerFacts, key: str, value: Any) -> None:
    where: KeyPath = (*WHERE, key)
    if key not in row.arguments:
        draft.error(
            "no-effect",
            where,
            f"optimizer `{row.name}` takes no `{key}`",
            help=f"it takes {choices(row.arguments)}",
            of="key",
        )
        return
    own = row.defaults.get(key)
    if isinstance(own, tuple) and len(own) != len(value):
        draft.error(
            "out-of-range",
            where,
            f"`{row.name}` has {len(own)} {key}, not {len(value)}",
            help=f"{key} = {list(own)} are its own",
        )
        return
    if key == "nesterov" and value and planned(draft, row.name).arguments.get("momentum") == 0:
        draft.error(
            "conflict",
            where,
            "Nesterov's momentum looks ahead by the momentum, and `momentum` is 0",
            help="momentum = 0.9, or nesterov = false",
        )
    least, most = row.least.get(key), row.most.get(key)
    low = min(value) if isinstance(value, tuple) else value
    if (least is not None and low < least) or (most is not None and value > most):
        bound = f"must be at least {least:g}" if least is not None else f"must be <= {most:g}"
        draft.error("out-of-range", where, f"{low:g} is out of range for `{row.name}`", label=bound)


def _judge_lr(draft: Draft, row: OptimizerFacts, lr: float) -> None:
    low, high = row.usual_lr
    if max(low, LEAST_LR) <= lr <= high:
        return
    if low == 0 and lr < LEAST_LR:
        message = f"a learning rate of {lr:g} is below what changes float32 weights"
        advice = "1e-4 is where most begin"
    elif lr < low:
        message = f"`{row.name}` finds its own step size: `lr` only multiplies it, and is about 1"
        advice = "lr = 1.0"
    else:
        message = f"a learning rate of {lr:g} is beyond what `{row.name}` is used with"
        advice = "lr = 1.0" if low > 0 else f"at most {high:g}; 1e-4 is where most begin"
    draft.warn("unusual-lr", LR, message, help=advice)


def _judge_place(draft: Draft, row: OptimizerFacts) -> None:
    """Device, number format and package."""
    if draft.device not in row.devices:
        others = tuple(n for n, r in OPTIMIZERS.items() if draft.device in r.devices)
        near = nearest(row.name.removeprefix("bnb-"), others)
        draft.error(
            "optimizer-device",
            NAME,
            f"optimizer `{row.name}` does not run on {draft.device}",
            label=f"runs on {choices(row.devices)}",
            help=f'name = "{near}" does' if near else "",
        )
    trained = draft.precision.trained if draft.precision else row.weights[0]
    if trained not in row.weights and trained != "float16":  # which is refused for all alike
        draft.error(
            "optimizer-precision",
            NAME,
            f"optimizer `{row.name}` trains {choices(row.weights)} weights, not {trained} ones",
            help='say [precision] trained = "bf16", or name = "adamw"',
        )
    for message, advice in _lacking(draft, row):
        draft.warn("missing-package", NAME, message, help=advice)


def _lacking(draft: Draft, row: OptimizerFacts) -> list[tuple[str, str]]:
    """What this machine lacks for an optimizer, and how to get it."""
    missing, found = draft.machine.missing, []
    if row.package in missing:
        message = f"optimizer `{row.name}` needs the package {row.package}, which is not installed"
        found.append((f"{message} here", f"pip install {row.package}"))
    if row.compiled and draft.device == "cuda" == draft.machine.device and TRITON in missing:
        message = f"optimizer `{row.name}` compiles its step, which needs the package {TRITON}"
        found.append((f"{message}; it is not installed here", f"pip install {TRITON}"))
    elif row.compiled and COMPILER in missing:
        message = f"optimizer `{row.name}` compiles its step, and there is no C++ compiler here"
        found.append((message, "install g++ or clang, or set CXX to its path"))
    return found
