"""The memory model: runs the training step on meta tensors and counts.

What runs is the runtime's own: `build`, `make_optimizer`, `micro_step`, `update`, `Ema`. The step
that is counted is one in the middle of a run, when the optimizer's state exists.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from attrs import frozen
from torch import Tensor

from compiler import plan
from compiler.memory import Candidate, Simulation
from runtime.batch import Batch
from runtime.build import Built, build
from runtime.ema import Ema
from runtime.families import family_of
from runtime.families.base import Family
from runtime.memory.attention import COUNTERS, workspace
from runtime.memory.meta import MetaKernels
from runtime.memory.pretend import as_on
from runtime.memory.tracker import Tracker, rounded
from runtime.optimizers import make_optimizer
from runtime.step import gradient_norm, micro_step, update

META = torch.device("meta")
NEAR = 0.8  # buckets with fewer pixels a batch than this share of the most are never the worst
WINDOW = 2  # micro-batches to run of a longer accumulation window: the rest repeat the second

# What a process holds on a CUDA device besides tensors. The context with its loaded kernels is
# outside of PyTorch's count ("some context needs to be created on GPU", documentation of
# torch.cuda.memory_allocated); 0.4 to 0.6 GB with lazy module loading, here the middle.
CUDA_CONTEXT = 500_000_000
# cuBLAS: 2 x 4 MiB + 8 x 16 KiB (CUBLAS_WORKSPACE_CONFIG ":4096:2:16:8", PyTorch's default before
# compute capability 9.0; 32 MiB from there on), taken through PyTorch's allocator.
CUBLAS_WORKSPACE = rounded((2 * 4096 + 8 * 16) * 1024)


@frozen(kw_only=True)
class Trace:
    """One bucket's step. `load` and `train` are bytes by category; `train` is at the peak."""

    load: Mapping[str, int]
    train: Mapping[str, int]
    peak: int  # sum of `train`
    flops: int  # of one forward and backward pass, recomputation included; 0 where not counted
    built: Built


class RuntimeMemoryModel:
    """Implements `compiler.memory.MemoryModel`. One instance serves many candidates."""

    def __init__(self) -> None:
        self._kernels: dict[str, MetaKernels] = {}

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`. Counts the worst of the candidate's buckets."""
        start = time.perf_counter()
        traces = [self.trace(candidate, shape) for shape in worst(candidate.shapes)]
        found = max(traces, key=lambda trace: trace.peak)
        context = constants(candidate.device)
        return Simulation(
            phases=(
                _phase("load", found.load, context, host=_read(candidate, found)),
                _phase("train", found.train, context, host=0),
            ),
            parameters=found.built.parameters,
            trainable=sum(p.numel() for p in found.built.trainable.values()),
            adapted_modules=found.built.adapted_modules,
            flops=found.flops,
            seconds=time.perf_counter() - start,
        )

    def trace(self, candidate: Candidate, shape: tuple[int, int, int]) -> Trace:
        """One bucket, (width, height, batch size), on meta tensors."""
        device = candidate.device
        kernels = self._kernels.setdefault(device, MetaKernels(COUNTERS, device))
        # Optimizers keep step counters on the host: on the device only where that is the host.
        devices = {"meta", "cpu"} if device == "cpu" else {"meta"}
        tracker = Tracker(devices, kernels, workspace(device))
        with as_on(device):
            return run_step(candidate, shape, META, tracker, lambda: kernels.flops)


def worst(shapes: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Those of the buckets (width, height, batch size) that may need the most memory.

    More pixels or a larger batch never need less, so what is no more than another in both is out.
    """
    sizes = {(width * height, batch): (width, height, batch) for width, height, batch in shapes}
    most = max(pixels * batch for pixels, batch in sizes)
    return [
        shape
        for (pixels, batch), shape in sorted(sizes.items(), reverse=True)
        if pixels * batch >= NEAR * most
        and not any(p >= pixels and b >= batch and (p, b) != (pixels, batch) for p, b in sizes)
    ]


def constants(device: str) -> int:
    """Bytes on `device` that belong to no tensor."""
    return rounded(CUDA_CONTEXT) + CUBLAS_WORKSPACE if device == "cuda" else 0


def run_step(
    candidate: Candidate,
    shape: tuple[int, int, int],
    device: torch.device,
    tracker: Tracker,
    flops: Callable[[], int] = lambda: 0,
) -> Trace:
    """Build, prime and run one window of the bucket `shape` under `tracker`.

    `device` is "meta", or a real one for tests. `flops` reads a counter.
    """
    family = family_of(candidate.model.family)
    width, height, batch_size = shape
    with tracker, _collector_off():
        built = _build(candidate, family, device)
        _name_model(tracker, built, candidate.adapter is not None)
        load = tracker.categories()
        optimizer = _prime(candidate, built, tracker)
        ema = _ema(candidate, built, tracker)
        tracker.category = "batch"
        batches = [
            family.example_batch(candidate.model, width, height, batch_size, candidate.text, device)
            for _ in range(candidate.accumulate)
        ]
        tracker.reset_peak()
        start = flops()
        _window(candidate, family, built, optimizer, batches, tracker)
        if ema is not None:
            tracker.category = "workspace"
            ema.update(1)
    parts = tracker.breakdown()
    return Trace(
        load=load,
        train=parts,
        peak=tracker.peak,
        flops=(flops() - start) // min(candidate.accumulate, WINDOW),
        built=built,
    )


def _build(candidate: Candidate, family: Family, device: torch.device) -> Built:
    with device:  # peft would make its layers on the CPU first
        return build(
            candidate.model,
            candidate.adapter,
            candidate.precision,
            candidate.layout,
            family,
            device,
            empty=True,
            seed=0,
        )


@contextmanager
def _collector_off() -> Iterator[None]:
    """Tensors are freed by their reference counts alone, so that the same step counts the same."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _name_model(tracker: Tracker, built: Built, adapted: bool) -> None:
    """The model's tensors and the optimizer's masters are weights, the adapter's by that name."""
    parameters = list(built.model.parameters())
    trained = [*built.trainable.values(), *(p for p in parameters if p.requires_grad)]
    tracker.register([*parameters, *built.model.buffers()], "weights")
    tracker.register(trained, "adapter" if adapted else "weights")


def _prime(candidate: Candidate, built: Built, tracker: Tracker) -> torch.optim.Optimizer:
    """The optimizer after a first update, so that its state exists."""
    tracker.category = "optimizer"
    optimizer = make_optimizer(
        candidate.optimizer, built.trainable.items(), torch.device(candidate.device)
    )
    for parameter in built.trainable.values():
        parameter.grad = torch.zeros_like(parameter)
    update(optimizer, gradient_norm(built.trainable.values()), candidate.max_grad_norm)
    return optimizer


def _ema(candidate: Candidate, built: Built, tracker: Tracker) -> Ema | None:
    if not candidate.ema_on_device:
        return None
    tracker.category = "ema"
    return Ema(plan.Ema(decay=0.999, device="same", every=1), built.trainable.items())


def _window(
    candidate: Candidate,
    family: Family,
    built: Built,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    tracker: Tracker,
) -> None:
    """One optimizer update over `batches`, all on the device from the start, as in the loop."""
    samples = sum(batch.latents.shape[0] for batch in batches)
    losses = []
    for batch in batches[:WINDOW]:
        tracker.category = "activations"
        losses.append(
            micro_step(
                family, built.model, batch, candidate.objective, candidate.precision, samples
            )
        )
        tracker.register(_gradients(built), "gradients")
    tracker.category = "workspace"
    norm = gradient_norm(built.trainable.values())
    update(optimizer, norm, candidate.max_grad_norm)


def _gradients(built: Built) -> Iterator[Tensor]:
    for parameter in (*built.model.parameters(), *built.trainable.values()):
        if parameter.grad is not None:
            yield parameter.grad


def _phase(name: str, parts: Mapping[str, int], context: int, host: int) -> plan.Phase:
    """Parts from the largest down; "context" always last and only where there is one."""
    ordered = dict(sorted(parts.items(), key=lambda part: -part[1]))
    if context:
        ordered["context"] = context
    return plan.Phase(name=name, device_bytes=sum(ordered.values()), host_bytes=host, parts=ordered)


def _read(candidate: Candidate, trace: Trace) -> int:
    """Host bytes while loading: the weights are read there before they go to the device."""
    return 0 if candidate.device == "cpu" else trace.load.get("weights", 0)
