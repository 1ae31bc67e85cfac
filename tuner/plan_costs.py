"""The plan's costs as words: steps with what is there already, disk and time."""

from __future__ import annotations

from compiler.costs import Outlook
from compiler.occasions import validation_steps
from compiler.plan import Plan
from compiler.site import Counted, Present, Resume
from tuner.formats import duration, size
from tuner.layout import section, wrapped

REUSE, MAKE = "=", "+"


def sign(found: Counted | None) -> str:
    """`=` where all of a cache is there, else `+`."""
    return REUSE if found is not None and found.total == found.cached else MAKE


def cached_words(found: Counted | None) -> str:
    """What of a cache is there; nothing where nobody looked, or nothing is cached."""
    if found is None or not found.total:
        return ""
    if found.cached == found.total:
        return ", all cached"
    parts = [f"{found.cached:,} cached"] * (found.cached > 0)
    parts += [f"{found.unknown:,} unknown yet"] * (found.unknown > 0)
    return "".join(f", {part}" for part in parts)


def present_of(outlook: Outlook | None) -> Present | None:
    """What is there already, if someone looked."""
    return outlook.present if outlook else None


def train_words(outlook: Outlook | None) -> str:
    """How long training takes, to stand behind the steps."""
    found = outlook.duration if outlook else None
    return f", about {duration(found.train_seconds)}" if found else ""


def resume_lines(plan: Plan, outlook: Outlook | None) -> list[str]:
    """What the run folder would be gone on from; nothing where no run has begun."""
    present = present_of(outlook)
    if present is None or present.resume is None:
        return []
    words = resume_words(plan, present.resume)
    left = outlook.left_seconds if outlook else None
    if left and present.resume.step:
        words += f", about {duration(left)} left"
    return wrapped(words, f"  {REUSE} ", "    ")


def resume_words(plan: Plan, found: Resume) -> str:
    """A begun run in a sentence."""
    if found.problem:
        return f"begun here: {found.problem}"
    if found.changes:
        keys = ", ".join(key for key, _, _ in found.changes[:4])
        more = f" and {len(found.changes) - 4} more" if len(found.changes) > 4 else ""
        return f"begun here with another plan ({keys}{more}): `tuner run` will refuse"
    if found.finished:
        return "finished here: `tuner run` has nothing to do"
    if not found.step:
        return "begun here, without a checkpoint: it starts over"
    return f"begun here: goes on from step {found.step:,} of {plan.steps.total:,}"


def cost_lines(plan: Plan, outlook: Outlook | None, *, verbose: bool) -> list[str]:
    """The sections `disk` and `time`."""
    if outlook is None:
        return []
    return _disk(outlook, verbose=verbose) + _time(plan, outlook, verbose=verbose)


def _disk(outlook: Outlook, *, verbose: bool) -> list[str]:
    disk = outlook.disk
    parts = [f"cache {size(disk.cache_bytes)}"]
    if disk.checkpoint_bytes is not None and disk.one_checkpoint_bytes is not None:
        one = size(disk.one_checkpoint_bytes)
        parts.append(f"checkpoints {disk.checkpoints} x {one}")
    if disk.result_bytes is not None:
        parts.append(f"result {size(disk.result_bytes)}")
    words = ", ".join(parts)
    if disk.free_bytes is not None:
        words += f"; {size(disk.free_bytes)} free"
        if disk.cache_free_bytes not in (None, disk.free_bytes):
            words += f", {size(disk.cache_free_bytes or 0)} for the cache"
    lines = section("disk", words)
    if verbose:
        shares = f"latents {size(disk.latents_bytes)}, embeddings at most {size(disk.texts_bytes)}"
        lines += wrapped(f"{shares}, pictures at most {size(disk.pictures_bytes)}", "  ", "    ")
    return lines


def _time(plan: Plan, outlook: Outlook, *, verbose: bool) -> list[str]:
    found = outlook.duration
    if found is None:
        return section("time", f"not estimated: {outlook.unknown}")
    whole = found.train_seconds + found.validate_seconds
    words = f"about {duration(whole)}: {duration(found.seconds_per_step)} a step"
    if found.validate_seconds:
        drawn = bool(plan.validation.prompts and validation_steps(plan))
        what = ["pictures"] * drawn + ["evaluation"] * (plan.evaluation is not None)
        words += f", {duration(found.validate_seconds)} for {' and '.join(what)}"
    words += "; caching and loading not counted"
    lines = section("time", f"{words} ({found.why})")
    if verbose:
        rate = found.flops_per_second / 1e12
        lines += wrapped(f"at {rate:.3g} TFLOP/s", "  ", "    ")
    return lines
