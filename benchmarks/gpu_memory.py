"""Planned device memory beside the allocator's, over many configurations of the real shapes.

    python benchmarks/gpu_memory.py [--out FOLDER] [--only WORD] [--list]

Weights are not loaded: models have their published shapes and whatever memory holds. Needs a CUDA
device; configurations that need more than it has free are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compiler.memory import Candidate, Simulation
from compiler.plan import Layout, Quantisation
from runtime.families import family_of
from runtime.machine import cuda_devices, look, versions
from runtime.memory import phases
from runtime.memory.allocator import AllocatorTracker
from runtime.memory.simulate import CUDA_CONTEXT, RuntimeMemoryModel
from runtime.memory.step import run_step, worst
from runtime.memory.tracker import rounded
from tests.runtime.memory_cases import candidate, known

SANA_06 = "Efficient-Large-Model/Sana_600M_1024px_diffusers"
SANA_16 = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
LARGE = "stabilityai/stable-diffusion-3.5-large"
PICTURE = ((1024, 1024),)
ROOM = 0.95  # of what is free; a configuration that needs more is left out


@frozen
class Case:
    """One configuration."""

    name: str
    candidate: Candidate


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
    yield _case("sana-1.6b full bf16, fused backward", SANA_16, trained="bfloat16",
                max_grad_norm=0.0, layout=Layout(fused_backward=True))  # fmt: skip


def planned(found: Simulation) -> dict[str, int]:
    """Bytes of each phase, without the context, which no allocator tells of."""
    context = rounded(CUDA_CONTEXT)
    return {phase.name: phase.device_bytes - context for phase in found.phases}


def measured(step: Candidate, device: torch.device) -> dict[str, int]:
    """The allocator's peak of each phase."""
    family = family_of(step.model.family)
    found = {}
    for name in family.card.text_encoders:
        tracker: Any = AllocatorTracker(device)
        found[name] = sum(phases.run_text(step, family, name, device, tracker).values())
        _free()
    (shape,) = worst(step.shapes)
    tracker = AllocatorTracker(device)
    latents = phases.run_latents(step, family, shape[:2], device, tracker)
    found["latents"] = sum(latents.values())
    _free()
    course = run_step(step, shape, device, AllocatorTracker(device))  # type: ignore[arg-type]
    found["load"] = sum(course.load.values())
    found["train"] = sum(course.train_peak.values())
    found["update"] = sum(course.update_peak.values())
    if step.pictures:
        found["validate"] = sum(course.validate_peak.values())
    return found


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def rows(only: str, device: torch.device) -> Iterator[tuple[str, str, int, int]]:
    """(configuration, phase, planned, measured) of all that fits; what does not has 0 measured."""
    model = RuntimeMemoryModel()
    for case in cases():
        if only not in case.name:
            continue
        _free()
        plans = planned(model.simulate(case.candidate))
        free, _ = torch.cuda.mem_get_info(device)
        if max(plans.values()) > ROOM * free:
            yield case.name, "-", max(plans.values()), 0
            continue
        for phase, nbytes in measured(case.candidate, device).items():
            yield case.name, phase, plans[phase], nbytes


def table(found: list[tuple[str, str, int, int]], head: Mapping[str, str]) -> str:
    """Markdown: what it was measured on, errors, all rows."""
    errors = [abs(p - m) / m for _, _, p, m in found if m]
    lines = ["# Planned and allocated device memory", ""]
    lines += [f"- {name}: {value}" for name, value in head.items()]
    if errors:
        lines.append(
            f"- {len(errors)} phases of {len({n for n, _, _, m in found if m})} configurations: "
            f"median error {statistics.median(errors):.2%}, worst {max(errors):.2%}"
        )
    lines += ["", "| configuration | phase | planned MB | allocated MB | error |"]
    lines.append("|---|---|---|---|---|")
    for name, phase, plan, real in found:
        error = f"{(plan - real) / real:+.2%}" if real else "needs more than is free"
        lines.append(f"| {name} | {phase} | {plan / 1e6:,.1f} | {real / 1e6:,.1f} | {error} |")
    return "\n".join(lines) + "\n"


def head_of(command: str) -> dict[str, str]:
    """What a table was measured on, and how."""
    return {
        "device": look().device_name,
        "driver, CUDA": ", ".join(
            [*(gpu.driver for gpu in cuda_devices()[:1]), str(torch.version.cuda)]
        ),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
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
    found = []
    for row in rows(given.only, torch.device("cuda", 0)):
        found.append(row)
        print(*row, flush=True)
    name = look().device_name
    text = table(found, head_of("python benchmarks/gpu_memory.py"))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"gpu-memory-{name.lower().replace(' ', '-')}.md"
    path.write_text(text, encoding="utf-8")
    print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
