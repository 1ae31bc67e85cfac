"""A plan as text of at most 80 columns: what would be done, with what, and who said so.

Plain text, the same in a terminal and in a pipe; `decorated` adds colour to the finished lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from compiler.adapters import INVERSION, result_name
from compiler.costs import Outlook
from compiler.noise import entries_of, trained_entries
from compiler.occasions import validation_steps
from compiler.plan import (
    Adapter,
    Checkpoints,
    Component,
    Evaluation,
    NewToken,
    Objective,
    Plan,
    Sprint,
)
from compiler.shapes import pass_shapes
from compiler.trackers import TRACKERS
from tuner.curve import draw
from tuner.formats import amount, counted, number
from tuner.layout import columns, section, wrapped
from tuner.plan_costs import (
    cached_words,
    cost_lines,
    present_of,
    resume_lines,
    sign,
    train_words,
)
from tuner.plan_data import arithmetic, data_lines, images_of
from tuner.plan_memory import memory_lines, peak_words
from tuner.plan_settings import different, filled_in, where

_BARE = ("scheduler", "tokenizer")  # components without parameters


def text(plan: Plan, *, recipe: str, verbose: bool = False, outlook: Outlook | None = None) -> str:
    """The whole plan. `recipe` is the file as the person named it; `verbose` unfolds details;
    `outlook` adds what it costs on this machine."""
    head = wrapped(f"{recipe} is valid; `tuner run` would do this:", "", "  ")
    blocks = [
        head,
        [*_model(plan, recipe), *_method(plan, recipe)],
        [*different(plan, recipe, verbose), *filled_in(plan, recipe, verbose)],
        data_lines(plan, verbose, outlook),
        _training(plan, recipe, verbose),
        _steps(plan, verbose, outlook),
        [
            *memory_lines(plan, verbose),
            *cost_lines(plan, outlook, verbose=verbose),
            *_told(plan, recipe),
        ],
        _closing(plan),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def summary(plan: Plan, outlook: Outlook | None = None) -> str:
    """A few lines for the start of a run."""
    trained = amount(plan.memory.counts.get("trainable", 0))
    method = _method_words(plan)
    if trained != "0":
        method += f", {trained} parameters train"
    rows = [
        ("model", f"{plan.model.origin} ({plan.model.family})"),
        ("method", method),
        ("data", f"{counted(images_of(plan), 'image')}; {arithmetic(plan)}"),
    ]
    if plan.memory.phases:
        rows.append(("memory", peak_words(plan)))
    lines = [line for name, words in rows for line in section(name, words)]
    lines += cost_lines(plan, outlook, verbose=False) + resume_lines(plan, outlook)
    return "\n".join([*lines, *_closing(plan)])


def decorated(plain: str, style: Callable[[str, str], str]) -> str:
    """Finished text with colour around whole words and lines; the words stay what they are."""
    return "\n".join(_decorate(line, style) for line in plain.split("\n"))


def result_folder(plan: Plan) -> str:
    """Where the result will lie."""
    return str(Path(plan.run_folder) / result_name(plan.adapter))


def _model(plan: Plan, recipe: str) -> list[str]:
    model = plan.model
    revision = f" @ {model.revision}" if model.revision not in ("", "main") else ""
    words = f"{model.origin}{revision} ({model.family})"
    lines = section("model", words, where(plan, "model.base", recipe))
    parts = [part for part in model.components if not part.name.startswith(_BARE)]
    rows = [
        (
            part.name,
            (amount(part.parameters) if part.parameters else "-").rjust(5),
            _held(part),
            _fate(part, plan),
        )
        for part in parts
    ]
    return lines + columns(rows)


def _held(part: Component) -> str:
    """The number format of its weights."""
    return part.dtype if part.quantize == "none" else part.quantize


def _fate(part: Component, plan: Plan) -> str:
    """What becomes of a component during the run."""
    origin = f", from {Path(part.file).name}" if part.file else ""
    text, new = plan.text_training, plan.embeddings
    if part.trained:
        return "trained" + (" from random weights" if plan.model.init == "random" else origin)
    if part.name == plan.model.trained_component:
        adapted = plan.memory.counts.get("adapted", 0)
        return f"frozen{origin}" + (f", {counted(adapted, 'layer')} adapted" if adapted else "")
    if text is not None and part.name in text.encoders:
        return "frozen, adapted, in each step"
    if new is not None and part.name in new.encoders:
        return "frozen but for new tokens, in each step"
    if part.name.startswith("text_encoder"):
        return "frozen, freed after step 1"
    return "frozen, " + ("decodes pictures" if plan.validation.prompts else "freed after step 2")


def _method(plan: Plan, recipe: str) -> list[str]:
    adapter, counts = plan.adapter, plan.memory.counts
    trainable = counts.get("trainable", 0)
    if adapter is None:
        lines = section("method", _method_words(plan))
        lines += [] if plan.sprint is None else _sprint(plan.sprint)
    else:
        sized = "adapter.rank" if adapter.rank else "adapter.block_size"
        key = sized if adapter.rank or adapter.block_size else "adapter.kind"
        lines = section("adapter", adapter_words(adapter), where(plan, key, recipe))
    whole = whole_parameters(plan)
    if trainable and plan.sprint is not None:
        lines.append(f"  student {amount(trainable)} parameters, all trained, as large a teacher")
    elif trainable:
        share = 100 * trainable / whole
        lines.append(f"  {amount(trainable)} of {amount(whole)} parameters train ({share:.3g}%)")
    precision = plan.precision
    base = next(part for part in plan.model.components if part.name == plan.model.trained_component)
    held = precision.weights if base.quantize == "none" else base.quantize
    frozen = f", {held} frozen" if adapter else ""
    scaled = ", loss scaled" if precision.compute == "float16" else ""
    words = f"  {precision.compute} compute{frozen}, {precision.trained} trained weights{scaled}"
    return [*lines, *_encoders(plan), words, *_speed(plan)]


def whole_parameters(plan: Plan) -> int:
    """Of all that is trained or carries an adapter, and of the adapters; 0 where that is not
    known."""
    counts, text = plan.memory.counts, plan.text_training
    beside = [c.parameters for c in plan.model.components if text and c.name in text.encoders]
    added = counts.get("trainable", 0) if plan.adapter else 0
    return counts.get("parameters", 0) + sum(beside) + added


def _encoders(plan: Plan) -> list[str]:
    """The text encoders that are trained too, and new tokens."""
    lines: list[str] = []
    if (text := plan.text_training) is not None:
        how = f"rank {text.adapter.rank}" if text.adapter else "all weights"
        told = f"{how}, lr {number(text.lr)}{_end(text.until, plan)}"
        lines += wrapped(f"{' and '.join(text.encoders)} too: {told}", "  ", "    ")
    if (new := plan.embeddings) is not None:
        words = ", ".join(
            f"{t.token} ({counted(t.vectors, 'vector')}{_from(t)})" for t in new.tokens
        )
        told = f"new tokens {words}, lr {number(new.lr)}{_end(new.until, plan)}"
        lines += wrapped(told, "  ", "    ")
    return lines


def _from(token: NewToken) -> str:
    if token.start:
        return f", going on from {Path(token.start).name}"
    return f" from `{token.initial}`" if token.initial else ""


def _end(until: int, plan: Plan) -> str:
    return f", up to step {until}" if until < plan.steps.total else ""


def _method_words(plan: Plan) -> str:
    if plan.sprint is not None:
        return "sprint: distilled into one to four steps"
    if plan.adapter is None:
        return "full fine-tune"
    kind, rank = plan.adapter.kind, plan.adapter.rank
    if kind == INVERSION:
        return kind
    blocks = f", blocks of {plan.adapter.block_size}" if plan.adapter.block_size else ""
    return f"{kind}, rank {rank}" if rank else f"{kind}{blocks}"


def _sprint(facts: Sprint) -> list[str]:
    """What the student learns from, and who judges it."""
    scales = ", ".join(number(scale) for scale in facts.guidance)
    lines = [
        f"  consistency, guidance {scales}, tangents grow in over {facts.tangent_warmup} steps"
    ]
    if not facts.heads:
        return [*lines, "  no discriminator: every step is the student's"]
    blocks = ", ".join(map(str, facts.heads))
    rate = number(facts.discriminator.lr)
    judged = f"  discriminator with heads on blocks {blocks}, lr {rate}, every second step"
    return [*lines, judged]


def adapter_words(adapter: Adapter) -> str:
    """Its kind and sizes, and the scale of its update where that has one."""
    begun = ", lengths of rows apart" if adapter.weight_decompose else ""
    begun += ", norms too" if adapter.train_norm else ""
    begun += f", from {'/'.join(Path(adapter.start).parts[-2:])}" if adapter.start else ""
    if adapter.kind == INVERSION:
        return f"{adapter.kind}: all of the base is frozen"
    if not adapter.rank:
        factors = adapter.butterfly_factors
        more = f", {counted(factors, 'butterfly factor')}" if factors else ""
        blocks = f", blocks of {adapter.block_size}" if adapter.block_size else ""
        return f"{adapter.kind}{blocks}{more}{begun}"
    root = adapter.rank**0.5 if adapter.scaling == "sqrt-rank" else adapter.rank
    others = f", {counted(len(adapter.ranks), 'pattern')} of other ranks" if adapter.ranks else ""
    scale = number(adapter.alpha / root)
    sizes = f"rank {adapter.rank}, alpha {number(adapter.alpha)} (scale {scale})"
    sizes += f", blocks of {adapter.block_size}" if adapter.block_size else ""
    sizes += f", {adapter.min_rank} at full noise" if adapter.min_rank else ""
    return f"{adapter.kind}, {sizes}{others}{begun}"


def _speed(plan: Plan) -> list[str]:
    """What makes steps faster, where something is on."""
    speed, shapes = plan.speed, pass_shapes(plan.buckets, plan.steps.micro_batch)
    compiled = speed.compile == "regional"
    words = [f"blocks compiled for {counted(len(shapes), 'shape')}"] if compiled else []
    words += [f"attention by {speed.attention}"] if speed.attention != "native" else []
    words += ["TF32"] if speed.tf32 else []
    words += ["channels last"] if speed.channels_last else []
    words += ["fused projections"] if speed.fused_projections else []
    words += [f"prompts padded to {speed.tokens} tokens"] if speed.tokens else []
    return [f"  {', '.join(words)}"] if words else []


LEARNT = {"flow": "flow matching", "epsilon": "noise prediction", "v": "v-prediction"}


def _training(plan: Plan, recipe: str, verbose: bool) -> list[str]:
    optimizer, objective = plan.optimizer, plan.objective
    fused = " (fused)" if optimizer.fused else ""
    words = f"{optimizer.name}{fused}, lr {number(optimizer.lr)}"
    words += f", clip {number(plan.max_grad_norm)}" if plan.max_grad_norm else ", no clipping"
    lines = section("train", words, where(plan, "train.optimizer.lr", recipe))
    weighting = "" if objective.weighting == "none" else f", weighted by {objective.weighting}"
    told = "" if objective.guidance is None else f", told guidance {number(objective.guidance)}"
    lines += wrapped(
        f"{LEARNT[objective.prediction]}, timesteps {_levels(objective)}, "
        f"{_loss(objective)}{weighting}{told}"
        if plan.sprint is None
        else f"angles log-normal ({number(plan.sprint.mean)}, {number(plan.sprint.std)}), "
        f"judged at ({number(plan.sprint.discriminator_mean)}, "
        f"{number(plan.sprint.discriminator_std)})",
        "  ",
        "    ",
    )
    if plan.ema:
        every = "step" if plan.ema.every == 1 else f"{plan.ema.every} steps"
        place = "the processor" if plan.ema.device == "cpu" else "the device"
        rise = " (warmed up)" if plan.ema.warmup else ""
        saved = ", saved beside the weights" if plan.ema.save == "both" else ""
        lines.append(
            f"  ema, decay {number(plan.ema.decay)}{rise}, every {every}, on {place}{saved}"
        )
    return lines + _schedule(plan, verbose)


def _levels(objective: Objective) -> str:
    """Density, shift and range of the noise levels."""
    words: str = objective.sampling
    if objective.sampling == "beta":
        words += f" ({number(objective.alpha)}, {number(objective.beta)})"
    by_size = objective.shift_by_size is not None
    if objective.table is not None:
        table = objective.table.schedule.replace("_", " ")
        words += f" over {table} betas" + ", to pure noise" * objective.table.zero_terminal_snr
    else:
        words += ", shift by resolution" if by_size else f", shift {number(objective.shift)}"
    if (objective.min_sigma, objective.max_sigma) != (0.0, 1.0):
        words += f", {_range(objective)}"
    return words + (", stratified" if objective.stratified else "")


def _range(objective: Objective) -> str:
    """The noise levels that are trained: sigma of a flow, timesteps of a table."""
    inside = trained_entries(objective, 1.0)
    if objective.table is None or inside is None:
        return f"sigma {number(objective.min_sigma)} to {number(objective.max_sigma)}"
    last = entries_of(objective) - 1
    return f"timesteps {last - inside[1]} to {last - inside[0]} of {last + 1}"


def _loss(objective: Objective) -> str:
    if objective.loss == "mse":
        return "mse"
    words = f"{objective.loss} with delta {number(objective.delta)}"
    schedule = objective.delta_schedule
    return words if schedule == "constant" else f"{words} ({schedule} schedule)"


def _schedule(plan: Plan, verbose: bool) -> list[str]:
    schedule = plan.schedule
    peak_rate = number(plan.optimizer.lr)
    words = f"  schedule {schedule.name}"
    if schedule.warmup:
        words += f", {counted(schedule.warmup, 'step')} of warm-up"
    if schedule.cycles > 1:
        words += f", falls {schedule.cycles} times"
    if schedule.name == "constant" and not (verbose and schedule.warmup):
        return [words]
    if schedule.name != "constant":
        words += f", ends at {number(schedule.end * plan.optimizer.lr)}"
    return [words, *draw(schedule, peak_rate)]


def _steps(plan: Plan, verbose: bool, outlook: Outlook | None) -> list[str]:
    encoders = sum(part.name.startswith("text_encoder") for part in plan.model.components)
    prompts = len(plan.validation.prompts)
    present = present_of(outlook)
    texts, latents = (present.texts, present.latents) if present else (None, None)
    told = f"{counted(sum(source.texts for source in plan.sources), 'caption')} of "
    told += counted(images_of(plan), "image")
    told += f", {counted(prompts, 'prompt')}" if prompts else ""
    window = plan.steps.accumulate * plan.steps.ranks
    batch = max(min(b.batch_size, b.samples) for b in plan.buckets) * window
    stages = plan.steps.stages or (plan.steps,)
    epoch = max(stage.samples_per_epoch for stage in stages)  # which no step goes beyond
    train = f"{counted(plan.steps.total, 'step')} of up to {counted(min(batch, epoch), 'sample')}"
    if plan.steps.ranks > 1:
        train += f" on {plan.steps.ranks} devices ({plan.sharing.strategy})"
    told += f", {counted(encoders, 'encoder')}{cached_words(texts)}"
    encoded = counted(images_of(plan), "image")
    encoded += f", up to {plan.vae_batch} at a time" if plan.vae_batch > 1 else ""
    rows = [
        (sign(texts), "cache text", told),
        (sign(latents), "cache latents", encoded + cached_words(latents)),
        ("+", "train", train + train_words(outlook)),
    ]
    if prompts:
        rows.append(("+", "validate", _validation_words(plan)))
    if plan.evaluation:
        rows.append(("+", "evaluate", _evaluation_words(plan.evaluation)))
    rows += [("+", "checkpoint", _checkpoint_words(plan)), ("+", "export", result_folder(plan))]
    lines = columns(
        [(f"{n} {mark} {name}", words) for n, (mark, name, words) in enumerate(rows, 1)]
    )
    lines += resume_lines(plan, outlook)
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
    start = "at 0 and " if validation.at_start else ""
    refined = f", refining {Path(validation.picture).name}" if validation.picture else ""
    drawn = ", not by the average" if validation.weights == "trained" else ""
    return f"{' x '.join(parts)}, {start}{every}{refined}{drawn}"


def _evaluation_words(evaluation: Evaluation) -> str:
    images = counted(sum(group.images for group in evaluation.groups), "held-out image")
    levels = counted(len(evaluation.timesteps), "noise level")
    return f"{images} x {levels}, at 0 and every {counted(evaluation.every, 'step')}"


def _checkpoint_words(plan: Plan) -> str:
    checkpoints = plan.checkpoints
    if not checkpoints.every:
        return "at the end and when stopped"
    words = f"every {counted(checkpoints.every, 'step')}, {_stay(checkpoints)} stay"
    if checkpoints.result == "best":
        words += "; the result is the best"
    return words


def _stay(checkpoints: Checkpoints) -> str:
    """Which checkpoints are kept."""
    if not checkpoints.keep:
        return "all"
    parts = [f"the newest {checkpoints.keep}"]
    if checkpoints.keep_every:
        parts.append(f"each {checkpoints.keep_every:,}th step's")
    if checkpoints.best:
        parts.append(f"the best by {checkpoints.best}")
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _told(plan: Plan, recipe: str) -> list[str]:
    """Who is told of the run, and what is published."""
    lines = []
    if plan.track:
        services = any(TRACKERS[name].service for name in plan.track)
        words = ", ".join(plan.track) + (f" (project {plan.track_project})" if services else "")
        lines += section("track", words, where(plan, "track.to", recipe))
    rules = plan.publish
    if rules and rules.hub:
        what = "the result and each checkpoint" if rules.checkpoints else "the result"
        kind = "private" if rules.private else "public"
        words = f"{what}, to {rules.hub} on the hub ({kind} if it is new)"
        lines += section("publish", words, where(plan, "publish.hub", recipe))
    if rules and rules.webhook:
        host = urlsplit(rules.webhook).hostname or ""
        words = f"{host} is told of beginning and end"
        lines += section("webhook", words, where(plan, "publish.webhook", recipe))
    return lines


def _closing(plan: Plan) -> list[str]:
    validation = plan.validation
    pictures = len(validation.prompts) * len(validation.sizes) * len(validation.seeds)
    parts = [
        f"cache {counted(images_of(plan), 'image')}",
        f"train {counted(plan.steps.total, 'step')}",
        f"draw {counted(pictures * len(validation_steps(plan)), 'picture')}",
    ]
    if plan.publish and plan.publish.hub:
        parts.append(f"publish to {plan.publish.hub}")
    return wrapped(f"Plan: {', '.join(parts)} ({plan.digest[:12]})", "", "  ")


def _decorate(line: str, style: Callable[[str, str], str]) -> str:
    if line.startswith("Plan:"):
        return style("heading", line)
    if line.startswith("  ~ "):
        return "  " + style("changed", "~") + line[3:]
    step = re.match(r"  (\d+ )?[+=] (?=[a-z])", line)
    if step:
        mark = line[step.end() - 2]
        role = "made" if mark == "+" else "quiet"
        return line[: step.end() - 2] + style(role, mark) + line[step.end() - 1 :]
    if line.startswith("note:"):
        return style("quiet", line)
    name = re.match(r"[a-z][a-z ]*?(?=  |$)", line)
    return style("heading", name[0]) + line[name.end() :] if name else line
