"""What is to be exported, checked against the run folder. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from compiler import lock
from compiler.adapters import INVERSION, LORAS, PLAIN, result_name
from compiler.families import FAMILIES
from compiler.plan import Adapter, Dtype, Plan, lock_path
from runtime import saved
from runtime.errors import RunFailed
from runtime.export.conventions import FORMATS, OF_KIND, SINGLE_FILE, Format, refusal, usual
from runtime.export.size import Size, parsed
from runtime.result_step import result_step

PRECISIONS: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Refused(RunFailed):
    """It can't be exported or drawn as asked; nothing was begun (exit code 2)."""


@frozen(kw_only=True)
class Weights:
    """Which weights of a run: those of its result, or of a checkpoint."""

    plan: Plan
    folder: Path  # of the run, where it is now
    checkpoint: Path | None  # None: the result
    step: int  # updates done
    averaged: bool  # the moving average (EMA)

    @property
    def result(self) -> Path:
        """The folder of the result."""
        return _result(self.folder, self.plan)


@frozen(kw_only=True)
class Request:
    """What to write, and where to."""

    weights: Weights
    format: Format
    merge: bool  # the adapter into the base
    single_file: bool  # a whole model
    dtype: Dtype | None  # None: as trained; of a merged model, as the base's files
    out: Path
    size: Size | None = None  # of a LoRA: else as trained
    everything: bool = False  # in one file also components that published ones leave out
    bundle: bool = False  # vectors of new tokens in the LoRA's own file too


def chosen(folder: Path, *, step: int | None = None, ema: bool | None = None) -> Weights:
    """The weights of the run in `folder` that `step` and `ema` name.

    By default the result's; where there is none yet, the latest checkpoint's. Of an average and the
    trained weights, by default what the plan saves as the result. Raises Refused.
    """
    plan = read_plan(folder)
    if ema and plan.ema is None:
        raise Refused(f"{folder} keeps no moving average", help="leave out `--ema`")
    averaged = _result_is_average(plan) if ema is None else ema
    checkpoint = _checkpoint(folder, plan, step, averaged)
    done = result_step(folder, plan) if checkpoint is None else saved.step_of(checkpoint)
    return Weights(plan=plan, folder=folder, checkpoint=checkpoint, step=done, averaged=averaged)


def read_plan(folder: Path) -> Plan:
    """The plan of the run in `folder`. Raises Refused."""
    if not folder.is_dir():
        raise Refused(f"there is no folder `{folder}`", help="name the folder of a run")
    try:
        return lock.read(lock_path(folder))
    except lock.LockError as error:
        raise Refused(
            f"`{folder}` is no run that this version can read: {error}",
            help="name the folder of a run, which holds plan.lock.toml",
        ) from error


def _result(folder: Path, plan: Plan) -> Path:
    return folder / result_name(plan.adapter)


def _result_is_average(plan: Plan) -> bool:
    """Whether the result's own folder holds the average, not the trained weights."""
    return plan.ema is not None and plan.ema.save == "average"


def _checkpoint(folder: Path, plan: Plan, step: int | None, averaged: bool) -> Path | None:
    root = folder / "checkpoints"
    there = saved.complete(root)
    other = averaged != _result_is_average(plan)  # than the result holds
    if step is None and not other and _result(folder, plan).is_dir():
        return None
    if not there:
        raise Refused(
            f"{folder} holds no checkpoint"
            + ("" if other or step is not None else " and no result"),
            help="`tuner status` says how far the run is",
        )
    if step is None:
        beside = saved.folder_of(root, result_step(folder, plan))  # the result's other weights
        return beside if beside in there else there[-1]
    if saved.folder_of(root, step) not in there:
        steps = ", ".join(str(saved.read_state(path)["step"]) for path in there)
        raise Refused(f"{folder} holds no checkpoint of step {step}", help=f"it holds: {steps}")
    return saved.folder_of(root, step)


def requested(
    weights: Weights,
    *,
    format: str = "",
    merge: bool = False,
    single_file: bool = False,
    everything: bool = False,
    precision: str = "",
    resize: str = "",
    bundle: bool = False,
    out: Path | None = None,
) -> Request:
    """The request in these words. Raises Refused if there is no such layout, or if `out` is taken.

    `precision` is "fp32", "bf16", "fp16", or "" for that of the weights.
    """
    plan, whole = weights.plan, merge or weights.plan.adapter is None
    if not format:
        kind = None if whole or plan.adapter is None else plan.adapter.kind
        format = usual(plan.model.family, kind) if kind else "diffusers"
    if format not in FORMATS:
        raise Refused(f"unknown format `{format}`", help=f"one of: {', '.join(FORMATS)}")
    if precision and precision not in PRECISIONS:
        raise Refused(f"unknown precision `{precision}`", help=f"one of: {', '.join(PRECISIONS)}")
    _check_form(plan, format, merge=merge, single_file=single_file)
    if not merge:
        _check_dora(plan, format)
    if everything and not single_file:
        raise Refused(
            "`--everything` is for one file; a folder holds all components anyway",
            help="add `--single-file`, or leave out `--everything`",
        )
    if everything:
        _check_everything(plan)
    _check_words(plan, format, merge=merge, single_file=single_file)
    if bundle:
        _check_bundle(plan, format, whole=whole)
    if single_file and not everything:
        _check_encoders(plan)
    size = size_of(resize) if resize else None
    if size and (whole or plan.adapter is None or plan.adapter.kind not in PLAIN):
        raise Refused("only a LoRA can be resized", help="leave out `--resize`")
    if size and plan.adapter is not None:
        _check_cut(plan.adapter, size)
    request = Request(
        weights=weights,
        format=format,
        merge=merge,
        single_file=single_file,
        everything=everything,
        dtype=PRECISIONS[precision] if precision else None,
        out=out or Path(),
        size=size,
        bundle=bundle,
    )
    place = out or _place(request, precision)
    if place.exists() or place.is_symlink():
        raise Refused(f"`{place}` is there already", help="name another place with `--out`")
    return evolve(request, out=place)


def extraction(
    tuned: Path, format: str, precision: str, resize: str, out: Path | None
) -> tuple[Format, Size, Path]:
    """What to extract from `tuned` in these words: keys, size (by default rank 64) and place.

    Raises Refused.
    """
    chosen_format: Format | None = next((f for f in OF_KIND["lora"] if f == format), None)
    if format and chosen_format is None:
        raise Refused(f"no LoRA is extracted as `{format}`", help=" or ".join(OF_KIND["lora"]))
    if precision and precision not in PRECISIONS:
        raise Refused(f"unknown precision `{precision}`", help=f"one of: {', '.join(PRECISIONS)}")
    chosen_format = chosen_format or "diffusers"
    place = out or Path(f"{tuned.name}-lora{'' if format == 'peft' else '.safetensors'}")
    if place.exists() or place.is_symlink():
        raise Refused(f"`{place}` is there already", help="name another place with `--out`")
    return chosen_format, size_of(resize or "64"), place


def size_of(text: str) -> Size:
    """The size that `--resize` gives. Raises Refused."""
    found = parsed(text)
    if found is None:
        raise Refused(f"`{text}` is no size of a LoRA", help="a rank such as 16, or 95%")
    return found


def _check_cut(adapter: Adapter, size: Size) -> None:
    """Raise Refused for a size that is none of those that a DyLoRA was trained for, and of a LoRA
    whose ranks come one after the other."""
    if adapter.min_rank:
        why = "a LoRA with `min_rank` has its ranks in an order, which another rank does not keep"
        raise Refused(why, help="leave out `--resize`")
    if adapter.kind != "dylora" or not (size.energy or size.rank % adapter.block_size):
        return
    ranks = range(adapter.block_size, adapter.rank + 1, adapter.block_size)
    some = ", ".join(map(str, ranks[:3])) + (f" and so on, up to {ranks[-1]}" if ranks[3:] else "")
    raise Refused("a DyLoRA is cut to one of the ranks that it was trained for", help=some)


def _check_form(plan: Plan, format: Format, *, merge: bool, single_file: bool) -> None:
    family = plan.model.family
    if plan.adapter is None and merge:
        raise Refused(
            "there is nothing to merge: the run trained the whole model", help="leave out `--merge`"
        )
    if plan.adapter is not None and plan.adapter.min_rank and merge:
        raise Refused(
            "with `min_rank` the rank depends on the noise, and a merged model has one for all",
            help="leave out `--merge`",
        )
    if plan.adapter is not None and single_file and not merge:
        raise Refused(
            "`--single-file` is for whole models, and a LoRA is one file anyway",
            help="add `--merge` for the model with the LoRA in it, or leave out `--single-file`",
        )
    if single_file and family not in SINGLE_FILE:
        raise Refused(
            f"there is no published single-file layout that a model of {family} can be written in",
            help="leave out `--single-file` for a Diffusers folder",
        )
    if (merge or plan.adapter is None) and format != "diffusers":
        other = "" if single_file else "use `--single-file` for what other programs read, or "
        raise Refused(
            f"`--format {format}` names the keys of a LoRA; this is a whole model",
            help=f"{other}leave out `--format`",
        )
    if (
        plan.adapter is not None
        and not merge
        and (why := refusal(format, family, plan.adapter.kind))
    ):
        first = usual(family, plan.adapter.kind)
        other = f"use `--format {first}`, or" if format != first else "use"
        raise Refused(why, help=f"{other} `--merge` for a whole model")


def _check_words(plan: Plan, format: Format, *, merge: bool, single_file: bool) -> None:
    """Raise Refused for what has no place for text encoders or for new tokens."""
    if plan.adapter is not None and plan.adapter.kind == INVERSION and merge:
        raise Refused("new tokens are not a part of the model", help="leave out `--merge`")
    if plan.embeddings is not None and single_file:
        raise Refused(
            "new tokens are files of their own, which one file has no place for",
            help="leave out `--single-file`: the folder has them in `embeddings`",
        )
    if plan.text_training is not None and format == "peft":
        raise Refused(
            "peft's folder is of one model, and text encoders have an adapter too",
            help="use `--format diffusers`",
        )


def _check_bundle(plan: Plan, format: Format, *, whole: bool) -> None:
    """Raise Refused for vectors of new tokens that can't lie in the file of a LoRA."""
    if plan.embeddings is None:
        raise Refused("the run learned no new tokens to bundle", help="leave out `--bundle`")
    if whole or plan.adapter is None or plan.adapter.kind not in LORAS:
        raise Refused("`--bundle` puts new tokens into a LoRA's file", help="leave it out")
    if format != "kohya":
        raise Refused(
            f"new tokens lie in a LoRA's file in kohya's keys alone, not in {format} ones",
            help="add `--format kohya`, or leave out `--bundle`",
        )


def _check_dora(plan: Plan, format: Format) -> None:
    """Raise Refused where text encoders have a DoRA, and the format is for the model's alone."""
    kind = plan.adapter.kind if plan.adapter else ""
    if kind == "dora" and plan.text_training and format in ("kohya", "comfyui"):
        raise Refused(
            f"the {format} keys of DoRA are for the model alone, and text encoders have one too",
            help="use `--format diffusers`, or `--merge` for a whole model",
        )


def _check_encoders(plan: Plan) -> None:
    """Raise Refused where published files have no place for encoders that were trained."""
    layout = FAMILIES[plan.model.family].whole_file
    trained = plan.text_training.encoders if plan.text_training else ()
    if layout is None or set(trained) <= set(layout.usual):
        return
    raise Refused(
        "text encoders were trained, and published files of this family leave them out",
        help="add `--everything`",
    )


def _check_everything(plan: Plan) -> None:
    """Raise Refused where no names are known for a text encoder in a file of the whole model."""
    card = FAMILIES[plan.model.family]
    parts = card.whole_file.parts if card.whole_file else {}
    if set(card.text_encoders) <= set(parts):
        return
    raise Refused(
        f"other programs read the text encoder of {card.title} from a file of its own",
        help="leave out `--everything`",
    )


def _place(request: Request, precision: str) -> Path:
    """`export/NAME-step-000400[-WISH...][.safetensors]` in the run folder: all that makes another
    file of the same step is in its name."""
    weights, whole = request.weights, request.merge or request.weights.plan.adapter is None
    wishes = (
        "ema" if weights.averaged else "",
        "merged" if request.merge else "",
        "" if whole or request.format == "diffusers" else request.format,
        f"rank-{request.size.rank}" if request.size and not request.size.energy else "",
        f"energy-{request.size.energy:g}" if request.size and request.size.energy else "",
        "bundle" if request.bundle else "",
        "everything" if request.everything else "",
        precision,
    )
    name = "-".join(filter(None, (f"{weights.plan.name}-step-{weights.step:06d}", *wishes)))
    adapter = weights.plan.adapter
    a_folder = request.format == "peft" or (adapter is not None and adapter.kind == INVERSION)
    ending = ".safetensors" if request.single_file or not (whole or a_folder) else ""
    return weights.folder / "export" / (name + ending)


def config_of(plan: Plan) -> dict[str, Any]:
    """The configuration of the trained component."""
    found: dict[str, Any] = json.loads(plan.model.configs[plan.model.trained_component])
    return found
