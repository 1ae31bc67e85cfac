"""What the run leaves behind: checkpoints, validation pictures, metrics."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from compiler import plan
from compiler.data.geometry import edge_of
from compiler.diagnostics import choices
from compiler.draft import Draft
from compiler.families.card import Configs
from compiler.files import read_small
from compiler.passes.clip import clip_model
from compiler.passes.evaluation import judged_weights
from compiler.passes.keeping import KEEP_EVERY
from compiler.passes.refined import refined_picture
from compiler.passes.storage import how_to_name, safe_name
from compiler.passes.training import in_steps
from compiler.samplers import SAMPLERS
from compiler.spans import KeyPath
from compiler.trackers import TRACKERS

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
LONGEST_NAME = 60  # characters of a prompt's name: size and seed are put behind it
SCORES = ("shapes",)
LARGEST_EDGE = 8192  # pixels; no family samples beyond
FAR = 2.0  # a model that draws at twice or half of its size repeats things or leaves them out
LONG = 4.0  # width to height; beyond, pictures fall apart
FEW_STEPS = 2  # of a distilled model: its pipeline's default


def resolve_outputs(draft: Draft) -> None:
    """Fill in `checkpoints` and `validation`."""
    if draft.steps is None or draft.model is None:
        return
    recipe = draft.recipe.checkpoints
    every = in_steps(draft, ("checkpoints", "every"), recipe.every, draft.steps)
    draft.decide(("checkpoints", "every"), f"{every} steps" if every else "off")
    draft.decide(("checkpoints", "keep"), recipe.keep if recipe.keep else "all")
    draft.checkpoints = plan.Checkpoints(
        every=every,
        keep=recipe.keep,
        keep_every=in_steps(draft, KEEP_EVERY, recipe.keep_every, draft.steps),
        best=recipe.best,
        result=recipe.result,
    )
    draft.validation = _validation(draft, draft.steps)
    _longer_than_the_run(draft, draft.steps.total)
    _trackers(draft)


def _trackers(draft: Draft) -> None:
    """What the trackers need here, and what means nothing without one."""
    recipe = draft.recipe.track
    if not recipe.to and draft.given(("track", "project")):
        draft.error(
            "no-effect",
            ("track", "project"),
            "`project` has no effect: no tracker is told of this run",
            help='to = ["wandb"]',
            of="key",
        )
    for number, name in enumerate(recipe.to):
        facts, where = TRACKERS[name], ("track", "to", number)
        if name in recipe.to[:number]:
            draft.error("duplicate-id", where, f"tracker `{name}` is given twice")
        elif facts.package in draft.machine.missing:
            draft.warn(
                "missing-package",
                where,
                f"tracker `{name}` needs the package {facts.package}, which is not installed here",
                help=f"pip install 'tuner[{name}]'",
            )


def _validation(draft: Draft, steps: plan.Steps) -> plan.Validation:
    assert draft.model is not None
    recipe, family = draft.recipe.validation, draft.model.family
    prompts = _prompts(draft)
    if not prompts:
        _nothing_to_draw(draft)
    by = f"family {family.name}"
    every = in_steps(draft, ("validation", "every"), recipe.every, steps) if prompts else 0
    guidance = draft.model.guidance if recipe.guidance == "auto" else float(recipe.guidance)
    usual = draft.model.inference_steps if draft.sprint is None else FEW_STEPS
    sampling_steps = usual if recipe.steps == "auto" else recipe.steps
    sizes = _sizes(draft) if prompts else ()
    if prompts:
        draft.decide(("validation", "every"), f"{every} steps" if every else "off")
        draft.decide(("validation", "guidance"), guidance, by=by, why="the pipeline's default")
        draft.decide(("validation", "steps"), sampling_steps, by=by, why="the pipeline's default")
    if draft.model.few_steps and guidance > 1:
        draft.error(
            "not-in-family",
            ("validation", "guidance"),
            f"this {family.title} was distilled into {family.few_steps} steps: its pipeline takes "
            "no notice of a guidance scale",
            help="leave `guidance` out, or train the base that it was made from",
        )
    if recipe.negative and (draft.sprint is not None or not family.negative_prompts):
        draft.error(
            "not-in-family",
            ("validation", "negative"),
            f"{family.title} uses no negative prompts: it was distilled from guidance",
            help="leave `negative` out",
            of="key",
        )
    elif recipe.negative and guidance <= 1:
        draft.error(
            "no-effect",
            ("validation", "negative"),
            f"a negative prompt has no effect at guidance {guidance:g}: only above 1 is it used",
            of="key",
        )
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
        scheduler=_sampler(draft) if prompts else "",
        clip_model=clip_model(draft) if prompts else "",
        picture=refined_picture(draft, sampling_steps) if prompts else None,
        weights=_weights(draft) if prompts else None,
    )


def _weights(draft: Draft) -> plan.Judged | None:
    """Those that draw; None where there is no choice."""
    found = judged_weights(draft, ("validation", "weights"), draft.recipe.validation.weights)
    return None if draft.ema is None else found


def _sampler(draft: Draft) -> str:
    """The name of what samples; "" for the base's own."""
    assert draft.model is not None
    where, name = ("validation", "scheduler"), draft.recipe.validation.scheduler
    family = draft.model.family
    own = draft.model.configs["scheduler"]
    draft.decide(where, own.get("_class_name", "auto") if name == "auto" else name, by="the base")
    if name == "auto":
        return ""
    if draft.recipe.sprint is not None:
        draft.error(
            "not-in-family",
            where,
            "a model of few steps is drawn with by the scheduler that it was distilled for",
            help="leave `scheduler` out",
        )
        return ""
    facts = SAMPLERS[name]
    if not (facts.flow if family.prediction == "flow" else facts.table):
        able = [
            n for n, s in SAMPLERS.items() if (s.flow if family.prediction == "flow" else s.table)
        ]
        draft.error(
            "not-in-family",
            where,
            f"{family.title} matches a flow, which `{name}` can't follow",
            help=f"these can: {choices(able)}",
        )
    elif own.get("use_dynamic_shifting") and not facts.by_size:
        draft.error(
            "not-in-family",
            where,
            f"{family.title} shifts noise levels by a picture's size, which `{name}` can't",
            help='scheduler = "euler"',
        )
    return name


def _nothing_to_draw(draft: Draft) -> None:
    """Settings of pictures that are never drawn."""
    if any(fault.path.startswith("validation.prompts") for fault in draft.diagnostics):
        return  # there are prompts, but wrong ones
    table = draft.located.data.get("validation", {})
    stated = [key for key in table if key != "prompts"] if isinstance(table, dict) else []
    if stated:
        draft.error(
            "no-effect",
            ("validation", stated[0]),
            f"`{stated[0]}` has no effect: there are no validation prompts, so nothing is drawn",
            help='prompts = { beach = "a dog on a beach" }',
            of="key",
        )
    elif draft.given(("validation", "prompts")):
        draft.warn(
            "empty-prompt",
            ("validation", "prompts"),
            "there is no prompt here, so no picture is drawn while training",
            help='prompts = { beach = "a dog on a beach" }',
        )


def _longer_than_the_run(draft: Draft, total: int) -> None:
    """Intervals that never come round. The run's end always counts, so this is only unwise."""
    assert draft.checkpoints is not None and draft.validation is not None
    for name, every, what in (
        ("checkpoints", draft.checkpoints.every, "checkpoint is written"),
        ("validation", draft.validation.every, "picture is drawn"),
    ):
        where = (name, "every")
        if every > total and draft.given(where):
            draft.warn(
                "interval-too-long",
                where,
                f"every {every} steps in a run of {total}: no {what} before the end",
                help='`every = "off"` says the same on purpose',
            )
    if draft.ema is not None and draft.ema.every > total:
        draft.error(
            "no-effect",
            ("train", "ema", "every"),
            f"an average that is updated every {draft.ema.every} steps, in a run of {total}, "
            "never is",
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
    elif not safe_name(name, LONGEST_NAME):
        draft.error(
            "bad-name",
            where,
            f"prompt name `{name}` can't name a file everywhere",
            help=how_to_name(name, LONGEST_NAME),
            of="key",
        )
    elif same := [one.name for one in found if one.name.casefold() == name.casefold()]:
        draft.error(
            "duplicate-id",
            where,
            f"two prompts are called `{name}`"
            if same[0] == name
            else f"`{same[0]}` and `{name}` name one file where case does not count",
            help="names must differ, because pictures are named by them",
            of="key",
        )
    else:
        if not text.strip():
            draft.warn(
                "empty-prompt",
                where,
                f"prompt `{name}` is empty: it draws what the model makes of nothing",
            )
        found.append(plan.Prompt(name=name, text=text, group=group))


def _prompt_file(draft: Draft, name: str) -> Mapping[str, Any]:
    where = ("validation", "prompts")
    path = draft.folder / name
    try:
        text = read_small(path).decode("utf-8-sig")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        why = error.strerror or error
        draft.error("missing-path", where, f"can't read `{name}`: {why}", help=_how_prompts(name))
    except (ValueError, RecursionError) as error:
        message = f"`{name}` is not valid: {error}"
        draft.error("bad-prompts", where, message, help=_how_prompts(""))
    else:
        if isinstance(table, dict):
            return table
        message = f"`{name}` must hold a table of names and prompts"
        draft.error("bad-prompts", where, message, help=_how_prompts(""))
    return {}


def _how_prompts(text: str) -> str:
    """How to write what was probably meant by `text`: a prompt, if it looks like one."""
    words = text if " " in text and '"' not in text else "a dog on a beach"
    return f'prompts = {{ first = "{words}" }}, or a .toml or .json file of names and prompts'


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
    found: list[tuple[int, int]] = []
    for number, text in enumerate(asked):
        where = ("validation", "sizes", number)
        size = _size(draft, where, text, multiple)
        if size in found:
            draft.error("duplicate-id", where, f"the size `{text}` is given twice")
        elif size is not None:
            _unusual(draft, where, size)
            found.append(size)
    return tuple(found)


def _size(draft: Draft, where: KeyPath, text: str, multiple: int) -> tuple[int, int] | None:
    configs = draft.model.configs if draft.model else {}
    match = SIZE.fullmatch(text.strip())
    if match is None:
        edges = re.fullmatch(r"(\d{2,4})\D{1,3}(\d{2,4})", text.strip())
        meant = f"{edges[1]}x{edges[2]}" if edges else "1024x768"
        draft.error(
            "bad-unit", where, f"`{text}` is no size", help=f'write width and height: "{meant}"'
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
    most = largest_edge(draft.model.family.multiple(configs), configs) if draft.model else 0
    if most and max(width, height) > most:
        draft.error(
            "bad-size",
            where,
            f"`{text}` is more than this model can draw: its positions end at {most} pixels",
        )
        return None
    return width, height


def largest_edge(multiple: int, configs: Configs) -> int:
    """Pixels of the longest edge that a model with a table of positions has places for; 0 where
    there is no such table. Each place is one patch, `multiple` pixels wide."""
    places = configs.get("transformer", {}).get("pos_embed_max_size")
    return places * multiple if isinstance(places, int) else 0


def _unusual(draft: Draft, where: KeyPath, size: tuple[int, int]) -> None:
    """Warn of a size far from what the base was made for and from what it is trained on."""
    assert draft.model is not None
    width, height = size
    made_for = [draft.model.native_resolution, *(edge_of(s.geometry) for s in draft.sources)]
    root = (width * height) ** 0.5
    shape = max(width, height) / min(width, height)
    if all(root >= FAR * edge or root <= edge / FAR for edge in made_for):
        draft.warn(
            "unusual-size",
            where,
            f"`{width}x{height}` is far from what the base was made for "
            f"({made_for[0]:g} pixels) and from what it is trained on",
            help="pictures at twice or half of that size repeat things or leave them out",
        )
    elif shape > LONG:
        draft.warn(
            "unusual-size",
            where,
            f"`{width}x{height}` is {shape:.3g} times as long as it is wide; no family was made "
            f"for more than {LONG:g}",
        )


def _near(edge: int, multiple: int) -> int:
    return max(multiple, round(edge / multiple) * multiple)


def _training_edge(draft: Draft, multiple: int) -> int:
    first = next(source for source in draft.sources if source.images)
    return _near(round(edge_of(first.geometry)), multiple)
