"""Distillation into a model of few steps: its settings, and what does not go with it."""

from __future__ import annotations

from typing import Any

from attrs import evolve

from compiler import plan
from compiler.draft import Draft
from compiler.families import FAMILIES
from compiler.passes import ladder
from compiler.schema import SprintRecipe
from compiler.spans import KeyPath

WHERE: KeyPath = ("sprint",)
TEACHER_TIME = 1000.0  # what a Sana network takes for pure noise, times its `timestep_scale`
UNIT = 1e-3  # how far from 1 that may be and still be 1
HEADS = {20: (2, 8, 14, 19), 28: (2, 8, 14, 20, 27)}
"""Of the published depths: the reference script's, and its authors' own for the deeper one."""
_OF_DISCRIMINATOR = (
    "discriminator_mean",
    "discriminator_std",
    "discriminator_lr",
    "train_largest_timestep",
    "misaligned_pairs",
)
SHARES = (0.1, 0.4, 0.7)  # of any other depth, besides the last block


def resolve_sprint(draft: Draft) -> None:
    """Fill in `draft.sprint`, and the gradient's norm that distillation is clipped to."""
    recipe = draft.recipe.sprint
    if recipe is None or draft.model is None:
        return
    if not draft.model.family.few_step_pipeline:
        able = [card.title for card in FAMILIES.values() if card.few_step_pipeline]
        draft.error(
            "not-in-family",
            WHERE,
            f"{draft.model.family.title} can't be distilled by this method",
            help=f"it is made for {' and '.join(able)}: a linear-attention transformer",
            of="key",
        )
        return
    _refuse_companions(draft)
    if draft.optimizer is None or draft.steps is None:
        return
    lr = draft.optimizer.lr if recipe.discriminator_lr == "auto" else recipe.discriminator_lr
    draft.decide((*WHERE, "discriminator_lr"), lr, by="decided", why="as the student's")
    draft.sprint = plan.Sprint(
        teacher_time=_teacher_time(draft),
        sigma_data=float(recipe.sigma_data),
        guidance=tuple(float(scale) for scale in recipe.guidance),
        guidance_embeds_scale=float(recipe.guidance_embeds_scale),
        mean=float(recipe.mean),
        std=float(recipe.std),
        discriminator_mean=float(recipe.discriminator_mean),
        discriminator_std=float(recipe.discriminator_std),
        tangent_warmup=recipe.tangent_warmup,
        consistency_weight=float(recipe.consistency_weight),
        adversarial_weight=float(recipe.adversarial_weight),
        heads=_heads(draft, recipe),
        largest_angle=float(recipe.largest_timestep),
        largest_share=float(recipe.largest_timestep_prob) if recipe.train_largest_timestep else 0.0,
        misaligned_pairs=recipe.misaligned_pairs,
        discriminator=evolve(draft.optimizer, lr=float(lr)),
    )
    _judge(draft, recipe)


def _teacher_time(draft: Draft) -> float:
    """What the base takes for the end of the flow."""
    assert draft.model is not None
    scale = draft.model.configs["transformer"].get("timestep_scale", 1.0)
    stated = isinstance(scale, int | float) and not isinstance(scale, bool) and scale > 0
    found = TEACHER_TIME * float(scale) if stated else TEACHER_TIME
    if abs(found - 1.0) < UNIT:
        return 1.0
    draft.warn(
        "fitted-times",
        ("model", "base"),
        f"this base takes times up to {found:g}; a few-step model takes them up to 1, so the "
        "student's embedding of times is fitted to the base's, which loses a little",
        help="distil a base that was trained on times up to 1, as the published Sprint teachers "
        "are, where there is one",
    )
    return found


def _heads(draft: Draft, recipe: SprintRecipe) -> tuple[int, ...]:
    where, depth = (*WHERE, "heads"), ladder.depth(draft)
    if recipe.adversarial_weight == 0:
        if draft.given(where) and recipe.heads != "auto":
            draft.error(
                "no-effect",
                where,
                "`heads` has no effect: with adversarial_weight = 0 there is no discriminator",
                of="key",
            )
        draft.decide(where, "none", by="decided", why="there is no discriminator")
        return ()
    if recipe.heads == "auto":
        own = (*(round(share * depth) for share in SHARES), depth - 1)
        found = HEADS.get(depth) or tuple(sorted(set(own)))
        draft.decide(where, found, by="decided", why=f"for {depth} blocks")
        return found
    draft.decide(where, recipe.heads)
    for number, block in enumerate(recipe.heads):
        if block >= depth:
            draft.error(
                "out-of-range",
                (*where, number),
                f"the base has no block {block}: its {depth} blocks are 0 to {depth - 1}",
                label=f"must be below {depth}",
            )
    if len(set(recipe.heads)) < len(recipe.heads):
        draft.error("duplicate-id", where, "a block is given twice")
    return recipe.heads


def _judge(draft: Draft, recipe: SprintRecipe) -> None:
    """Settings without effect."""
    assert draft.optimizer is not None
    for key in ("largest_timestep", "largest_timestep_prob"):
        if draft.given((*WHERE, key)) and not recipe.train_largest_timestep:
            draft.error(
                "no-effect",
                (*WHERE, key),
                f"`{key}` has no effect without `train_largest_timestep = true`",
                of="key",
            )
    if recipe.consistency_weight == 0 and recipe.adversarial_weight == 0:
        draft.error(
            "conflict",
            (*WHERE, "adversarial_weight"),
            "nothing is learned: both `consistency_weight` and `adversarial_weight` are 0",
            help="adversarial_weight = 0.5",
        )
    for key in _OF_DISCRIMINATOR if recipe.adversarial_weight == 0 else ():
        if draft.given((*WHERE, key)):
            draft.error(
                "no-effect",
                (*WHERE, key),
                f"`{key}` has no effect: with adversarial_weight = 0 there is no discriminator",
                of="key",
            )
    total = draft.steps.total if draft.steps is not None else 0
    if draft.given((*WHERE, "tangent_warmup")) and recipe.tangent_warmup > total:
        draft.warn(
            "long-warmup",
            (*WHERE, "tangent_warmup"),
            f"the part that rests on the derivative never counts in full: the run has {total} "
            "steps",
            help=f"tangent_warmup = {total // 10}",
        )
    alone = max((bucket.batch_size for bucket in draft.buckets), default=1) == 1
    if recipe.misaligned_pairs and alone:
        draft.warn(
            "no-effect",
            (*WHERE, "misaligned_pairs"),
            "in batches of one picture there is no other prompt to pair it with: it has no effect",
            help="batch_size = 2 or more",
        )


def _refuse_companions(draft: Draft) -> None:
    """What can't be had together with a distillation."""
    recipe = draft.recipe

    def conflict(path: KeyPath, what: str, help: str = "leave it out") -> None:
        draft.error("conflict", path, f"{what}: it does not go with [sprint]", help=help)

    assert draft.model is not None
    trained = draft.model.configs[draft.model.family.trained_component]
    if trained.get("guidance_embeds"):
        conflict(
            ("model", "base"), "this base is told its guidance", "take the teacher, undistilled"
        )
    if recipe.adapter is not None:
        conflict(("adapter",), "all of the student is trained, without an adapter")
    if draft.trained.init == "random":
        conflict(("model", "transformer", "init"), "a teacher must have learned something")
    if draft.precision is not None and draft.precision.compute == "float16":
        conflict(("precision", "compute"), "tangents overflow in fp16", 'compute = "bf16"')
    if draft.speed.compile != "off":
        conflict(("speed", "compile"), "compiled blocks have no forward derivative")
    if draft.speed.fused_projections:
        conflict(("speed", "fused_projections"), "fused projections have no forward derivative")
    if not draft.speed.attention.startswith("native"):
        conflict(("speed", "attention"), "this kernel has no forward derivative")
    if recipe.memory.micro_batch != "auto":
        what = "the discriminator's norms are taken over a batch, so it can't be cut smaller"
        conflict(("memory", "micro_batch"), what, "lower `batch_size`")
    if ladder.offload_of(draft).activations is True:
        conflict(("memory", "offload", "activations"), "three networks take turns in one pass")
    if draft.steps is not None and draft.steps.ranks > 1:
        conflict(("launch", "devices"), "it trains on one device", "devices = 1")
    for number, source in enumerate(draft.sources):
        where = ("data", "source", number)
        if source.mask is not None:
            conflict((*where, "mask"), "a discriminator judges whole pictures")
        if source.target == "base":
            conflict((*where, "regularisation", "target"), "a student has no adapter to switch off")
        if source.held_out:
            conflict((*where, "holdout"), "a student has no loss of one denoising pass to measure")
    for table in ("timesteps", "loss"):
        _unused(draft, table)


def _unused(draft: Draft, table: str) -> None:
    """Keys of the ordinary objective, which a distillation has none of."""
    stated: Any = draft.located.data.get("train", {})
    inside = stated.get(table, {}) if isinstance(stated, dict) else {}
    keys = list(inside) if isinstance(inside, dict) else []
    if keys:
        listed = ", ".join(f"`{key}`" for key in keys)
        draft.error(
            "no-effect",
            ("train", table, keys[0]),
            f"{listed} in [train.{table}] ha{'s' if len(keys) == 1 else 've'} no effect: [sprint] "
            "has its own loss and its own noise levels",
            help="see `mean` and `std` in [sprint]" if table == "timesteps" else "leave it out",
            of="key",
        )
