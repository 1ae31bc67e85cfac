"""The memory model: every phase of a run on meta tensors, by the runtime's own code.

A transformer's equal blocks are not all simulated: see `runtime.memory.repeat`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from attrs import evolve

from compiler import plan
from compiler.memory import Candidate, Simulation
from runtime.families import family_of
from runtime.families.base import Family
from runtime.families.common import import_classes
from runtime.memory import attention, convolutions, host, phases
from runtime.memory.beside import beside
from runtime.memory.buckets import of_batch, worst_of
from runtime.memory.constants import constants
from runtime.memory.counters import COUNTERS
from runtime.memory.curve import NotAlike
from runtime.memory.deep import deep_forms, deepened
from runtime.memory.grown import CantGrow, Growth
from runtime.memory.layers import run_few
from runtime.memory.meta import MetaKernels
from runtime.memory.pretend import Dequantised, as_on, remembering, shortened
from runtime.memory.shallow import Shallow, shallow
from runtime.memory.sharing import shared_parts
from runtime.memory.step import META, Course, run_step
from runtime.memory.tracker import Tracker
from runtime.memory.update import Update, depends_on, run_update

Shape = tuple[int, int, int]  # width, height, batch size
Phases = Mapping[str, Mapping[str, int]]


class RuntimeMemoryModel:
    """Implements `compiler.memory.MemoryModel`. One instance serves many candidates."""

    def __init__(self) -> None:
        self._kernels: dict[str, MetaKernels] = {}
        self._encoded: dict[str, Phases] = {}
        self._courses: dict[str, Course] = {}
        self._bases: dict[str, Course] = {}
        self._dequantised: dict[Any, Dequantised] = {}
        self._updates: dict[Hashable, Update] = {}

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
        before = {*family_of(candidate.model.family).card.text_encoders, "latents", "load"}
        fixed = {name: constants(candidate, backward=name not in before) for name in parts}
        waiting = host.bytes_of(candidate, found) | host.encoding(candidate, encoded)
        return Simulation(
            phases=tuple(
                _phase(name, of, fixed[name], waiting.get(name, 0)) for name, of in parts.items()
            ),
            parameters=found.parameters,
            trainable=found.trainable,
            adapted_modules=found.adapted_modules,
            flops=found.flops,
            kernels=found.kernels,
            blocks_waiting=found.parked if candidate.layout.offload_blocks else 0,
            activations_waiting=round(found.filled * (found.host - found.parked)),
            seconds=time.perf_counter() - start,
        )

    def course(self, candidate: Candidate, shape: Shape) -> Course:
        """One bucket on meta tensors; the course of a deep model from that of a shallow one."""
        less = shallow(candidate)
        if less is not None:
            try:
                return self._deep(candidate, less, shape)
            except (NotAlike, ValueError):
                pass  # simulated whole, which is always right, and so is what it says of a fault
        return self.whole(candidate, shape)

    def whole(self, candidate: Candidate, shape: Shape) -> Course:
        """One bucket on meta tensors, with every block of the model."""
        return self._run(candidate, shape)

    def _run(
        self,
        candidate: Candidate,
        shape: Shape,
        asked_for: Collection[int] | None = None,
        rehearsed: bool = False,
        grow: Growth | None = None,
    ) -> Course:
        tracker, kernels = self._tracker(candidate), self._of(candidate.device)
        with as_on(candidate.device, candidate.capability), remembering(tracker, self._dequantised):
            return run_step(
                candidate,
                shape,
                META,
                tracker,
                lambda: kernels.flops,
                asked_for,
                rehearsed,
                partial(_aside, kernels),
                grow,
            )

    def _worst(self, candidate: Candidate) -> Course:
        """The course of the bucket that needs most in its passes, with the update of the one that
        needs most there. Many of a ladder's rungs have it in common."""
        components = [c for c in candidate.model.components if _in_step(candidate, c.name)]
        key = repr((components, _stepped(candidate)))
        if key not in self._courses:
            courses = [self.course(candidate, shape) for shape in worst_of(candidate)]
            passes = max(courses, key=lambda course: sum(course.train_peak.values()))
            update = max(courses, key=lambda course: sum(course.update_peak.values()))
            self._courses[key] = evolve(passes, update=update.update, after=update.after)
        return self._courses[key]

    def _deep(self, candidate: Candidate, less: Shallow, shape: Shape) -> Course:
        base = self._base(less, shape)
        forms, idle = deep_forms(base, less)
        key = depends_on(candidate, forms, idle)
        if key not in self._updates:
            with as_on(candidate.device, candidate.capability):
                tracker = self._tracker(candidate)
                self._updates[key] = run_update(candidate, forms, idle, tracker)
        return deepened(
            base,
            less,
            forms,
            self._updates[key],
            partial(of_batch, candidate, shape),
            candidate.layout.fused_backward,
        )

    def _base(self, less: Shallow, shape: Shape) -> Course:
        """That of the shallow model, which many a deep one has in common: all that differ in what
        waits on the host."""
        rehearsed = bool(less.waiting)
        key = repr((less.base, shape, less.recomputed, sorted(less.further), rehearsed))
        if key not in self._bases:
            run = partial(self._run, less.base, shape, less.further, rehearsed)
            with shortened(less.recomputed):
                try:
                    self._bases[key] = run(less.growth)
                except CantGrow:
                    self._bases[key] = run()
        return self._bases[key]

    @contextmanager
    def _encoding(self, candidate: Candidate) -> Iterator[Callable[[], Phases]]:
        """The phases before training, which most candidates of a ladder have in common; inside,
        they are simulated beside what is simulated here."""
        parts = [c for c in candidate.model.components if not _in_step(candidate, c.name)]
        configs = {part.name: candidate.model.configs.get(part.name) for part in parts}
        every = (*candidate.shapes, *candidate.evaluated)
        shapes = candidate.encoded or tuple((width, height, 1) for width, height, _ in every)
        device = candidate.device, candidate.capability
        key = repr((parts, configs, candidate.text, shapes, device))
        if key in self._encoded:
            yield lambda: self._encoded[key]
            return
        with beside(partial(self._encode, candidate, shapes)) as encode:
            yield lambda: self._encoded.setdefault(key, encode())

    def _encode(self, candidate: Candidate, shapes: tuple[Shape, ...]) -> Phases:
        family = family_of(candidate.model.family)
        found: dict[str, Mapping[str, int]] = {}
        with as_on(candidate.device, candidate.capability):
            for name in family.card.text_encoders:
                found[name] = self._text(candidate, family, name)
            pictures = []
            for *size, count in phases.fullest(shapes):
                # PyTorch's own setting for convolutions: `runtime.speed.prepare` comes later.
                tracker = self.tracker(candidate.device, candidate.capability, tf32=True)
                pictures.append(
                    phases.run_latents(candidate, family, (size[0], size[1]), META, tracker, count)
                )
        found["latents"] = max(pictures, key=lambda parts: sum(parts.values()))
        return found

    def _text(self, candidate: Candidate, family: Family, encoder: str) -> Mapping[str, int]:
        with suppress(NotAlike):
            return run_few(candidate, family, encoder, self._tracker(candidate))
        return phases.run_text(candidate, family, encoder, META, self._tracker(candidate))

    def _tracker(self, candidate: Candidate) -> Tracker:
        return self.tracker(candidate.device, candidate.capability, candidate.tf32)

    def tracker(self, device: str, capability: str = "", tf32: bool = False) -> Tracker:
        """A new one for meta tensors that stand for tensors on `device`."""
        # Optimizers keep step counters on the host: on the device only where that is the host.
        devices = {"meta", "cpu"} if device == "cpu" else {"meta"}
        inside = attention.workspace(device)
        if device == "cuda":
            inside = {**inside, **convolutions.workspaces(float(capability or 0), tf32)}
        return Tracker(devices, self._of(device), inside)

    def _of(self, device: str) -> MetaKernels:
        return self._kernels.setdefault(device, MetaKernels(COUNTERS, device))


def _in_step(candidate: Candidate, name: str) -> bool:
    return name == candidate.model.trained_component


def _stepped(candidate: Candidate) -> object:
    """What a step depends on besides the trained component's quantisation."""
    model = candidate.model
    vae = next(((c.dtype, c.tiling) for c in model.components if c.name == "vae"), None)
    return evolve(candidate, model=evolve(model, components=())), vae


@contextmanager
def _aside(kernels: MetaKernels, work: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """As `beside`; and what `kernels` learn in the other process they know here too."""
    known = kernels.known
    with beside(lambda: (work(), kernels.learned(known))) as result:

        def found() -> Any:
            made, learned = result()
            kernels.learn(learned)
            return made

        yield found


def _phase(name: str, parts: Mapping[str, int], fixed: Mapping[str, int], host: int) -> plan.Phase:
    """Parts from the largest down; constants last, and only where there are any."""
    ordered = {**dict(sorted(parts.items(), key=lambda part: -part[1])), **fixed}
    return plan.Phase(name=name, device_bytes=sum(ordered.values()), host_bytes=host, parts=ordered)
