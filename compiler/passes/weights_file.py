"""Weights of what is trained from a file of their own instead of the base's folder."""

from __future__ import annotations

from math import prod
from pathlib import Path

from compiler.draft import Draft, ModelFacts
from compiler.safetensors import Header, header_of
from compiler.schema import ComponentRecipe
from compiler.spans import KeyPath

SCALES = (".scale_weight", ".weight_scale", "scaled_fp8", ".absmax", ".quant_map", ".comfy_quant")
"""Ends of names that only files of quantised weights have."""


def resolve_file(draft: Draft, facts: ModelFacts, name: str, recipe: ComponentRecipe) -> None:
    """Fill in `draft.files` where component `name` has one."""
    where, carrier = ("model", name, "file"), facts.family.trained_component
    draft.decide(where, recipe.file or "none", why="its weights are the base's")
    if name in facts.held and recipe.init != "random":
        draft.files[name] = facts.file
    if not recipe.file:
        return
    if name != carrier:
        draft.error(
            "conflict",
            where,
            f"only the weights of the {carrier}, which is trained, can come from a file of their "
            "own: what is cached depends on the others",
            help=f"make a base folder that has this {name.replace('_', ' ')}",
        )
        return
    if recipe.init == "random":
        draft.error(
            "conflict",
            where,
            'the weights can\'t be both those of a file and fresh ones (`init = "random"`)',
            help="leave out one of the two",
        )
        return
    path = _found(draft, where, recipe.file)
    if path is not None and _holds_enough(draft, where, path, facts.parameters.get(name, 0)):
        draft.files[name] = str(path)


def _found(draft: Draft, where: tuple[str, ...], text: str) -> Path | None:
    try:
        path = (draft.folder / Path(text).expanduser()).resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        draft.error("bad-path", where, f"this is no path: {error}")
        return None
    if not there:
        draft.error(
            "missing-path",
            where,
            f"there is no file `{text}`",
            help="give a safetensors file; paths are relative to the recipe",
        )
        return None
    return path


def plain_weights(draft: Draft, where: KeyPath, path: Path) -> Header | None:
    """The header of a file of weights that are not quantised; None where it is none, and said."""
    header = header_of(path)
    if header is None:
        draft.error(
            "not-a-pipeline",
            where,
            f"`{path.name}` is no safetensors file",
            help="other kinds of files (.ckpt, .gguf) have to be converted first",
        )
    elif any(name.endswith(SCALES) for name in header.shapes):
        draft.error(
            "not-a-pipeline",
            where,
            f"the weights in `{path.name}` are quantised, with scales of their own",
            help='give the file in bf16 or fp16, and say `quantize = "fp8"` or "int8" here',
        )
        return None
    return header


def _holds_enough(draft: Draft, where: tuple[str, ...], path: Path, wanted: int) -> bool:
    """Whether it is a file of weights, and not of a smaller model or a LoRA."""
    header = plain_weights(draft, where, path)
    if header is None:
        return False
    held = sum(prod(shape) for shape in header.shapes.values())
    if held < wanted:
        draft.error(
            "not-a-pipeline",
            where,
            f"`{path.name}` holds {held:,} numbers, and the {where[1]} of this base {wanted:,}: it "
            "is that of another model, or no whole one",
            help="name the base that it was made from; a LoRA is no base",
        )
        return False
    return True
