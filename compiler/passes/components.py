"""The components of the base: number format, quantisation, and what of their tables makes sense."""

from __future__ import annotations

import json

from attrs import evolve

from compiler import plan
from compiler.diagnostics import choices
from compiler.draft import Draft, ModelFacts
from compiler.noise import sampled_so
from compiler.passes.precision import FORMATS, refuse_half
from compiler.passes.weights_file import resolve_file
from compiler.quantisers import QUANTISERS
from compiler.schema import ComponentRecipe
from compiler.spans import KeyPath

TABLES = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
"""Keys of `[model]` that are components, by their names in the family."""


def resolve_components(draft: Draft) -> None:
    """Fill in `draft.formats`, `draft.quantize` and `draft.quantize_on`."""
    if draft.model is None or draft.precision is None:
        return
    for name in TABLES:
        if name not in draft.model.family.components:
            _refuse_stranger(draft, draft.model, name)
            continue
        recipe: ComponentRecipe = getattr(draft.recipe.model, name)
        draft.formats[name] = _format(draft, draft.model, name, recipe)
        asked = recipe.quantize
        kind: plan.Quantisation = "none" if asked == "auto" else asked
        draft.quantize_on[name] = recipe.where
        _tiling(draft, name, recipe)
        settle(draft, name, kind, why="kept whole" if asked == "auto" else "")
        _init(draft, draft.model, name, recipe)
        resolve_file(draft, draft.model, name, recipe)
        _quantisation(draft, draft.model, name, kind)
        if asked == "none" and draft.given(_at(name, "where")):
            draft.error(
                "no-effect",
                _at(name, "where"),
                f"the {_words(name)} is not quantised, so `where` has no effect",
                help='say `quantize = "int8"`, or leave `where` out',
            )
    _transformer_format(draft, draft.model)


def _tiling(draft: Draft, name: str, recipe: ComponentRecipe) -> None:
    path = _at(name, "tiling")
    draft.decide(path, recipe.tiling)
    if recipe.tiling and name != "vae":
        draft.error(
            "no-effect",
            path,
            f"the {_words(name)} sees no pictures: only the vae can work in tiles",
            help="say it in [model.vae]",
        )


def settle(draft: Draft, name: str, kind: plan.Quantisation, *, why: str = "") -> None:
    """Quantise component `name` as `kind`; a later choice takes the place of an earlier one."""
    path = _at(name, "quantize")
    key = ".".join(map(str, path))
    draft.decisions = [made for made in draft.decisions if made.key != key]
    draft.quantize[name] = kind
    draft.decide(path, kind, by="decided" if why else "default", why=why)


def model_plan(draft: Draft) -> plan.Model:
    """The model as the plan states it."""
    assert draft.model is not None and draft.precision is not None
    facts, family, configs = draft.model, draft.model.family, dict(draft.model.configs)
    if draft.adapter is None and draft.objective is not None:  # else the base's own is sampled with
        configs["scheduler"] = sampled_so(configs["scheduler"], draft.objective.table)
    return plan.Model(
        family=family.name,
        base=facts.base,
        local=facts.local,
        revision=facts.revision,
        init=draft.trained.init,
        trained_component=family.trained_component,
        components=tuple(
            plan.Component(
                name=name,
                class_name=class_name,
                parameters=facts.parameters.get(name, 0),
                dtype=draft.formats.get(name, draft.precision.weights),
                trained=_is_trained(draft, facts, name),
                quantize=draft.quantize.get(name, "none"),
                quantize_on=draft.quantize_on.get(name, "device"),
                tiling=name == "vae" and draft.recipe.model.vae.tiling,
                file=draft.files.get(name),
            )
            for name, class_name in family.components.items()
        ),
        configs={name: json.dumps(each, sort_keys=True) for name, each in configs.items()},
    )


def _at(name: str, key: str) -> KeyPath:
    return ("model", name, key)


def _words(name: str) -> str:
    """A component's name in a sentence: "text encoder 2"."""
    return name.replace("_", " ")


def _is_trained(draft: Draft, facts: ModelFacts, name: str) -> bool:
    """Whether all of its weights are trained."""
    text = draft.text_training
    beside = text is not None and name in text.encoders
    return (beside or name == facts.family.trained_component) and draft.recipe.adapter is None


def _refuse_stranger(draft: Draft, facts: ModelFacts, name: str) -> None:
    if not draft.given(("model", name)):
        return
    own = [table for table in TABLES if table in facts.family.components]
    draft.error(
        "no-such-component",
        ("model", name),
        f"{facts.family.title} has no {_words(name)}",
        of="key",
        help=f"its components are {choices(own)}",
    )


def _format(draft: Draft, facts: ModelFacts, name: str, recipe: ComponentRecipe) -> plan.Dtype:
    """What its weights are loaded as."""
    assert draft.precision is not None
    path = _at(name, "weights")
    if _is_trained(draft, facts, name):
        draft.decide(path, draft.precision.trained, by="decided", why="as [precision] trained")
        if recipe.weights != "auto":
            draft.error(
                "no-effect",
                path,
                f"all of the {_words(name)} is trained, in the format of `[precision] trained`",
                help=f'say `trained = "{recipe.weights}"` in `[precision]`',
            )
        return draft.precision.trained
    if recipe.weights != "auto":
        draft.decide(path, FORMATS[recipe.weights])
        if recipe.weights == "fp16" and name != facts.family.trained_component:
            _overflow(draft, facts, name)
        return FORMATS[recipe.weights]
    if name == "vae":
        draft.decide(path, "float32", by="decided", why="each picture is encoded once: exactly")
        return "float32"
    draft.decide(path, draft.precision.weights, by="decided", why="as [precision] weights")
    return draft.precision.weights


def _overflow(draft: Draft, facts: ModelFacts, name: str) -> None:
    """A text encoder or autoencoder in float16."""
    mended = name == "vae" and facts.configs["vae"].get("force_upcast") is False
    if facts.family.fp16_overflows or (name in facts.family.overflowing and not mended):
        draft.error(
            "fp16-overflow",
            _at(name, "weights"),
            f"{facts.family.title}'s {_words(name)} can't run in fp16: activations exceed what "
            "fp16 holds (65504)",
            help='say "bf16", or "fp32" where the device has no bf16',
        )


def _transformer_format(draft: Draft, facts: ModelFacts) -> None:
    """What carries an adapter multiplies, so its weights are of the arithmetic's format."""
    assert draft.precision is not None
    name, precision = facts.family.trained_component, draft.precision
    if draft.recipe.adapter is None:
        return
    held = draft.formats[name]
    draft.precision = evolve(precision, weights=held)
    own = draft.trained.weights != "auto"
    path: KeyPath = _at(name, "weights") if own else ("precision", "weights")
    if "float16" in (precision.compute, held) and facts.family.fp16_overflows:
        if own and held == "float16" and precision.compute != "float16":
            refuse_half(draft, facts.family.title, path)
    elif held != precision.compute:
        draft.error(
            "precision-mismatch",
            path,
            f"a base in {held} can't compute in {precision.compute}",
            help="leave `weights` out: it follows `compute`",
        )


def _init(draft: Draft, facts: ModelFacts, name: str, recipe: ComponentRecipe) -> None:
    if recipe.init == "random" and name != facts.family.trained_component:
        draft.error(
            "random-frozen",
            _at(name, "init"),
            f"the {_words(name)} is not trained, so random weights would stay random",
            help=f"leave `init` out; it is for the {facts.family.trained_component}",
        )


def _quantisation(draft: Draft, facts: ModelFacts, name: str, kind: plan.Quantisation) -> None:
    """Everything that speaks against keeping component `name` as `kind`."""
    if kind == "none":
        return
    path, row = _at(name, "quantize"), QUANTISERS[kind]
    if name == "vae":
        draft.error(
            "quantised-vae",
            path,
            "the vae is not quantised: it is small, nearly all of it convolutions of more than one "
            "pixel, and its errors would go into every latent",
            help="leave `quantize` out",
        )
    elif name == facts.family.trained_component and draft.recipe.adapter is None:
        _refuse_trained(draft, name, kind)
    if draft.device not in row.devices:
        draft.error(
            "conflict",
            path,
            f"{row.title} weights can't be kept on {draft.device}",
            help=f"these can: {_fitting(draft)}",
        )
    carries = name == facts.family.trained_component
    if carries and draft.adapter and draft.adapter.kind not in row.adapters:
        draft.error(
            "conflict",
            path,
            f"a {kind} base can't carry an adapter of kind `{draft.adapter.kind}`",
            help=f"it can carry {choices(row.adapters)}",
        )


def _refuse_trained(draft: Draft, name: str, kind: plan.Quantisation) -> None:
    if draft.trained.init == "random":
        draft.error(
            "conflict",
            _at(name, "quantize"),
            f"fresh weights are trained, and {kind} weights can't be",
            help="leave out `quantize`",
        )
        return
    draft.error(
        "quantised-training",
        _at(name, "quantize"),
        f"all of the {_words(name)} is trained, and {kind} weights can't be: steps are smaller "
        "than their levels",
        help="leave out `quantize`, or train an adapter with `[adapter]`",
    )


def _fitting(draft: Draft) -> str:
    return choices([name for name, row in QUANTISERS.items() if draft.device in row.devices])
