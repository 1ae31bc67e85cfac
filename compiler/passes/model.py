"""Which model: its family, where it comes from, its parts and what is trained."""

from __future__ import annotations

import json
import re
from math import inf, prod
from pathlib import Path
from typing import Any

from compiler.diagnostics import choices, nearest
from compiler.draft import Draft, ModelFacts
from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from compiler.files import read_small
from compiler.noise import noise_table, predicted
from compiler.passes.adapter import resolve_adapter
from compiler.safetensors import header_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_model(draft: Draft) -> None:
    """Fill in `draft.model` and `draft.adapter`."""
    family = _family(draft)
    if family is None:
        return
    draft.model = _facts(draft, family)
    if draft.model is None:
        return
    draft.decide(("model", "base"), draft.model.base)
    draft.adapter = resolve_adapter(draft, family)
    _text(draft, family)
    _init(draft)


def _family(draft: Draft) -> FamilyCard | None:
    name = draft.recipe.model.family
    if name in FAMILIES:
        return FAMILIES[name]
    guess = nearest(name, FAMILIES)
    draft.error(
        "unknown-value",
        ("model", "family"),
        f"unknown family `{name}`",
        help=f"did you mean `{guess}`?" if guess else f"known families: {choices(tuple(FAMILIES))}",
    )
    return None


def _facts(draft: Draft, family: FamilyCard) -> ModelFacts | None:
    base = draft.recipe.model.base
    folder = folder_of(draft.folder, base)
    if folder is not None:
        return _local(draft, family, folder)
    if not HUB_ID.fullmatch(base) or base.startswith((".", "/", "~")):
        draft.error(
            "missing-path",
            ("model", "base"),
            f"there is no folder `{base}`",
            help="give a hub id such as `owner/name`, or a folder in the Diffusers layout; "
            "paths are relative to the recipe",
        )
        return None
    return _hub(draft, family, base)


def folder_of(recipe_folder: Path, base: str) -> Path | None:
    """The folder that a recipe names, absolute; None where nothing is there."""
    try:
        folder = (recipe_folder / Path(base).expanduser()).resolve()
        return folder if folder.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _hub(draft: Draft, family: FamilyCard, base: str) -> ModelFacts | None:
    revision = draft.recipe.model.revision or "main"
    draft.decide(("model", "revision"), revision)
    for known in family.known:
        if known.base == base:
            return ModelFacts(
                family=family,
                base=base,
                local=False,
                revision=revision,
                configs={name: dict(config) for name, config in known.configs.items()},
                parameters=dict(known.parameters),
                known=known,
                index=dict(known.index),
            )
    draft.error(
        "unknown-model",
        ("model", "base"),
        f"`{base}` is no folder here and no model that {family.name} knows",
        help=_known_help(family, base),
    )
    return None


def _known_help(family: FamilyCard, base: str) -> str:
    names = [known.base for known in family.known]
    guess = nearest(base, names)
    start = (
        f"did you mean `{guess}`? " if guess else f"known without a download: {choices(names)}. "
    )
    return start + f"For any other, `hf download {base} --local-dir FOLDER` and give that folder"


def _local(draft: Draft, family: FamilyCard, folder: Path) -> ModelFacts | None:
    where = ("model", "base")
    if not folder.is_dir():
        draft.error(
            "not-a-pipeline",
            where,
            f"`{draft.recipe.model.base}` is a file; {family.name} needs a folder in the "
            "Diffusers layout",
        )
        return None
    index = _json(folder / "model_index.json")
    if index is None:
        draft.error(
            "not-a-pipeline",
            where,
            f"`{draft.recipe.model.base}` holds no readable model_index.json",
            help="the base must be a pipeline folder as Diffusers' `save_pretrained` writes it",
        )
        return None
    if not _right_class(draft, family, index):
        return None
    configs = _configs(draft, family, folder)
    if configs is None or not _usable(draft, family, configs):
        return None
    counts = {name: _parameters(folder / name) for name in family.components}
    return ModelFacts(
        family=family,
        base=str(folder),
        local=True,
        revision="",
        configs=configs,
        parameters=counts,
        known=None,
        index=index,
    )


def _right_class(draft: Draft, family: FamilyCard, index: dict[str, Any]) -> bool:
    name = index.get("_class_name")
    if name == family.pipeline:
        return True
    other = next((card.name for card in FAMILIES.values() if card.pipeline == name), None)
    draft.error(
        "wrong-family",
        ("model", "base"),
        f"this base is a {name}, not a {family.pipeline}",
        help=f'say `family = "{other}"`' if other else f"{family.name} trains {family.pipeline}",
    )
    return False


def _configs(draft: Draft, family: FamilyCard, folder: Path) -> dict[str, dict[str, Any]] | None:
    configs: dict[str, dict[str, Any]] = {}
    missing = []
    for name in family.components:
        if name.startswith("tokenizer"):
            if not (folder / name).is_dir():
                missing.append(name)
            continue
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        config = _json(folder / name / file)
        if config is None:
            missing.append(f"{name}/{file}")
        else:
            configs[name] = config
    if missing:
        draft.error(
            "not-a-pipeline",
            ("model", "base"),
            f"`{draft.recipe.model.base}` lacks {choices(missing)}",
            help="copy the whole pipeline folder, all components included",
        )
        return None
    return configs


def _usable(draft: Draft, family: FamilyCard, configs: dict[str, dict[str, Any]]) -> bool:
    """Whether the configurations hold what the family's card reads in them."""
    try:
        multiple = family.multiple(configs)
        shift, _ = family.shift(configs["scheduler"])
        channels = configs["vae"][family.latent_channels_key]
        family.embedding_shapes(configs, family.prompt_length)
        good = 0 < multiple <= 1024 and 0 < shift < inf and type(channels) is int and channels > 0
        noise_table(family, configs["scheduler"])
        predicted(family, configs["scheduler"])
        why = "sizes or the shift in them are out of range"
    except (ArithmeticError, AssertionError, AttributeError, LookupError) as error:
        good, why = False, f"{type(error).__name__}: {error}"
    except (TypeError, ValueError) as error:
        good, why = False, str(error)
    if not good:
        draft.error(
            "not-a-pipeline",
            ("model", "base"),
            f"the configurations of `{draft.recipe.model.base}` are none of {family.title}: {why}",
            help="copy the config.json files of the published pipeline, as they are",
        )
    return good


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(read_small(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parameters(folder: Path) -> int:
    """Parameters in a component's safetensors files, from their headers alone."""
    paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    headers = [header for path in paths if (header := header_of(path)) is not None]
    return sum(prod(shape) for header in headers for shape in header.shapes.values())


def _text(draft: Draft, family: FamilyCard) -> None:
    from compiler.plan import Text

    assert draft.model is not None
    asked, usual = draft.recipe.text, draft.model.prompt_length
    length = usual if asked.max_length == "auto" else asked.max_length
    by = f"family {family.name}"
    draft.decide(("text", "max_length"), length, by=by, why="as the pipeline at inference")
    if length != usual:
        draft.warn(
            "text-length",
            ("text", "max_length"),
            f"{length} tokens in training, but the pipeline uses {usual}",
        )
    wanted = bool(family.instruction) if asked.instruction == "auto" else asked.instruction
    if wanted and not family.instruction:
        draft.error(
            "no-effect",
            ("text", "instruction"),
            f"{family.name} has no instruction to put before prompts",
        )
    if family.instruction:
        draft.decide(("text", "instruction"), wanted, by=by, why="as the pipeline at inference")
        if not wanted:
            draft.warn(
                "text-instruction",
                ("text", "instruction"),
                "trained without the instruction that the pipeline puts before prompts",
            )
    draft.text = Text(
        max_length=length,
        instruction=family.instruction if wanted else (),
        zeros_for_empty=_zeros_for_empty(draft.model),
    )


def _zeros_for_empty(facts: ModelFacts) -> bool | None:
    """Whether an empty negative prompt is zeros, as the base says."""
    usual = facts.family.zeros_for_empty
    stated = facts.index.get("force_zeros_for_empty_prompt")
    return stated if usual is not None and isinstance(stated, bool) else usual


def _init(draft: Draft) -> None:
    if draft.trained.init == "random" and draft.recipe.adapter is not None:
        name = draft.model.family.trained_component if draft.model else ""
        draft.error(
            "conflict",
            ("model", name, "init"),
            f"an adapter on a randomly initialised {name} learns nothing of use",
            help="leave out `[adapter]` to train from scratch, or leave out `init`",
        )
