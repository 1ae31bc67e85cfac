"""Training of text encoders: which, how, and what does not go with it."""

from __future__ import annotations

from pathlib import Path

from attrs import evolve

from compiler import plan
from compiler.adapters import CLIP_TARGETS, LORAS, OF_THE_BASE
from compiler.diagnostics import choices
from compiler.draft import Draft
from compiler.families.card import FamilyCard
from compiler.optimizers import OPTIMIZERS
from compiler.passes.components import settle
from compiler.passes.start_family import other_family
from compiler.safetensors import header_of
from compiler.schema import TextEncodersRecipe
from compiler.spans import KeyPath
from compiler.units import Share

WHERE: KeyPath = ("train", "text_encoders")
CARRIED = LORAS  # kinds of adapter whose files have a place for encoders


def trains(draft: Draft, name: str) -> bool:
    """Whether text encoder `name` is trained."""
    return draft.text_training is not None and name in draft.text_training.encoders


def resolve_text_training(draft: Draft) -> None:
    """Fill in `draft.text_training`."""
    recipe = draft.recipe.train.text_encoders
    if draft.model is None:
        return
    if recipe is None:
        _judge_start(draft, ())
        return
    if not draft.model.family.trainable_encoders:
        draft.error(
            "not-in-family",
            WHERE,
            f"{draft.model.family.title}'s text encoder can't be trained here: it is no CLIP, but "
            "a language model that is about as large as what it speaks to",
            of="key",
        )
        return
    encoders = _which(draft, recipe)
    if draft.optimizer is None or draft.steps is None or draft.precision is None or not encoders:
        return
    draft.text_training = plan.TextTraining(
        encoders=encoders,
        adapter=_adapter(draft, recipe),
        lr=own_lr(draft, WHERE, recipe.lr, draft.optimizer),
        until=steps_until(draft, WHERE, recipe.until, draft.steps.total),
    )
    judge_companions(draft, WHERE)
    _judge_start(draft, encoders)
    for name in encoders:
        judge_component(draft, draft.precision, name)


def _which(draft: Draft, recipe: TextEncodersRecipe) -> tuple[str, ...]:
    assert draft.model is not None
    family, where = draft.model.family, (*WHERE, "which")
    if recipe.which == "all":
        draft.decide(where, family.trainable_encoders, by=f"family {family.name}")
        return family.trainable_encoders
    draft.decide(where, recipe.which)
    for number, name in enumerate(recipe.which):
        if name in family.trainable_encoders:
            continue
        what = family.components.get(name) if name in family.text_encoders else None
        draft.error(
            "not-in-family",
            (*where, number),
            f"{family.title}'s {name.replace('_', ' ')}, a {what}, is not trained here: it is too "
            "large, and learns little that the model does not"
            if what
            else f"{family.title} has no text encoder `{name}`",
            help=f"these can be trained: {choices(family.trainable_encoders)}",
        )
    return tuple(name for name in family.trainable_encoders if name in recipe.which)


def _adapter(draft: Draft, recipe: TextEncodersRecipe) -> plan.Adapter | None:
    """The model's adapter, in the encoders' size and on their layers."""
    own = draft.adapter
    if own is None:
        for key in ("rank", "targets"):
            if draft.given((*WHERE, key)):
                draft.error(
                    "no-effect",
                    (*WHERE, key),
                    f"`{key}` is of adapters, and without [adapter] all weights are trained",
                    of="key",
                )
        return None
    if own.kind not in CARRIED:
        draft.error(
            "conflict",
            WHERE,
            f"files of kind `{own.kind}` have no place for text encoders",
            help=f"take an adapter of kind {choices(CARRIED)}, or leave [train.text_encoders] out",
            of="key",
        )
        return None
    if own.init in OF_THE_BASE:
        draft.error(
            "conflict",
            ("adapter", "init"),
            f"`{own.init}` takes over weights of the base, which is not done to text encoders",
            help='take init = "gaussian", or leave [train.text_encoders] out',
        )
    rank = own.rank if recipe.rank == "auto" else recipe.rank
    draft.decide((*WHERE, "rank"), rank, by="decided", why="as [adapter] rank")
    draft.decide((*WHERE, "targets"), recipe.targets)
    if own.init == "orthogonal" and rank % 2:
        message = f"an orthogonal start halves the rank, which {rank} does not allow"
        draft.error("conflict", (*WHERE, "rank"), message, help=f"say {rank + 1}")
    if own.block_size and rank % own.block_size:
        message = f"a rank of {rank} can't be cut into blocks of {own.block_size}"
        help = f"say a multiple of {own.block_size}, or a smaller `block_size` in [adapter]"
        draft.error("conflict", (*WHERE, "rank"), message, help=help)
    share = rank / own.rank if own.scaling == "rank" else (rank / own.rank) ** 0.5
    return evolve(
        own,
        rank=rank,
        min_rank=0,  # an encoder is told of no noise
        alpha=own.alpha * share,
        targets=CLIP_TARGETS[recipe.targets],
        exclude=(),
        ranks=(),
        alphas=(),
    )


def _judge_start(draft: Draft, encoders: tuple[str, ...]) -> None:
    """The file to start from must hold adapters of the encoders that are trained, and no others."""
    assert draft.model is not None
    header = header_of(Path(draft.adapter.start)) if draft.adapter and draft.adapter.start else None
    if header is None or other_family(header, draft.model):
        return
    where: KeyPath = ("adapter", "from")
    ranks = {
        name: {shape[0] for key, shape in header.shapes.items() if _is_of(key, own) and shape}
        for name, own in _roots(draft.model.family).items()
    }
    for name, held in ranks.items():
        words = name.replace("_", " ")
        if held and name not in encoders:
            draft.error(
                "bad-adapter",
                where,
                f"it holds an adapter of the {words}, which is not trained here",
                help="add [train.text_encoders]",
            )
        elif name in encoders and not held:
            draft.error(
                "bad-adapter",
                where,
                f"it holds no adapter of the {words}, which would start fresh beside a model that "
                "does not",
                help=f"leave {name} out of [train.text_encoders]",
            )
        elif name in encoders and draft.text_training and draft.text_training.adapter:
            wanted = draft.text_training.adapter.rank
            if held != {wanted}:
                ranks_held = " and ".join(map(str, sorted(held)))
                draft.error(
                    "bad-adapter",
                    where,
                    f"its adapter of the {words} is of rank {ranks_held}, the recipe's is {wanted}",
                    help=f"rank = {max(held)} in [train.text_encoders]",
                )


def _roots(family: FamilyCard) -> dict[str, tuple[str, ...]]:
    """What a file's keys of each text encoder begin with: Diffusers' name, and sd-scripts'."""
    found: dict[str, tuple[str, ...]] = {name: (f"{name}.",) for name in family.text_encoders}
    for name, other in family.kohya_encoders.items():
        found[name] += (f"{other}_",)
    return found


def _is_of(key: str, roots: tuple[str, ...]) -> bool:
    return key.startswith(roots) and (".lora_A" in key or ".lora_down" in key)


def own_lr(draft: Draft, table: KeyPath, asked: float | str, optimizer: plan.Optimizer) -> float:
    """The learning rate of what `table` trains beside the model."""
    where = (*table, "lr")
    if asked == "auto":
        draft.decide(where, optimizer.lr, by="decided", why="as [train.optimizer] lr")
        return optimizer.lr
    draft.decide(where, asked)
    row = OPTIMIZERS[optimizer.name]
    if row.one_lr and asked != optimizer.lr:
        draft.error(
            "conflict",
            where,
            f"`{row.name}` has one learning rate for all weights: {row.one_lr}",
            help="leave `lr` out, or take another optimizer, such as adamw",
        )
    return float(asked)


def steps_until(draft: Draft, table: KeyPath, asked: Share, total: int) -> int:
    """The steps after which what `table` trains stays as it is."""
    where, steps = (*table, "until"), min(asked.of(total), total)
    draft.decide(where, f"{steps} steps")
    if asked.of(total) > total:
        draft.warn(
            "no-effect",
            where,
            f"the run has {total} steps, so `until` leaves off nothing",
            help="leave it out, or say fewer steps",
        )
    if steps == 0:
        draft.error(
            "out-of-range",
            where,
            f"{asked} of {total} steps is none: nothing of it would be trained",
            help=f"say more, or leave [{'.'.join(map(str, table))}] out",
        )
    return steps


def judge_companions(draft: Draft, table: KeyPath) -> None:
    """What can't be had together with it."""
    if draft.recipe.sprint is not None:
        name = ".".join(map(str, table))
        draft.error(
            "conflict",
            table,
            f"a student learns from its teacher's own embeddings: [{name}] does not go with "
            "[sprint]",
            help=f"leave [{name}] out",
            of="key",
        )


def judge_component(draft: Draft, precision: plan.Precision, name: str) -> None:
    """Configuration, number format and quantisation of an encoder that is trained."""
    assert draft.model is not None
    recipe, words = getattr(draft.recipe.model, name), name.replace("_", " ")
    whole = draft.adapter is None
    if draft.model.configs[name].get("use_attention_mask"):
        draft.error(
            "not-in-family",
            ("model", "base"),
            f"this base's {words} is told which tokens are padding (`use_attention_mask`), which "
            "is not done in training",
            help="leave its encoders as they are",
        )
    if recipe.quantize not in ("none", "auto"):
        draft.error(
            "conflict",
            ("model", name, "quantize"),
            f"the {words} is trained, which {recipe.quantize} weights of a CLIP are not made for",
            help="leave `quantize` out",
        )
    elif recipe.quantize == "auto":
        settle(draft, name, "none", why="it is trained")
    needed = precision.trained if whole else precision.compute
    if draft.formats.get(name) == needed:
        return
    where = ("model", name, "weights")
    if recipe.weights != "auto":
        draft.error(
            "precision-mismatch",
            where,
            f"the {words} is trained, and its weights must be {needed} as the arithmetic's"
            if not whole
            else f"all of the {words} is trained, in the format of `[precision] trained`",
            help="leave `weights` out",
        )
        return
    key = ".".join(where)
    draft.decisions = [made for made in draft.decisions if made.key != key]
    draft.formats[name] = needed
    why = "as [precision] trained" if whole else "as [precision] compute: it is trained"
    draft.decide(where, needed, by="decided", why=why)
