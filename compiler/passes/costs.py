"""Whether the disks hold what a run writes. Runs last, over the finished plan."""

from __future__ import annotations

from bisect import bisect_right

from attrs import evolve

from compiler import costs
from compiler.costs import Hidden, Outlook, Skipped
from compiler.draft import Draft
from compiler.keeping import at_once, waiting
from compiler.memory import gib
from compiler.plan import Plan
from compiler.site import Present, Space

SPACE_CODE = "disk-full"


def judge_costs(draft: Draft, plan: Plan) -> Outlook:
    """What `plan` costs; a disk that is too small is an error, one that may be is a warning."""
    assert draft.manifest is not None
    site = draft.site() if callable(draft.site) else draft.site
    found = costs.outlook(plan, draft.manifest, draft.machine, site)
    hidden = [Hidden(source=name, count=n, names=names) for name, n, names in draft.hidden]
    found = evolve(found, skipped=_skipped(draft), hidden=tuple(hidden))
    if site is None:
        return found
    run, cache = site.space(plan.run_folder), site.space(plan.cache_folder)
    if run is not None and cache is not None and run.disk == cache.disk:
        _judge_both(draft, plan, found, run)
    else:
        _judge_run(draft, plan, found, run)
        _judge_cache(draft, plan, found, cache)
    return found


def _skipped(draft: Draft) -> tuple[Skipped, ...]:
    names = [source.id for source in draft.sources]
    rows = [Skipped(source=names[n], images=len(left), why=why) for n, left, why in draft.skips]
    return tuple(rows)


def to_write(found: Outlook) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes still to be written, as (at least, at most): in the run folder, in the cache."""
    disk, present = found.disk, found.present
    assert present is not None
    run = (disk.checkpoint_bytes or 0) + (disk.result_bytes or 0) - present.run_bytes
    if present.resume is not None and present.resume.finished:
        run = 0
    return (max(run, 0), max(run, 0) + disk.pictures_bytes), _cache_bytes(found, present)


def _cache_bytes(found: Outlook, present: Present) -> tuple[int, int]:
    """At least: the latents that are known to be missing. Embeddings are an upper bound."""

    def share(total: int, part: int) -> float:
        return part / total if total else 0.0

    latents, texts, disk = present.latents, present.texts, found.disk
    least = disk.latents_bytes * share(latents.total, latents.missing)
    most = disk.latents_bytes * share(latents.total, latents.total - latents.cached)
    most += disk.texts_bytes * share(texts.total, texts.total - texts.cached)
    return round(least), round(most)


def _judge_both(draft: Draft, plan: Plan, found: Outlook, space: Space) -> None:
    """Run folder and cache are on one disk: they must fit together."""
    run, cache = to_write(found)
    least, most = run[0] + cache[0], run[1] + cache[1]
    words = (
        f"the run writes {{}}: {gib(run[0])} of checkpoints and result, {gib(cache[1])} of cache"
    )
    if run[0] >= cache[0]:
        _say(draft, space, least, most, words, _place_of_run(draft), _fewer(plan, found, space))
    else:
        _say(draft, space, least, most, words, _place_of_cache(draft), ELSEWHERE)


def _judge_run(draft: Draft, plan: Plan, found: Outlook, space: Space | None) -> None:
    least, most = to_write(found)[0]
    words = "the run folder needs {} for checkpoints, result and pictures"
    _say(draft, space, least, most, words, _place_of_run(draft), _fewer(plan, found, space))


def _judge_cache(draft: Draft, plan: Plan, found: Outlook, space: Space | None) -> None:
    least, most = to_write(found)[1]
    words = "the cache needs up to {} for latents and embeddings"
    _say(draft, space, least, most, words, _place_of_cache(draft), ELSEWHERE)


ELSEWHERE = "put the cache on a larger disk: [cache] path"


def _say(
    draft: Draft,
    space: Space | None,
    least: int,
    most: int,
    words: str,
    place: tuple[str, ...],
    help: str,
) -> None:
    if space is None or most <= space.free_bytes:
        return
    # Else the run will be on another machine.
    here = draft.machine.here and draft.device in ("cpu", draft.machine.device)
    sure = here and least > space.free_bytes
    draft.report(
        "error" if sure else "warning",
        SPACE_CODE,
        place,
        f"{words.format(gib(least if sure else most))}; {gib(space.free_bytes)} are free",
        help=help,
    )


def _fewer(plan: Plan, found: Outlook, space: Space | None) -> str:
    """The most checkpoints that fit, or another disk."""
    disk = found.disk
    elsewhere = "free some space, or write to a larger disk: output"
    if space is None or not disk.one_checkpoint_bytes or found.present is None:
        return elsewhere
    room = space.free_bytes + found.present.run_bytes - (disk.result_bytes or 0)
    most = range(1, plan.checkpoints.keep or disk.checkpoints)
    rules, total = plan.checkpoints, plan.steps.total
    keep = bisect_right(
        most,
        room // disk.one_checkpoint_bytes,
        key=lambda keep: at_once(evolve(rules, keep=keep), total, waiting(plan)),
    )
    if not keep:
        return elsewhere
    return f"`keep = {keep}` in [checkpoints] fits; or write to a larger disk: output"


def _place_of_run(draft: Draft) -> tuple[str, ...]:
    places = (("checkpoints", "keep"), ("checkpoints", "every"), ("output",))
    return next((place for place in places if draft.given(place)), ("name",))


def _place_of_cache(draft: Draft) -> tuple[str, ...]:
    return ("cache", "path") if draft.given(("cache", "path")) else ("data", "source")
