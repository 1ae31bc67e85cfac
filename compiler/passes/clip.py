"""The model that gives validation pictures their CLIP score."""

from __future__ import annotations

import json
import os
from pathlib import Path

from compiler.draft import Draft
from compiler.files import read_small
from compiler.passes.model import HUB_ID, folder_of
from compiler.spans import KeyPath

WHERE: KeyPath = ("validation", "clip_model")
NEEDED = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
OFFLINE = "HF_HUB_OFFLINE"  # set by `--offline`, and by people who want the same


def clip_model(draft: Draft) -> str:
    """Its folder or hub id; "" where no CLIP score is asked for, or what is asked for is none."""
    recipe = draft.recipe.validation
    if not recipe.clip_score:
        if draft.given(WHERE):
            draft.error(
                "no-effect",
                WHERE,
                "`clip_model` has no effect: no CLIP score is asked for",
                help="clip_score = true",
                of="key",
            )
        return ""
    place = WHERE if draft.given(WHERE) else ("validation", "clip_score")
    folder = folder_of(draft.folder, recipe.clip_model)
    if folder is not None:
        return _local(draft, folder)
    if not HUB_ID.fullmatch(recipe.clip_model) or recipe.clip_model.startswith((".", "/", "~")):
        draft.error(
            "missing-path",
            place,
            f"there is no folder `{recipe.clip_model}`",
            help='a hub id such as "openai/clip-vit-base-patch16", or a folder of such a model',
        )
        return ""
    if os.environ.get(OFFLINE, "") not in ("", "0") and not _copied(recipe.clip_model):
        draft.error(
            "missing-path",
            place,
            f"`{recipe.clip_model}` is not on this machine, and no network may be asked",
            help=f"`hf download {recipe.clip_model}` while there is one, or give a folder",
        )
        return ""
    draft.decide(WHERE, recipe.clip_model)
    return recipe.clip_model


def _local(draft: Draft, folder: Path) -> str:
    lacking = [name for name in NEEDED if not (folder / name).is_file()]
    if not lacking and _kind(folder) != "clip":
        lacking = ["a config.json of a CLIP model"]
    if lacking:
        draft.error(
            "unknown-model",
            WHERE,
            f"`{draft.recipe.validation.clip_model}` is no CLIP model: it lacks {lacking[0]}",
            help="what `CLIPModel` and `CLIPProcessor` of Transformers have saved into one folder",
        )
        return ""
    draft.decide(WHERE, str(folder))
    return str(folder)


def _kind(folder: Path) -> object:
    try:
        config = json.loads(read_small(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def _copied(name: str) -> bool:
    """Whether the hub's cache holds the model."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    place = cache / f"models--{name.replace('/', '--')}" / "snapshots"
    return any(place.glob("*/config.json"))
