"""Buckets to batches to steps, exactly. A step is one optimizer update."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

from compiler.data.counts import bucket_rows, samples_per_epoch
from compiler.data.geometry import edge_of
from compiler.data.manifest import Manifest
from compiler.data.stages import Gap, Span, epochs_begun, last_step, stages_of
from compiler.draft import Draft
from compiler.plan import DataSource, Stage, Steps
from compiler.spans import KeyPath
from compiler.units import Interval

SIZE: KeyPath = ("train", "batch_size")
DEVICES: KeyPath = ("launch", "devices")
TOGETHER: KeyPath = ("cache", "batch")


def resolve_batches(draft: Draft) -> None:
    """Fill in `draft.buckets` and `draft.steps`."""
    ranks = _ranks(draft)
    if not _one_length(draft) or draft.manifest is None:
        return
    train = draft.recipe.train
    sizes = _batch_sizes(draft)
    draft.decide(("train", "accumulate"), train.accumulate)
    if sizes is None or not _batch_fits(draft, sizes):
        return
    draft.batch_sizes = tuple(sizes)
    draft.buckets = bucket_rows(draft.manifest, draft.sources, sizes)
    spans = {source.id: _span(source) for source in draft.sources if source.images}
    try:
        every = stages_of(
            draft.buckets,
            spans,
            ranks * train.accumulate,
            epochs=train.epochs,
            total=train.steps,
        )
    except Gap as gap:
        _report_gap(draft, gap)
        return
    if not _all_train(draft, every):
        return
    first, last = every[0], every[-1]
    total = last_step(last, train.epochs or 0) if train.steps is None else train.steps
    if not _all_leave(draft, last, total):
        return
    draft.steps = Steps(
        total=total,
        per_epoch=first.per_epoch,
        epochs=epochs_begun(last, total),
        batches_per_epoch=first.batches_per_epoch,
        samples_per_epoch=first.samples_per_epoch,
        accumulate=train.accumulate,
        ranks=ranks,
        stages=every if any(s.first or s.until for s in draft.sources) else (),
    )
    key = "steps" if train.steps is not None else "epochs"
    draft.decide(("train", key), train.steps if key == "steps" else train.epochs)
    _encoded_together(draft, draft.manifest)
    _small_buckets(draft)
    _idle_devices(draft, draft.steps)
    _long_window(draft, draft.steps)


def _encoded_together(draft: Draft, manifest: Manifest) -> None:
    """What is said of the pictures that the VAE encodes at a time."""
    asked = draft.recipe.cache.batch
    draft.decide(TOGETHER, asked, why="a latent then depends on its picture alone")
    parts = [manifest, *([manifest.held_out] if manifest.held_out else [])]
    most = max(len(members.samples) for part in parts for members in part.buckets)
    if asked > 1 == most:
        draft.warn(
            "no-effect",
            TOGETHER,
            "no bucket has two pictures: each is encoded alone",
            help="leave `batch` out",
        )


def _report_gap(draft: Draft, gap: Gap) -> None:
    """Blame the first `from` of the recipe where nothing trains at the start, else the last
    `until`."""
    recipes = draft.recipe.data.source
    joining = [number for number, recipe in enumerate(recipes) if recipe.start is not None]
    leaving = [number for number, recipe in enumerate(recipes) if recipe.until is not None]
    where: KeyPath = ("data", "source")
    if gap.epoch == 0 and joining:
        where, help = (*where, joining[0], "from"), "leave `from` out of one of the sources"
    elif gap.epoch == 0:
        help = "leave `until` out of one of the sources"
    else:
        help = f"let one go on longer, or let the run end there: epochs = {gap.epoch}"
    if len(where) == 2 and leaving:
        where = (*where, leaving[-1], "until")
    draft.error(
        "conflict",
        where,
        f"no source trains in epoch {gap.epoch + 1}, and the run goes on",
        help=help,
    )


def _all_leave(draft: Draft, last: Stage, total: int) -> bool:
    """Refuse an `until` within the last epoch of `total` steps: none begins at which a source could
    leave. One that the run does not reach is none."""
    end = last.first_epoch + Fraction(total - last.first_step, last.per_epoch)
    for source in draft.sources:
        until = _span(source).until
        if until is None or source.id not in last.sources:
            continue
        if (until.steps or 0) < total if until.epochs is None else until.epochs < end:
            draft.error(
                "no-effect",
                ("data", "source", _entry(draft, source), "until"),
                f"source `{source.id}` never leaves: no epoch begins between that and the run's "
                "end",
                help="sources join and leave only where an epoch begins",
            )
            return False
    return True


def _entry(draft: Draft, source: DataSource) -> int:
    """The number of an entry of the recipe that says of `source` when it trains."""
    return next(
        number
        for number, recipe in enumerate(draft.recipe.data.source)
        if (str(recipe.start or ""), str(recipe.until or "")) == (source.first, source.until)
    )


def _span(source: DataSource) -> Span:
    return Span(
        first=Interval.parse(source.first) if source.first else None,
        until=Interval.parse(source.until) if source.until else None,
    )


def _all_train(draft: Draft, every: Sequence[Stage]) -> bool:
    """Refuse a source that no epoch of the run takes."""
    ever = {name for stage in every for name in stage.sources}
    idle = [source for source in draft.sources if source.images and source.id not in ever]
    for source in idle:
        key = "from" if source.first else "until"
        draft.error(
            "no-effect",
            ("data", "source", _entry(draft, source), key),
            f"source `{source.id}` never trains: it joins and leaves between two epochs, or the "
            "run ends before",
            help="sources join and leave only where an epoch begins",
        )
    return not idle


def _ranks(draft: Draft) -> int:
    launch = draft.recipe.launch
    ranks = 1 if launch.devices == "auto" else launch.devices
    draft.decide(DEVICES, ranks, by="decided", why="one device, unless the recipe asks for more")
    if ranks > 1 and draft.device == "mps":
        draft.error("conflict", DEVICES, f"a machine has one mps device, not {ranks}")
    return ranks


def _batch_sizes(draft: Draft) -> list[int] | None:
    """The batch size of each source: one for all, or by its resolution in pixels."""
    asked = draft.recipe.train.batch_size
    if isinstance(asked, int):
        draft.decide(SIZE, asked)
        return [asked] * len(draft.sources)
    edges = [_pixels(source) for source in draft.sources]
    missing = sorted(set(edges) - set(asked))
    if missing and any(fault.path.startswith("train.batch_size") for fault in draft.diagnostics):
        return None  # the entry is there, but wrong
    if missing:
        rows = ", ".join(f"{edge} = 1" for edge in missing)
        names = ", ".join(str(edge) for edge in missing)
        draft.error(
            "missing-key",
            SIZE,
            f"`batch_size` has no entry for resolution {names}",
            help=f"add {rows}; keys are the resolutions of the sources in pixels",
        )
        return None
    for edge in sorted(set(asked) - set(edges)):
        draft.error(
            "no-effect",
            (*SIZE, str(edge)),
            f"no source has a resolution of {edge} pixels",
            help="the sources have " + ", ".join(str(one) for one in sorted(set(edges))),
            of="key",
        )
    for edge, size in asked.items():
        draft.decide((*SIZE, str(edge)), size)
    return [asked[edge] for edge in edges]


def _pixels(source: DataSource) -> int:
    """A source's resolution in whole pixels, by which batch sizes are told apart."""
    return round(edge_of(source.geometry))


def _one_length(draft: Draft) -> bool:
    train = draft.recipe.train
    if train.epochs is not None and train.steps is not None:
        draft.error(
            "conflict",
            ("train", "steps"),
            "both `epochs` and `steps` are given",
            label=f"`epochs = {train.epochs}` is given too",
            help="leave one of them out",
            of="key",
        )
        return False
    if train.epochs is None and train.steps is None:
        draft.error(
            "missing-key",
            ("train",),
            "[train] needs `epochs` or `steps`",
            help="epochs = 10",
            of="table",
        )
        return False
    return True


def _batch_fits(draft: Draft, sizes: list[int]) -> bool:
    """A batch size that no source can fill is a mistake. A source that can't fill one, beside one
    that can, trains in short batches, and so does a bucket."""
    held: dict[KeyPath, list[tuple[int, int, int]]] = {}  # samples, number and size of each source
    for number, (source, size) in enumerate(zip(draft.sources, sizes, strict=True)):
        if not source.images:  # nothing of it is trained
            continue
        samples = samples_per_epoch(source.images, source.repeats)
        held.setdefault(_place_of_size(draft, source), []).append((samples, -number, size))
    fits = True
    for place, found in held.items():
        samples, number, size = max(found)
        if size > samples:
            fits = False
            _unfilled(draft, place, -number, size, samples, len(found))
    return fits


def _unfilled(
    draft: Draft, place: KeyPath, number: int, size: int, samples: int, others: int
) -> None:
    """Refuse a batch of `size` where the largest source it holds for has only `samples`."""
    source = draft.sources[number]
    which = (
        f"source `{source.id}`" if others == 1 else f"every source; the largest is `{source.id}`"
    )
    draft.error(
        "batch-too-large",
        place,
        f"a batch of {size} is larger than {which}: "
        f"{source.images} image{'s' * (source.images != 1)} x {source.repeats} = "
        f"{samples} samples an epoch",
        help=f"{place[-1]} = {samples}, or repeats = {ceil(size / source.images)} in "
        f"[[data.source]] entry {number + 1}",
    )


def _place_of_size(draft: Draft, source: DataSource) -> KeyPath:
    places = ((*SIZE, str(_pixels(source))), SIZE)
    return next((place for place in places if draft.given(place)), SIZE)


def _small_buckets(draft: Draft) -> None:
    short = [bucket for bucket in draft.buckets if bucket.samples < bucket.batch_size]
    if short:
        several = len(draft.sources) > 1
        sizes = ", ".join(
            f"{bucket.width}x{bucket.height}{f' of `{bucket.source}`' * several}"
            for bucket in short[:4]
        )
        more = f" and {len(short) - 4} more" if len(short) > 4 else ""
        draft.warn(
            "small-buckets",
            ("data", "source"),
            f"{len(short)} of {len(draft.buckets)} buckets never fill a batch ({sizes}{more})",
            help="they are trained short and weighted by their samples; nothing is dropped",
        )


def _long_window(draft: Draft, steps: Steps) -> None:
    """A window of accumulation ends with its epoch, so none is ever longer."""
    batches = max([stage.batches_per_epoch for stage in steps.stages] or [steps.batches_per_epoch])
    most = max(ceil(batches / steps.ranks), 1)
    if steps.accumulate > most:
        draft.warn(
            "no-effect",
            ("train", "accumulate"),
            f"no update ever takes {steps.accumulate} batches: an epoch has {most} on a device, "
            "and a window ends with its epoch",
            help=f"accumulate = {most}, or more repeats",
        )


def _idle_devices(draft: Draft, steps: Steps) -> None:
    """With fewer batches in an epoch than devices, some of them never have any work."""
    if steps.batches_per_epoch < steps.ranks:
        draft.warn(
            "idle-devices",
            DEVICES,
            f"an epoch has fewer batches ({steps.batches_per_epoch}) than there are devices "
            f"({steps.ranks}): some never have any work",
            help="say fewer devices, smaller batches or more repeats",
        )
