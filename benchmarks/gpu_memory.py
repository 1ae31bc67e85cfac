"""Planned device memory beside the allocator's, over many configurations of the real shapes.

    python benchmarks/gpu_memory.py [--out FOLDER] [--only WORD] [--list]

Weights are not loaded: models have their published shapes and whatever memory holds. Needs a CUDA
device. Each configuration is measured by itself: one that needs more than is free is left out, one
that fails is a row that says so, and the table is written after each row.

`allocated` is what tensors took at most, which is what a plan tells of; `reserved` what the
allocator had taken from the device by then, with what it keeps for later.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compiler.memory import Candidate, Simulation
from compiler.plan import Layout, Quantisation
from runtime.device import claimed, tell_allocator
from runtime.families import family_of
from runtime.machine import cuda_devices, look, versions
from runtime.memory import phases
from runtime.memory.allocator import AllocatorTracker
from runtime.memory.buckets import worst
from runtime.memory.constants import OUTSIDE
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.step import run_step
from runtime.out_of_memory import is_out_of_memory, let_go
from runtime.segments import map_by_pages, number_by_bus, setting
from tests.runtime.memory_cases import candidate, known

SANA_06 = "Efficient-Large-Model/Sana_600M_1024px_diffusers"
SANA_16 = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
LARGE = "stabilityai/stable-diffusion-3.5-large"
FLUX = "black-forest-labs/FLUX.1-dev"
PICTURE = ((1024, 1024),)
ROOM = 0.95  # of what is free; a configuration that needs more is left out
MEDIAN, WORST = 0.015, 0.03  # the goal: errors below these
FAILED = 1  # exit code: some configuration was not measured to its end


@frozen
class Case:
    """One configuration."""

    name: str
    candidate: Candidate


@frozen
class Row:
    """Bytes of one phase of one configuration; or of a whole one, and why it was not measured."""

    name: str
    phase: str
    planned: int
    allocated: int = 0
    reserved: int = 0
    why: str = ""

    @property
    def error(self) -> float:
        """Of the plan, as a share of what was allocated."""
        return (self.planned - self.allocated) / self.allocated


def _case(name: str, base: str, quantize: Quantisation = "none", **options: Any) -> Case:
    made = candidate(known(base), device="cuda", **options)
    parts = tuple(
        evolve(part, quantize=quantize) if part.name == "transformer" else part
        for part in made.model.components
    )
    return Case(name, evolve(made, model=evolve(made.model, components=parts)))


def _square(edge: int, batch: int) -> tuple[tuple[int, int, int], ...]:
    return ((edge, edge, batch),)


def cases() -> Iterator[Case]:
    """All configurations: families, methods, quantisers, batches, sizes, intervals, averages."""
    for label, base in (("sana-0.6b", SANA_06), ("sana-1.6b", SANA_16)):
        yield _case(f"{label} full bf16", base, trained="bfloat16", pictures=PICTURE)
        yield _case(f"{label} full fp32 masters, recompute 1", base, checkpointing=1)
        yield _case(f"{label} full bf16, average on the device", base, trained="bfloat16", ema=True)
        yield _case(f"{label} lora 32, batch 4", base, rank=32, shapes=_square(1024, 4))
        yield _case(f"{label} lora 32, 2048 px, recompute 2", base, rank=32, checkpointing=2,
                    shapes=_square(2048, 1))  # fmt: skip
        yield _case(f"{label} lora 16, 512 px, batch 8", base, rank=16, shapes=_square(512, 8))
    for kind in ("none", "int8", "nf4"):
        yield _case(f"sd3.5-medium lora 64, {kind}, recompute 1", MEDIUM, kind, rank=64,
                    checkpointing=1, pictures=PICTURE)  # fmt: skip
        yield _case(f"sd3.5-medium lora 16, {kind}, 512 px, batch 4", MEDIUM, kind, rank=16,
                    shapes=_square(512, 4))  # fmt: skip
        yield _case(f"sd3.5-large lora 64, {kind}, recompute 1", LARGE, kind, rank=64,
                    checkpointing=1, pictures=PICTURE)  # fmt: skip
        yield _case(f"sd3.5-large lora 128, {kind}, recompute 2, batch 2", LARGE, kind, rank=128,
                    checkpointing=2, shapes=_square(1024, 2))  # fmt: skip
    yield _case("sd3.5-large lora 768, recompute 1, batch 6", LARGE, rank=768, checkpointing=1,
                shapes=_square(1024, 6))  # fmt: skip
    yield _case("sd3.5-large lora 64, 8 blocks on the host", LARGE, rank=64,
                layout=Layout(activation_checkpointing=1, offload_blocks=8))  # fmt: skip
    yield _case("sd3.5-large lora 64, activations on the host", LARGE, rank=64,
                layout=Layout(activation_checkpointing=1, offload_activations=True))  # fmt: skip
    yield _case("flux.1-dev lora 16", FLUX, rank=16)
    yield _case("flux.1-dev lora 16, recompute 1", FLUX, rank=16, checkpointing=1, pictures=PICTURE)
    yield _case("sana-1.6b full bf16, fused backward", SANA_16, trained="bfloat16",
                max_grad_norm=0.0, layout=Layout(fused_backward=True))  # fmt: skip


def planned(found: Simulation) -> dict[str, int]:
    """Bytes of each phase, without what no allocator tells of."""
    return {
        phase.name: sum(n for part, n in phase.parts.items() if part not in OUTSIDE)
        for phase in found.phases
    }


def measured(step: Candidate, device: torch.device) -> Iterator[tuple[str, int, int]]:
    """Each phase, and the allocator's peaks in it: of bytes allocated, and of bytes reserved."""
    family = family_of(step.model.family)
    for name in family.card.text_encoders:
        tracker: Any = AllocatorTracker(device)
        yield _peaks(name, tracker, phases.run_text(step, family, name, device, tracker))
        let_go()
    (shape,) = worst(step.shapes)
    torch.backends.cudnn.allow_tf32 = True  # as PyTorch has it, and a run that fills its caches
    tracker = AllocatorTracker(device)
    latents = phases.run_latents(step, family, shape[:2], device, tracker)
    yield _peaks("latents", tracker, latents)
    let_go()
    torch.backends.cudnn.allow_tf32 = step.tf32  # from here on as `runtime.speed.prepare` says
    tracker = AllocatorTracker(device)
    course = run_step(step, shape, device, tracker)
    if not course.quantising:  # which is planned, but not done here: weights come as codes
        yield _peaks("load", tracker, course.load)
    yield _peaks("train", tracker, course.train_peak)
    yield _peaks("update", tracker, course.update_peak)
    if step.pictures:
        yield _peaks("validate", tracker, course.validate_peak)


def _peaks(phase: str, tracker: Any, parts: Mapping[str, int]) -> tuple[str, int, int]:
    allocated = sum(parts.values())
    return phase, allocated, tracker.reserved[allocated]


def rows(only: str, device: torch.device) -> Iterator[Row]:
    """All configurations whose name contains `only`."""
    model = RuntimeMemoryModel()
    for case in cases():
        if only in case.name:
            let_go()
            forget_workspaces()
            yield from _rows(case, model, device)


def _rows(case: Case, model: RuntimeMemoryModel, device: torch.device) -> Iterator[Row]:
    """One configuration; whatever fails there is said in a row, and the others go on."""
    most = free = 0
    try:
        major, minor = torch.cuda.get_device_capability(device)
        plans = planned(model.simulate(evolve(case.candidate, capability=f"{major}.{minor}")))
        most = max(plans.values())
        free, _ = torch.cuda.mem_get_info(device)
        if most > ROOM * free:
            yield Row(case.name, "-", most, why=f"left out: {free / 1e6:,.1f} MB are free")
            return
        for phase, allocated, reserved in measured(case.candidate, device):
            yield Row(case.name, phase, plans[phase], allocated, reserved)
        return
    except Exception as error:
        what = "out of memory" if is_out_of_memory(error) else type(error).__name__
        first = (str(error).strip() or "-").splitlines()[0].replace("|", "/")
        let_go(error)
    why = f"failed: {what}, where {free / 1e6:,.1f} MB were free: {first}"
    yield Row(case.name, "-", most, why=why)


def table(found: Sequence[Row], head: Mapping[str, str]) -> str:
    """Markdown: what it was measured on, the verdict, all rows."""
    lines = ["# Planned and allocated device memory", ""]
    lines += [f"- {name}: {value}" for name, value in head.items()]
    lines += [f"- {line}" for line in verdict(found)]
    lines += ["", "| configuration | phase | planned MB | allocated MB | error | reserved MB |"]
    lines.append("|---|---|---|---|---|---|")
    for row in found:
        start = f"| {row.name} | {row.phase} | {row.planned / 1e6:,.1f} |"
        if row.why:
            lines.append(f"{start} | {row.why} | |")
        else:
            told = f"{row.allocated / 1e6:,.1f} | {row.error:+.2%} | {row.reserved / 1e6:,.1f}"
            lines.append(f"{start} {told} |")
    return "\n".join(lines) + "\n"


def verdict(found: Sequence[Row]) -> Iterator[str]:
    """Whether the goal is met by what was measured, and what was not."""
    real = [row for row in found if row.allocated]
    if real:
        errors = [abs(row.error) for row in real]
        median, most = statistics.median(errors), max(errors)
        yield (
            f"{len(real)} phases of {len({row.name for row in real})} configurations: "
            f"median error {median:.2%}, worst {most:.2%}"
        )
        met = "met" if median < MEDIAN and most < WORST else "not met"
        yield f"goal (median below {MEDIAN:.1%}, worst below {WORST:.0%}): {met}"
        slack = [row.reserved / row.allocated - 1 for row in real if row.phase == "train"]
        if slack:
            yield (
                "reserved beyond what is allocated in training, which is in no plan: "
                f"median {statistics.median(slack):.2%}, most {max(slack):.2%}"
            )
    if missing := [row.name for row in found if row.why]:
        yield f"not measured: {len(missing)} configurations ({', '.join(missing)})"


def forget_workspaces() -> None:
    """Those of cuBLAS stay for each thread that has computed, but loading is planned with one."""
    torch._C._cuda_clearCublasWorkspaces()


def as_in_runs() -> None:
    """Tell the allocator what runs tell it. Before the device's first tensor."""
    map_by_pages()
    number_by_bus()
    if setting():
        tell_allocator(setting())
    claimed(torch.device("cuda", 0))


def head_of(command: str) -> dict[str, str]:
    """What a table was measured on, and how."""
    return {
        "device": look().device_name,
        "driver, CUDA": ", ".join(
            [*(gpu.driver for gpu in cuda_devices()[:1]), str(torch.version.cuda)]
        ),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        "allocator": setting() or "as PyTorch has it",
        "Python": platform.python_version(),
        "command": " ".join([command, *sys.argv[1:]]),
    }


def main() -> int:
    """Print the table, and write it below the folder of measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/measurements"))
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--list", action="store_true", help="name the configurations")
    given = parser.parse_args()
    if given.list:
        print("\n".join(case.name for case in cases()))
        return 0
    if not torch.cuda.is_available():
        print("error: this benchmark needs a CUDA device; there is none here", file=sys.stderr)
        return 3
    as_in_runs()
    given.out.mkdir(parents=True, exist_ok=True)
    head = head_of("python benchmarks/gpu_memory.py")
    name = "-".join([look().device_name, *given.only.split()]).lower().replace(" ", "-")
    path = given.out / f"gpu-memory-{name}.md"
    found: list[Row] = []
    for row in rows(given.only, torch.device("cuda", 0)):
        found.append(row)
        print(row, flush=True)
        path.write_text(table(found, head), encoding="utf-8")  # what is measured is there
    if not found:
        print(f"error: no configuration is called so: {given.only}", file=sys.stderr)
        return 2
    print("", *verdict(found), f"wrote {path}", sep="\n")
    return FAILED if any(row.why.startswith("failed") for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
