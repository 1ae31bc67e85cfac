"""What the run leaves behind: checkpoints, validation pictures, metrics."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from compiler import plan
from compiler.draft import Draft
from compiler.passes.training import in_steps
from compiler.spans import KeyPath

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
PROMPT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
SCORES = ("shapes",)
LARGEST_EDGE = 8192  # pixels; no family samples beyond


def resolve_outputs(draft: Draft) -> None:
    """Fill in `checkpoints` and `validation`."""
    if draft.steps is None or draft.model is None:
        return
    recipe = draft.recipe.checkpoints
    every = in_steps(draft, ("checkpoints", "every"), recipe.every, draft.steps)
    draft.decide(("checkpoints", "every"), f"{every} steps" if every else "off")
    draft.decide(("checkpoints", "keep"), recipe.keep if recipe.keep else "all")
    draft.checkpoints = plan.Checkpoints(every=every, keep=recipe.keep)
    draft.validation = _validation(draft, draft.steps)


def _validation(draft: Draft, steps: plan.Steps) -> plan.Validation:
    assert draft.model is not None
    recipe, family = draft.recipe.validation, draft.model.family
    prompts = _prompts(draft)
    by = f"family {family.name}"
    every = in_steps(draft, ("validation", "every"), recipe.every, steps) if prompts else 0
    guidance = family.guidance if recipe.guidance == "auto" else float(recipe.guidance)
    sampling_steps = family.inference_steps if recipe.steps == "auto" else recipe.steps
    sizes = _sizes(draft) if prompts else ()
    if prompts:
        draft.decide(("validation", "every"), f"{every} steps" if every else "off")
        draft.decide(("validation", "guidance"), guidance, by=by, why="the pipeline's default")
        draft.decide(("validation", "steps"), sampling_steps, by=by, why="the pipeline's default")
    if recipe.score and recipe.score not in SCORES:
        draft.error(
            "unknown-value",
            ("validation", "score"),
            f"unknown measure `{recipe.score}`",
            help=f"known: {', '.join(SCORES)}",
        )
    return plan.Validation(
        every=every,
        at_start=recipe.at_start and bool(prompts),
        prompts=prompts,
        negative=recipe.negative,
        sizes=sizes,
        guidance=guidance,
        steps=sampling_steps,
        seeds=tuple(range(recipe.seed, recipe.seed + recipe.count)),
        score=recipe.score if prompts else "",
    )


def _prompts(draft: Draft) -> tuple[plan.Prompt, ...]:
    asked = draft.recipe.validation.prompts
    where: KeyPath = ("validation", "prompts")
    if isinstance(asked, str):
        table, inline = _prompt_file(draft, asked), False
    else:
        table, inline = asked, True
    found: list[plan.Prompt] = []
    for name, text in table.items():
        at = (*where, name) if inline else where
        if isinstance(text, Mapping):
            for below, words in text.items():
                _add_prompt(draft, found, (*at, below) if inline else at, below, words, name)
        else:
            _add_prompt(draft, found, at, name, text, "")
    return tuple(found)


def _add_prompt(
    draft: Draft, found: list[plan.Prompt], where: KeyPath, name: str, text: Any, group: str
) -> None:
    if not isinstance(text, str):
        draft.error("wrong-type", where, f"prompt `{name}` is no text")
    elif not PROMPT_NAME.fullmatch(name):
        draft.error(
            "bad-name",
            where,
            f"prompt name `{name}` can't name a file everywhere",
            help="use letters, digits, `.`, `_` and `-`, at most 60",
            of="key",
        )
    elif any(prompt.name == name for prompt in found):
        draft.error(
            "duplicate-id",
            where,
            f"two prompts are called `{name}`",
            help="names must differ, because pictures are named by them",
            of="key",
        )
    else:
        found.append(plan.Prompt(name=name, text=text, group=group))


def _prompt_file(draft: Draft, name: str) -> Mapping[str, Any]:
    where = ("validation", "prompts")
    path = draft.folder / name
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        draft.error("missing-path", where, f"can't read `{name}`: {error.strerror or error}")
    except (ValueError, RecursionError) as error:
        draft.error("bad-prompts", where, f"`{name}` is not valid: {error}")
    else:
        if isinstance(table, dict):
            return table
        draft.error("bad-prompts", where, f"`{name}` must hold a table of names and prompts")
    return {}


def _sizes(draft: Draft) -> tuple[tuple[int, int], ...]:
    assert draft.model is not None
    multiple = draft.model.family.multiple(draft.model.configs)
    asked = draft.recipe.validation.sizes
    if asked == "auto":
        edge = _training_edge(draft, multiple)
        draft.decide(
            ("validation", "sizes"), f"{edge}x{edge}", by="decided", why="the training resolution"
        )
        return ((edge, edge),)
    draft.decide(("validation", "sizes"), asked)
    return tuple(
        size
        for number, text in enumerate(asked)
        if (size := _size(draft, ("validation", "sizes", number), text, multiple)) is not None
    )


def _size(
    draft: Draft, where: tuple[str | int, ...], text: str, multiple: int
) -> tuple[int, int] | None:
    match = SIZE.fullmatch(text.strip())
    if match is None:
        draft.error(
            "bad-unit", where, f"`{text}` is no size", help='write width and height: "1024x768"'
        )
        return None
    width, height = int(match[1]), int(match[2])
    if not 0 < width <= LARGEST_EDGE or not 0 < height <= LARGEST_EDGE:
        draft.error(
            "out-of-range", where, f"`{text}` is out of range", label=f"1 to {LARGEST_EDGE} pixels"
        )
        return None
    if width % multiple or height % multiple:
        near = f"{_near(width, multiple)}x{_near(height, multiple)}"
        draft.error(
            "bad-size",
            where,
            f"`{text}` is no size this model can draw: edges must be multiples of {multiple}",
            help=f'the nearest is "{near}"',
        )
        return None
    return width, height


def _near(edge: int, multiple: int) -> int:
    return max(multiple, round(edge / multiple) * multiple)


def _training_edge(draft: Draft, multiple: int) -> int:
    first = draft.sources[0].geometry
    area = first.resolution * 1e6 if first.resolution_type == "area" else first.resolution**2
    return _near(round(area**0.5), multiple)
