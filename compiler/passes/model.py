"""Which model: its family, where it comes from, its parts and what is trained."""

from __future__ import annotations

import json
import re
from functools import partial
from math import inf, prod
from pathlib import Path
from typing import Any, Literal

from compiler.diagnostics import choices, nearest
from compiler.draft import Draft, ModelFacts
from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from compiler.files import read_small
from compiler.noise import noise_table, predicted
from compiler.passes.adapter import resolve_adapter
from compiler.passes.distilled import judge_base
from compiler.passes.whole_file import facts_of_file, facts_of_known
from compiler.safetensors import header_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILE = re.compile(rf"{HUB_ID.pattern}/[\w./-]+\.safetensors")
HUB_PAGE = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:tree|blob)/.*)?/?"
)
OTHER_NAMES = {
    **dict.fromkeys(("sd1", "sd15", "sd1.5", "sd2", "sd21", "sd2.1", "stable-diffusion"), "sd"),
    **dict.fromkeys(("sd35", "sd3.5", "sd3.5-large", "sd3.5-medium", "stable-diffusion-3"), "sd3"),
    **dict.fromkeys(("stable-diffusion-xl", "pony", "illustrious"), "sdxl"),
    **dict.fromkeys(("flux1", "flux.1", "flux-dev", "flux-schnell"), "flux"),
    **dict.fromkeys(("klein", "flux.2", "flux2-klein"), "flux2"),
    **dict.fromkeys(("pixart-sigma", "pixart-alpha"), "pixart"),
    "lumina": "lumina2",
    "z-image-turbo": "z_image",
}
"""What families are called elsewhere."""
Key = Literal["base", "rest"]  # of `[model]`


FILE = ".safetensors"


def resolve_model(draft: Draft) -> None:
    """Fill in `draft.model` and `draft.adapter`."""
    family = _family(draft)
    if family is None:
        return
    draft.model = _facts(draft, family)
    if draft.model is None:
        return
    draft.decide(("model", "base"), draft.model.file or draft.model.base)
    if not draft.model.file:
        draft.decide(("model", "rest"), "none", why="the base is no single file")
    judge_base(draft, draft.model)
    draft.adapter = resolve_adapter(draft, family)
    _text(draft, family)
    _init(draft)


def _family(draft: Draft) -> FamilyCard | None:
    name = draft.recipe.model.family
    if name in FAMILIES:
        return FAMILIES[name]
    guess = nearest(name, FAMILIES, OTHER_NAMES)
    draft.error(
        "unknown-value",
        ("model", "family"),
        f"unknown family `{name}`",
        help=f"did you mean `{guess}`?"
        if guess
        else f"known families: {choices(tuple(FAMILIES), len(FAMILIES))}",
    )
    return None


def _facts(draft: Draft, family: FamilyCard) -> ModelFacts | None:
    base, rest = draft.recipe.model.base, draft.recipe.model.rest
    place = folder_of(draft.folder, base)
    if place is not None and place.is_file():
        return facts_of_file(draft, family, place, partial(_named, draft, family, "rest", rest))
    if rest != "auto" and not base.endswith(FILE):
        draft.error(
            "no-effect",
            ("model", "rest"),
            f"`{base}` is no file, so nothing of another model is needed",
            help="leave out `rest`",
            of="key",
        )
    return _named(draft, family, "base", base)


def _named(draft: Draft, family: FamilyCard, key: Key, text: str) -> ModelFacts | None:
    """What is known of the folder or hub id `text`, which stands at `model.<key>`."""
    folder = folder_of(draft.folder, text)
    if folder is not None:
        return _local(draft, family, folder, key)
    if HUB_FILE.fullmatch(text):
        owner, name, file = text.split("/", 2)
        draft.error(
            "missing-path",
            ("model", key),
            f"there is no file `{text}` here; its header is needed, and a plan downloads nothing",
            help=f"`hf download {owner}/{name} {file} --local-dir .`, then give that file",
        )
        return None
    if page := HUB_PAGE.fullmatch(text):
        draft.error(
            "missing-path",
            ("model", key),
            f"`{text}` is a page about a model",
            help=f'{key} = "{page[1]}"',
        )
        return None
    if not HUB_ID.fullmatch(text) or text.startswith((".", "/", "~")) or text.endswith(FILE):
        draft.error(
            "missing-path",
            ("model", key),
            f"there is no {'file' if text.endswith(FILE) else 'folder'} `{text}`",
            help="give a hub id such as `owner/name`, a folder in the Diffusers layout or a "
            "safetensors file; paths are relative to the recipe",
        )
        return None
    return _hub(draft, family, text, key)


def folder_of(recipe_folder: Path, base: str) -> Path | None:
    """The folder that a recipe names, absolute; None where nothing is there."""
    try:
        folder = (recipe_folder / Path(base).expanduser()).resolve()
        return folder if folder.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _hub(draft: Draft, family: FamilyCard, base: str, key: Key) -> ModelFacts | None:
    for known in family.known:
        if known.base == base:
            return facts_of_known(draft, family, known)
    owner = _family_of(base)
    if owner is not None and key == "base":
        draft.error(
            "wrong-family",
            ("model", key),
            f"`{base}` is of the family {owner.name}, not {family.name}",
            help=f'say `family = "{owner.name}"`',
        )
        return None
    draft.error(
        "unknown-model",
        ("model", key),
        f"`{base}` is no folder here and no model that {family.name} knows",
        help=_known_help(family, base),
    )
    return None


def _family_of(base: str) -> FamilyCard | None:
    """The family that a published model is known to be of."""
    cards = FAMILIES.values()
    return next((c for c in cards if any(known.base == base for known in c.known)), None)


def _known_help(family: FamilyCard, base: str) -> str:
    names = [known.base for known in family.known]
    guess = nearest(base, names)
    known = ", ".join(f"`{name}`" for name in names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    start = f"did you mean `{guess}`? " if guess else f"known without a download: {known}{more}. "
    return start + f"For any other, `hf download {base} --local-dir FOLDER` and give that folder"


def _local(draft: Draft, family: FamilyCard, folder: Path, key: Key) -> ModelFacts | None:
    where, said = ("model", key), _said(draft, key)
    if key == "base" and draft.recipe.model.revision:
        draft.error(
            "no-effect",
            ("model", "revision"),
            "`revision` has no effect: it picks a state of a repository, and the base is a folder",
            help="leave `revision` out",
            of="key",
        )
    index = _json(folder / "model_index.json")
    if index is None:
        draft.error(
            "not-a-pipeline",
            where,
            f"`{said}` holds no readable model_index.json",
            help="the base must be a pipeline folder as Diffusers' `save_pretrained` writes it",
        )
        return None
    if not _right_class(draft, family, index, key):
        return None
    configs = _configs(draft, family, folder, key)
    if configs is None or not _usable(draft, family, configs, key):
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


def _said(draft: Draft, key: Key) -> str:
    return draft.recipe.model.base if key == "base" else draft.recipe.model.rest


def _right_class(draft: Draft, family: FamilyCard, index: dict[str, Any], key: Key) -> bool:
    name = index.get("_class_name")
    if name == family.pipeline:
        return True
    other = next((card.name for card in FAMILIES.values() if card.pipeline == name), None)
    draft.error(
        "wrong-family",
        ("model", key),
        f"this base is a {name}, not a {family.pipeline}",
        help=f'say `family = "{other}"`' if other else f"{family.name} trains {family.pipeline}",
    )
    return False


def _configs(
    draft: Draft, family: FamilyCard, folder: Path, key: Key
) -> dict[str, dict[str, Any]] | None:
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
            ("model", key),
            f"`{_said(draft, key)}` lacks {choices(missing)}",
            help="copy the whole pipeline folder, all components included",
        )
        return None
    return configs


def _usable(draft: Draft, family: FamilyCard, configs: dict[str, dict[str, Any]], key: Key) -> bool:
    """Whether the configurations hold what the family's card reads in them."""
    try:
        multiple = family.multiple(configs)
        shift, _ = family.shift(configs["scheduler"])
        channels = configs["vae"][family.latent_channels_key]
        family.embedding_shapes(configs, family.prompt_length)
        good = 0 < multiple <= 1024 and 0 < shift < inf and type(channels) is int and channels > 0
        predicted(family, configs["scheduler"])
        noise_table(family, configs["scheduler"])
        _same_latents(family, configs["vae"])
        why = "sizes or the shift in them are out of range"
    except (ArithmeticError, AssertionError, AttributeError, LookupError) as error:
        good, why = False, f"{type(error).__name__}: {error}"
    except (TypeError, ValueError) as error:
        good, why = False, str(error)
    if not good:
        draft.error(
            "not-a-pipeline",
            ("model", key),
            f"the configurations of `{_said(draft, key)}` are none of {family.title}: {why}",
            help="copy the config.json files of the published pipeline, as they are",
        )
    return good


def _same_latents(family: FamilyCard, vae: dict[str, Any]) -> None:
    """Raises ValueError for an autoencoder whose latents are normalised as the family's are not."""
    stated = [key for key in ("latents_mean", "latents_std") if vae.get(key) is not None]
    if stated and not family.latent_statistics:
        raise ValueError(f"its vae normalises latents by `{stated[0]}`, as none of its models does")


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
