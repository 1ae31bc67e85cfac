"""A plan as text of at most 80 columns: what would be done, with what, and who said so.

Plain text, the same in a terminal and in a pipe; `decorated` adds colour to the finished lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from compiler.plan import Bucket, Component, Decision, Phase, Plan
from tuner.curve import draw
from tuner.defaults import default_of, differs
from tuner.formats import amount, counted, in_unit_of, number, size
from tuner.layout import columns, pair, section, wrapped

MAX_BUCKETS = 6  # rows that a source gets without -v
_PLACE = re.compile(r"(?P<file>.+):(?P<line>\d+)")
_BARE = ("scheduler", "tokenizer")  # components without parameters


def text(plan: Plan, *, recipe: str, verbose: bool = False) -> str:
    """The whole plan. `recipe` is the file as the person named it; `verbose` unfolds details."""
    head = wrapped(f"{recipe} is valid; `tuner run` would do this:", "", "  ")
    blocks = [
        head,
        _model(plan, recipe),
        _method(plan, recipe),
        _differs(plan, recipe),
        _filled_in(plan, recipe, verbose),
        _data(plan, verbose),
        _training(plan, recipe),
        _steps(plan, recipe, verbose),
        _memory(plan),
        _closing(plan),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def summary(plan: Plan) -> str:
    """A few lines for the start of a run."""
    trained = amount(plan.memory.counts.get("trainable", 0))
    method = f"{plan.adapter.kind}, rank {plan.adapter.rank}" if plan.adapter else "full fine-tune"
    if trained != "0":
        method += f", {trained} parameters train"
    rows = [
        ("model", f"{plan.model.base} ({plan.model.family})"),
        ("method", method),
        ("data", f"{counted(_images(plan), 'image')}; {_arithmetic(plan)}"),
    ]
    if plan.memory.phases:
        rows.append(("memory", _peak_words(plan)))
    lines = [line for name, words in rows for line in section(name, words)]
    return "\n".join([*lines, *_closing(plan)])


def decorated(plain: str, style: Callable[[str, str], str]) -> str:
    """Finished text with colour around whole words and lines; the words stay what they are."""
    return "\n".join(_decorate(line, style) for line in plain.split("\n"))


def validation_steps(plan: Plan) -> list[int]:
    """Steps after which pictures are drawn; 0 is the untrained model."""
    if not plan.validation.prompts:
        return []
    start = [0] if plan.validation.at_start else []
    return start + _due(plan.validation.every, plan.steps.total)


def checkpoint_steps(plan: Plan) -> list[int]:
    """Steps after which a checkpoint is written; the last step always is one."""
    return _due(plan.checkpoints.every, plan.steps.total)


def result_folder(plan: Plan) -> str:
    """Where the result will lie."""
    return str(Path(plan.run_folder) / ("lora" if plan.adapter else "model"))


def peak(plan: Plan) -> Phase | None:
    """The phase that needs most device memory; None where nothing was simulated."""
    return max(plan.memory.phases, key=lambda phase: phase.device_bytes, default=None)


def _due(every: int, total: int) -> list[int]:
    regular = list(range(every, total + 1, every)) if every else []
    return regular if regular and regular[-1] == total else [*regular, total]


def _model(plan: Plan, recipe: str) -> list[str]:
    model = plan.model
    revision = f" @ {model.revision}" if model.revision else ""
    words = f"{model.base}{revision}, family {model.family}"
    lines = section("model", words, _where(plan, "model.base", recipe))
    parts = [part for part in model.components if not part.name.startswith(_BARE)]
    rows = [
        (
            part.name,
            (amount(part.parameters) if part.parameters else "-").rjust(5),
            part.dtype,
            _fate(part, plan),
        )
        for part in parts
    ]
    return lines + columns(rows)


def _fate(part: Component, plan: Plan) -> str:
    """What becomes of a component during the run."""
    if part.trained:
        return "trained" + (" from random weights" if plan.model.init == "random" else "")
    if part.name == plan.model.trained_component:
        adapted = plan.memory.counts.get("adapted", 0)
        return "frozen" + (f", {counted(adapted, 'layer')} adapted" if adapted else "")
    if part.name.startswith("text_encoder"):
        return "frozen, freed after step 1"
    return "frozen, " + ("decodes pictures" if plan.validation.prompts else "freed after step 2")


def _method(plan: Plan, recipe: str) -> list[str]:
    adapter, counts = plan.adapter, plan.memory.counts
    trainable = counts.get("trainable", 0)
    if adapter is None:
        lines = section("method", "full fine-tune")
        whole = counts.get("parameters", 0)
    else:
        scale = number(adapter.alpha / adapter.rank)
        words = (
            f"{adapter.kind}, rank {adapter.rank}, alpha {number(adapter.alpha)} (scale {scale})"
        )
        lines = section("adapter", words, _where(plan, "adapter.rank", recipe))
        whole = counts.get("parameters", 0) + trainable
    if trainable:
        share = 100 * trainable / whole
        lines.append(f"  {amount(trainable)} of {amount(whole)} parameters train ({share:.3g}%)")
    precision = plan.precision
    frozen = f", {precision.weights} frozen" if adapter else ""
    lines.append(f"  {precision.compute} compute{frozen}, {precision.trained} trained weights")
    return lines


def _differs(plan: Plan, recipe: str) -> list[str]:
    """Keys that the person set to something else than the default."""
    lines: list[str] = []
    for decision in plan.decisions:
        default = default_of(decision.key) if _given(decision) else None
        if default is not None and differs(decision.value, default):
            words = f"  ~ {decision.key}  {default} -> {decision.value}"
            lines += pair(words, _source(decision, recipe))
    return ["differs from the defaults", *lines] if lines else []


def _filled_in(plan: Plan, recipe: str, verbose: bool) -> list[str]:
    """Values that the compiler chose, with its reasons; with -v, all values."""
    chosen = [d for d in plan.decisions if verbose or not (_given(d) or d.source == "default")]
    if not chosen:
        return []
    width = max(len(decision.key) for decision in chosen)
    lines = ["every setting" if verbose else "filled in"]
    for decision in chosen:
        reason = decision.why or _source(decision, recipe)
        if decision.why and decision.source != "decided":
            reason = f"{_source(decision, recipe)}: {decision.why}"
        *above, last = wrapped(decision.value or '""', f"  {decision.key:<{width}}  ", " " * 4)
        lines += above
        lines += (
            pair(last, reason) if len(reason) <= 76 else [last, *wrapped(reason, " " * 8, " " * 8)]
        )
    return lines


def _data(plan: Plan, verbose: bool) -> list[str]:
    skipped = sum(source.skipped for source in plan.sources)
    words = f"{counted(_images(plan), 'image')} in {counted(len(plan.buckets), 'bucket')}"
    total = f", {skipped:,} skipped" if skipped and len(plan.sources) > 1 else ""
    lines = section("data", words + total)
    for source in plan.sources:
        note = f" ({source.skipped:,} skipped)" if source.skipped else ""
        lines += wrapped(f"{source.id}: {source.path}{note}", "  ", "    ")
        if verbose:
            lines += _source_details(plan, source.id)
        buckets = [bucket for bucket in plan.buckets if bucket.source == source.id]
        shown = buckets if verbose else buckets[:MAX_BUCKETS]
        rows = [(f"{b.width}x{b.height}", _bucket_words(b, source.repeats)) for b in shown]
        lines += columns(rows, indent=4)
        if len(buckets) > len(shown):
            lines.append(f"    and {counted(len(buckets) - len(shown), 'bucket')} more (-v)")
    return lines + wrapped(_arithmetic(plan), "  = ", "    ")


def _source_details(plan: Plan, source_id: str) -> list[str]:
    source = next(source for source in plan.sources if source.id == source_id)
    shape, captions = source.geometry, source.captions
    words = (
        f"resolution {number(shape.resolution)} {shape.resolution_type}, {shape.aspect}, "
        f"{shape.crop} crop, edges in multiples of {shape.multiple}"
    )
    named = f" `{captions.prompt}`" if captions.prompt else ""
    spoken = f"captions from {captions.kind}{named}, dropout {number(captions.dropout)}"
    return wrapped(words, "    ", "      ") + wrapped(spoken, "    ", "      ")


def _bucket_words(bucket: Bucket, repeats: str) -> str:
    product = bucket.images * Fraction(repeats)
    sign = "=" if product == bucket.samples else "->"
    short = bucket.samples - (bucket.batches - 1) * bucket.batch_size
    return (
        f"{counted(bucket.images, 'image')} x {repeats} {sign} "
        f"{counted(bucket.samples, 'sample')} / {bucket.batch_size} = "
        f"{counted(bucket.batches, 'batch', 'batches')}"
        + (f", last of {short}" if short < bucket.batch_size else "")
    )


def _arithmetic(plan: Plan) -> str:
    """From images to steps, as a sum that can be checked by hand."""
    steps = plan.steps
    window = steps.ranks * steps.accumulate
    words = f"{counted(steps.samples_per_epoch, 'sample')} in "
    words += counted(steps.batches_per_epoch, "batch", "batches")
    if window > 1:
        parts = [f"{steps.ranks} ranks"] * (steps.ranks > 1)
        parts += [f"{steps.accumulate} accumulated"] * (steps.accumulate > 1)
        divisor = " x ".join(parts)
        words += f" / ({divisor})" if len(parts) > 1 else f" / {divisor}"
    words += f" = {counted(steps.per_epoch, 'step')} an epoch"
    whole, rest = divmod(steps.total, max(steps.per_epoch, 1))
    if rest == 0:
        return f"{words} x {counted(whole, 'epoch')} = {counted(steps.total, 'step')}"
    return f"{words}; {counted(steps.total, 'step')} = {counted(whole, 'epoch')} + {rest:,}"


def _training(plan: Plan, recipe: str) -> list[str]:
    optimizer, objective = plan.optimizer, plan.objective
    fused = " (fused)" if optimizer.fused else ""
    words = f"{optimizer.name}{fused}, lr {number(optimizer.lr)}"
    words += f", clip {number(plan.max_grad_norm)}" if plan.max_grad_norm else ", no clipping"
    lines = section("train", words, _where(plan, "train.optimizer.lr", recipe))
    weighting = "" if objective.weighting == "none" else f", weighted by {objective.weighting}"
    lines += wrapped(
        f"{objective.prediction} matching, timesteps {objective.sampling}, "
        f"shift {number(objective.shift)}, {objective.loss}{weighting}",
        "  ",
        "    ",
    )
    if plan.ema:
        every = "step" if plan.ema.every == 1 else f"{plan.ema.every} steps"
        where = "the processor" if plan.ema.device == "cpu" else "the device"
        lines.append(f"  ema, decay {number(plan.ema.decay)}, every {every}, on {where}")
    return lines + _schedule(plan)


def _schedule(plan: Plan) -> list[str]:
    schedule = plan.schedule
    peak_rate = number(plan.optimizer.lr)
    words = f"  schedule {schedule.name}"
    if schedule.warmup:
        words += f", {counted(schedule.warmup, 'step')} of warm-up"
    if schedule.name == "constant" and not schedule.warmup:
        return [words]
    if schedule.name != "constant":
        words += f", ends at {number(schedule.end * plan.optimizer.lr)}"
    return [words, *draw(schedule, peak_rate)]


def _steps(plan: Plan, recipe: str, verbose: bool) -> list[str]:
    encoders = sum(part.name.startswith("text_encoder") for part in plan.model.components)
    prompts = len(plan.validation.prompts)
    texts = f"captions of {counted(_images(plan), 'image')}"
    texts += f" and {counted(prompts, 'prompt')}" if prompts else ""
    window = plan.steps.accumulate * plan.steps.ranks
    batch = max(min(b.batch_size, b.samples) for b in plan.buckets) * window
    rows = [
        ("cache text", f"{texts}, {counted(encoders, 'encoder')}"),
        ("cache latents", f"{counted(_images(plan), 'image')}"),
        ("train", f"{counted(plan.steps.total, 'step')} of up to {counted(batch, 'sample')}"),
    ]
    if prompts:
        rows.append(("validate", _validation_words(plan)))
    rows += [("checkpoint", _checkpoint_words(plan)), ("export", result_folder(plan))]
    lines = columns([(f"{n} + {name}", words) for n, (name, words) in enumerate(rows, 1)])
    if verbose:
        lines += wrapped(f"caches: {plan.cache_folder}", "  ", "    ")
        for prompt in plan.validation.prompts:
            lines += wrapped(f"prompt {prompt.name}: {prompt.text}", "  ", "    ")
    return ["steps", *lines]


def _validation_words(plan: Plan) -> str:
    validation = plan.validation
    parts = [
        counted(len(validation.prompts), "prompt"),
        counted(len(validation.sizes), "size"),
        counted(len(validation.seeds), "seed"),
    ]
    every = f"every {counted(validation.every, 'step')}" if validation.every else "at the end"
    start = "untrained, then " if validation.at_start else ""
    return f"{' x '.join(parts)}, {start}{every}"


def _checkpoint_words(plan: Plan) -> str:
    checkpoints = plan.checkpoints
    if not checkpoints.every:
        return "at the end and when stopped"
    kept = f"the newest {checkpoints.keep} stay" if checkpoints.keep else "all stay"
    return f"every {counted(checkpoints.every, 'step')}, {kept}"


def _memory(plan: Plan) -> list[str]:
    if not plan.memory.phases:
        return section("memory", "not simulated")
    lines = section("memory", _peak_words(plan))
    rows = []
    for phase in plan.memory.phases:
        words = _parts(phase)
        if phase.host_bytes and plan.device != "cpu":
            words += f"; host {size(phase.host_bytes)}"
        rows.append((phase.name, size(phase.device_bytes).rjust(9), words))
    blocks = plan.memory.activation_checkpointing
    every = {0: "off", 1: "every block"}.get(blocks, f"every {blocks} blocks")
    return [*lines, *columns(rows), f"  activation checkpointing {every}"]


def _parts(phase: Phase) -> str:
    """What a phase's peak is made of, largest first, in the unit of the whole."""
    parts = sorted(phase.parts.items(), key=lambda item: -item[1])
    whole = phase.device_bytes
    return ", ".join(f"{name} {in_unit_of(part, whole)}" for name, part in parts if part)


def _peak_words(plan: Plan) -> str:
    top = peak(plan)
    assert top is not None, "callers ask only where there are phases"
    budget = plan.memory.budget_bytes
    of = f" of {size(budget)}" if budget else ""
    return f"peak {size(top.device_bytes)}{of} on {plan.device}, in {top.name} (simulated)"


def _closing(plan: Plan) -> list[str]:
    validation = plan.validation
    pictures = len(validation.prompts) * len(validation.sizes) * len(validation.seeds)
    parts = [
        f"cache {counted(_images(plan), 'image')}",
        f"train {counted(plan.steps.total, 'step')}",
        f"draw {counted(pictures * len(validation_steps(plan)), 'picture')}",
    ]
    return wrapped(f"Plan: {', '.join(parts)} ({plan.digest[:12]})", "", "  ")


def _images(plan: Plan) -> int:
    return sum(source.images for source in plan.sources)


def _given(decision: Decision) -> bool:
    """Whether a person stated the value: in a file, or on the command line."""
    return decision.source == "--set" or _PLACE.fullmatch(decision.source) is not None


def _where(plan: Plan, key: str, recipe: str) -> str:
    return next((_source(d, recipe) for d in plan.decisions if d.key == key), "")


def _source(decision: Decision, recipe: str) -> str:
    """Who gave a value, in short: `line 12` of the recipe itself, else the full name."""
    place = _PLACE.fullmatch(decision.source)
    if place and Path(place["file"]).name == Path(recipe).name:
        return f"line {place['line']}"
    return {"default": "default", "decided": "decided"}.get(decision.source, decision.source)


def _decorate(line: str, style: Callable[[str, str], str]) -> str:
    if line.startswith("Plan:"):
        return style("heading", line)
    if line.startswith("  ~ "):
        return "  " + style("changed", "~") + line[3:]
    step = re.match(r"  \d+ \+ ", line)
    if step:
        return line[: step.end() - 2] + style("made", "+") + line[step.end() - 1 :]
    if line.startswith("note:"):
        return style("quiet", line)
    name = re.match(r"[a-z][a-z ]*?(?=  |$)", line)
    return style("heading", name[0]) + line[name.end() :] if name else line
