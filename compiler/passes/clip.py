"""The model that gives validation pictures their CLIP score."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiler.draft import Draft
from compiler.files import read_small
from compiler.hub import model_folder
from compiler.memory import gib
from compiler.passes.model import HUB_ID, folder_of
from compiler.spans import KeyPath

WHERE: KeyPath = ("validation", "clip_model")
NEEDED = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
OFFLINE = "HF_HUB_OFFLINE"  # set by `--offline`, and by people who want the same
NUMBER = 4  # bytes: it works in float32
TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
"""What a configuration of CLIP's text half means where it says nothing (Transformers)."""
VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "image_size": 224,
    "patch_size": 32,
}
_LARGE: Mapping[str, Any] = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
}
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "openai/clip-vit-base-patch32": {},
    "openai/clip-vit-base-patch16": {"vision_config": {"patch_size": 16}},
    "openai/clip-vit-large-patch14": _LARGE,
    "openai/clip-vit-large-patch14-336": {
        **_LARGE,
        "vision_config": {**_LARGE["vision_config"], "image_size": 336},
    },
}
"""Configurations of models of the hub, for plans made before they are copied."""


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
    config = _config(place_in_hub(recipe.clip_model)) or KNOWN.get(recipe.clip_model)
    draft.clip_bytes = NUMBER * parameters(config) if config is not None else 0
    draft.decide(WHERE, recipe.clip_model, why=_why(draft.clip_bytes))
    return recipe.clip_model


def _why(size: int) -> str:
    return f"{gib(size)} of host memory" if size else "how large it is shows once it is copied"


def _local(draft: Draft, folder: Path) -> str:
    lacking = [name for name in NEEDED if not (folder / name).is_file()]
    config = _config(folder) or {}
    if not lacking and config.get("model_type") != "clip":
        lacking = ["a config.json of a CLIP model"]
    if lacking:
        draft.error(
            "unknown-model",
            WHERE,
            f"`{draft.recipe.validation.clip_model}` is no CLIP model: it lacks {lacking[0]}",
            help="what `CLIPModel` and `CLIPProcessor` of Transformers have saved into one folder",
        )
        return ""
    draft.clip_bytes = NUMBER * parameters(config)
    draft.decide(WHERE, str(folder), why=_why(draft.clip_bytes))
    return str(folder)


def parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the CLIP model with a configuration (Radford et al. 2021, arXiv 2103.00020)."""
    text = _half(config, "text_config", TEXT)
    vision = _half(config, "vision_config", VISION)
    projection = _number(config, "projection_dim", 512)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    norms = 2 * text["hidden_size"] + 2 * 2 * vision["hidden_size"]  # around the blocks
    tokens = text["vocab_size"] + text["max_position_embeddings"]
    places = 3 * vision["patch_size"] ** 2 + 1 + patches + 1  # patches, class, and their places
    return int(
        tokens * text["hidden_size"]
        + places * vision["hidden_size"]
        + _blocks(text)
        + _blocks(vision)
        + norms
        + projection * (text["hidden_size"] + vision["hidden_size"])
        + 1  # the scale of likeness
    )


def _half(config: Mapping[str, Any], name: str, usual: Mapping[str, int]) -> dict[str, int]:
    told = config.get(name)
    stated = told if isinstance(told, dict) else {}
    return {key: _number(stated, key, value) for key, value in usual.items()}


def _number(stated: Mapping[str, Any], key: str, usual: int) -> int:
    value = stated.get(key)
    return value if type(value) is int and value > 0 else usual


def _blocks(half: Mapping[str, int]) -> int:
    """Four projections, two layers of a perceptron and two norms, all with biases."""
    size, inner = half["hidden_size"], half["intermediate_size"]
    block = 4 * (size * size + size) + 2 * size * inner + inner + size + 2 * 2 * size
    return half["num_hidden_layers"] * block


def _config(folder: Path | None) -> dict[str, Any] | None:
    try:
        config = json.loads(read_small(folder / "config.json")) if folder else None
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _copied(name: str) -> bool:
    """Whether the hub's cache holds the model."""
    return place_in_hub(name) is not None


def place_in_hub(name: str) -> Path | None:
    """Where the hub's cache holds the model; None where it does not."""
    place = model_folder(name) / "snapshots"
    return next((path.parent for path in sorted(place.glob("*/config.json"))), None)
