"""The memory model: every phase of a run on meta tensors, by the runtime's own code.

A transformer's equal blocks are not all simulated: see `runtime.memory.curve.deeper`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from attrs import evolve

from compiler import plan
from compiler.memory import Candidate, Simulation
from runtime.families import family_of
from runtime.families.common import import_classes
from runtime.memory import host, phases
from runtime.memory.attention import COUNTERS, workspace
from runtime.memory.beside import beside
from runtime.memory.curve import Curve, NotAlike, affine, deeper
from runtime.memory.meta import MetaKernels
from runtime.memory.pretend import Dequantised, as_on, remembering
from runtime.memory.shallow import Shallow, shallow
from runtime.memory.sharing import shared_parts
from runtime.memory.step import META, Course, Form, kind_of, run_step, run_update, worst
from runtime.memory.tracker import Tracker, rounded

# What a process holds on a CUDA device besides tensors. The context with its loaded kernels is
# outside of PyTorch's count ("some context needs to be created on GPU", documentation of
# torch.cuda.memory_allocated); 0.4 to 0.6 GB with lazy module loading, here the middle.
CUDA_CONTEXT = 500_000_000
# cuBLAS: 2 x 4 MiB + 8 x 16 KiB (CUBLAS_WORKSPACE_CONFIG ":4096:2:16:8", PyTorch's default before
# compute capability 9.0; 32 MiB from there on), taken through PyTorch's allocator.
CUBLAS_WORKSPACE = rounded((2 * 4096 + 8 * 16) * 1024)

Shape = tuple[int, int, int]  # width, height, batch size
Phases = Mapping[str, Mapping[str, int]]


class RuntimeMemoryModel:
    """Implements `compiler.memory.MemoryModel`. One instance serves many candidates."""

    def __init__(self) -> None:
        self._kernels: dict[str, MetaKernels] = {}
        self._encoded: dict[str, Phases] = {}
        self._courses: dict[str, Course] = {}
        self._dequantised: dict[Any, Dequantised] = {}

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`. Counts the worst of the candidate's buckets."""
        start = time.perf_counter()
        import_classes(candidate.model)
        with self._encoding(candidate) as encoding:
            found = self._worst(candidate)
            encoded = encoding()
        parts: Phases = {
            **encoded,
            **shared_parts(candidate, found),
        }
        context = constants(candidate.device)
        waiting = host.bytes_of(candidate, found) | host.encoding(candidate, encoded)
        return Simulation(
            phases=tuple(
                _phase(name, of, context, waiting.get(name, 0)) for name, of in parts.items()
            ),
            parameters=found.parameters,
            trainable=found.trainable,
            adapted_modules=found.adapted_modules,
            flops=found.flops,
            seconds=time.perf_counter() - start,
        )

    def course(self, candidate: Candidate, shape: Shape) -> Course:
        """One bucket on meta tensors; the course of a deep model from those of shallow ones."""
        depths = shallow(candidate)
        if depths is not None:
            try:
                return self._deep(candidate, depths, shape)
            except NotAlike:
                pass  # simulated whole, which is always right
        return self.whole(candidate, shape)

    def whole(self, candidate: Candidate, shape: Shape) -> Course:
        """One bucket on meta tensors, with every block of the model."""
        tracker, kernels = self.tracker(candidate.device), self._of(candidate.device)
        with as_on(candidate.device), remembering(tracker, self._dequantised):
            return run_step(candidate, shape, META, tracker, lambda: kernels.flops)

    def _worst(self, candidate: Candidate) -> Course:
        """The course of the bucket that needs most. Many of a ladder's rungs have it in common."""
        components = [c for c in candidate.model.components if _in_step(candidate, c.name)]
        key = repr((components, _stepped(candidate)))
        if key not in self._courses:
            courses = [self.course(candidate, shape) for shape in worst(candidate.shapes)]
            self._courses[key] = max(courses, key=lambda course: course.peak)
        return self._courses[key]

    def _deep(self, candidate: Candidate, depths: Shallow, shape: Shape) -> Course:
        with ExitStack() as others:
            waiting = [
                (others.enter_context(beside(partial(self.whole, one, shape))), periods)
                for one, periods in depths.longer
            ]
            base = self.whole(depths.base, shape)
            longer = [(course(), periods) for course, periods in waiting]
        after = affine(base.after, [(each.after, n) for each, n in longer])
        numbers = affine(_numbers(base), [(_numbers(each), n) for each, n in longer])
        forms = _forms(base, longer)
        with as_on(candidate.device):
            updating = run_update(
                candidate, forms, base.idle, after, self.tracker(candidate.device)
            )
        return Course(
            load=affine(base.load, [(each.load, n) for each, n in longer]),
            window=_deeper(base.window, [(each.window, n) for each, n in longer], depths.together),
            after=after,
            update=updating,
            save=affine(base.save, [(each.save, n) for each, n in longer]),
            evaluate=_deeper(
                base.evaluate, [(each.evaluate, n) for each, n in longer], depths.together
            ),
            validate=_deeper(
                base.validate, [(each.validate, n) for each, n in longer], depths.together
            ),
            forms=forms,
            idle=base.idle,
            block_numbers=affine(
                base.block_numbers, [(each.block_numbers, n) for each, n in longer]
            ),
            **numbers,
        )

    @contextmanager
    def _encoding(self, candidate: Candidate) -> Iterator[Callable[[], Phases]]:
        """The phases before training, which most candidates of a ladder have in common; inside,
        they are simulated beside what is simulated here."""
        parts = [c for c in candidate.model.components if not _in_step(candidate, c.name)]
        configs = {part.name: candidate.model.configs.get(part.name) for part in parts}
        sizes = tuple((width, height) for width, height, _ in candidate.shapes)
        key = repr((parts, configs, candidate.text, sizes, candidate.device))
        if key in self._encoded:
            yield lambda: self._encoded[key]
            return
        with beside(partial(self._encode, candidate, sizes)) as encode:
            yield lambda: self._encoded.setdefault(key, encode())

    def _encode(self, candidate: Candidate, sizes: tuple[tuple[int, int], ...]) -> Phases:
        family = family_of(candidate.model.family)
        found: dict[str, Mapping[str, int]] = {}
        with as_on(candidate.device):
            for name in family.card.text_encoders:
                tracker = self.tracker(candidate.device)
                found[name] = phases.run_text(candidate, family, name, META, tracker)
            pictures = []
            for size in phases.largest(sizes):
                tracker = self.tracker(candidate.device)
                pictures.append(phases.run_latents(candidate, family, size, META, tracker))
        found["latents"] = max(pictures, key=lambda parts: sum(parts.values()))
        return found

    def tracker(self, device: str) -> Tracker:
        """A new one for meta tensors that stand for tensors on `device`."""
        # Optimizers keep step counters on the host: on the device only where that is the host.
        devices = {"meta", "cpu"} if device == "cpu" else {"meta"}
        return Tracker(devices, self._of(device), workspace(device))

    def _of(self, device: str) -> MetaKernels:
        return self._kernels.setdefault(device, MetaKernels(COUNTERS, device))


def _in_step(candidate: Candidate, name: str) -> bool:
    return name == candidate.model.trained_component


def _stepped(candidate: Candidate) -> object:
    """What a step depends on besides the trained component's quantisation."""
    model = candidate.model
    vae = next(((c.dtype, c.tiling) for c in model.components if c.name == "vae"), None)
    return evolve(candidate, model=evolve(model, components=())), vae


def _numbers(course: Course) -> dict[str, int]:
    names = ("host", "flops", "parameters", "adapted_modules", "largest")
    return {name: getattr(course, name) for name in names}


def _forms(base: Course, longer: Sequence[tuple[Course, int]]) -> list[Form]:
    """Parameters of the deep model: their shapes, under names that tell whose they are."""
    numbers = Counter(map(kind_of, base.forms))
    counts = dict(numbers)
    for each, periods in longer:
        more = Counter(map(kind_of, each.forms))
        for shape in counts.keys() | more.keys():
            added = periods * (more[shape] - numbers[shape])
            counts[shape] = counts.get(shape, 0) + added
    return [
        (f"{owner}.{size}-{number}", size, dtype)
        for (owner, size, dtype), count in counts.items()
        for number in range(count)
    ]


def _deeper(
    base: Sequence[Curve], longer: Sequence[tuple[Sequence[Curve], int]], together: bool
) -> Sequence[Curve]:
    return [
        deeper(curve, [(each[index], periods) for each, periods in longer], together)
        for index, curve in enumerate(base)
    ]


def constants(device: str) -> int:
    """Bytes on `device` that belong to no tensor."""
    return rounded(CUDA_CONTEXT) + CUBLAS_WORKSPACE if device == "cuda" else 0


def _phase(name: str, parts: Mapping[str, int], context: int, host: int) -> plan.Phase:
    """Parts from the largest down; "context" always last and only where there is one."""
    ordered = dict(sorted(parts.items(), key=lambda part: -part[1]))
    if context:
        ordered["context"] = context
    return plan.Phase(name=name, device_bytes=sum(ordered.values()), host_bytes=host, parts=ordered)
