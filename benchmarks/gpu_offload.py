"""What waiting on the host costs a step: with prefetch, and with each copy waited for.

    python benchmarks/gpu_offload.py [--out FOLDER] [--steps N] [--only WORD]

Stable Diffusion 3.5 Large with an adapter of rank 64, one picture of 1024 px, each block's forward
pass recomputed. Weights are not loaded: models have their published shapes and whatever memory
holds. One row for each number of blocks that wait, one for activations. `step` is the median of N
steps, `over` its ratio to a step in which nothing waits; `in turn` is that ratio where copies and
computing take turns on one stream; `peak` is the allocator's. Needs a CUDA device. A layout that
fails is a row that says so, and the table is written after each row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from attrs import evolve, frozen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_memory import FAILED, as_in_runs, head_of
from compiler.memory import Candidate
from compiler.plan import Layout
from runtime.build import build
from runtime.families import family_of
from runtime.machine import look
from runtime.offload import activations, blocks
from runtime.optimizers import grouped, make_optimizer
from runtime.out_of_memory import is_out_of_memory, let_go
from runtime.step import gradient_norm, micro_step, update
from tests.runtime.memory_cases import candidate, known

LARGE = "stabilityai/stable-diffusion-3.5-large"
WAITING = (0, 9, 19, 38)  # blocks, of 38
WARM = 3  # steps that are not counted


@frozen
class Row:
    """One layout's seconds a step, with copies beside the computing and in turn, and its peak; or
    why it has none."""

    name: str
    beside: float = 0.0
    in_turn: float = 0.0
    peak: int = 0
    why: str = ""


def layouts() -> Iterator[tuple[str, Layout]]:
    """From all that stays on the device to all that waits."""
    for count in WAITING:
        name = f"{count} of 38 blocks wait" if count else "nothing waits"
        yield name, Layout(activation_checkpointing=1, offload_blocks=count)
    yield "activations wait", Layout(activation_checkpointing=1, offload_activations=True)
    both = Layout(activation_checkpointing=1, offload_blocks=38, offload_activations=True)
    yield "blocks and activations wait", both


def seconds(step: Candidate, device: torch.device, steps: int) -> tuple[float, int]:
    """The median of `steps` steps, and the allocator's peak in bytes."""
    family = family_of(step.model.family)
    built = build(
        step.model, step.adapter, step.precision, step.layout, family, device, empty=True, seed=0
    )
    optimizer = make_optimizer(
        step.optimizer, grouped(built.trainable.items(), step), torch.device(device.type)
    )
    width, height, batch_size = step.shapes[0]
    batch = family.example_batch(step.model, width, height, batch_size, step.text, device)
    torch.cuda.reset_peak_memory_stats(device)
    found = []
    for _ in range(WARM + steps):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        micro_step(family, built.model, batch, step.objective, step.precision, batch_size)
        update(optimizer, gradient_norm(built.trainable.values()), step.max_grad_norm)
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[WARM:]), torch.cuda.max_memory_allocated(device)


def measured(step: Candidate, device: torch.device, steps: int, name: str) -> Row:
    """Both ways of one layout."""
    beside, peak = seconds(step, device, steps)
    let_go()
    if not (step.layout.offload_blocks or step.layout.offload_activations):
        return Row(name, beside, beside, peak)
    stock = blocks.new_stream
    try:  # a copy on the stream that computes is waited for by all that comes after it
        blocks.new_stream = activations.new_stream = torch.cuda.current_stream
        in_turn, _ = seconds(step, device, steps)
    finally:
        blocks.new_stream = activations.new_stream = stock
    let_go()
    return Row(name, beside, in_turn, peak)


def row_of(step: Candidate, device: torch.device, steps: int, name: str) -> Row:
    """`measured`, or how it failed: other layouts may need less memory."""
    try:
        return measured(step, device, steps, name)
    except Exception as error:
        what = "out of memory" if is_out_of_memory(error) else type(error).__name__
        first = (str(error).strip() or "-").splitlines()[0].replace("|", "/")
        let_go(error)
    return Row(name, why=f"failed: {what}: {first}")


def table(rows: list[Row], head: list[str]) -> str:
    """Markdown; ratios are to the first row, if that was measured."""
    lines = ["# Steps of Stable Diffusion 3.5 Large with offloading", "", *head, ""]
    lines += ["| layout | step ms | over | in turn | peak MB |", "|---|---|---|---|---|"]
    for row in rows:
        if row.why:
            lines.append(f"| {row.name} | {row.why} | | | |")
            continue
        ratios = [
            f"{each / rows[0].beside:.2f}" if rows[0].beside else "-"
            for each in (row.beside, row.in_turn)
        ]
        lines.append(
            f"| {row.name} | {1e3 * row.beside:,.1f} | {ratios[0]} | {ratios[1]} | "
            f"{row.peak / 1e6:,.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table, and write it below the folder of measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/measurements"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", default="", help="layouts whose name contains this")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this benchmark needs a CUDA device; there is none here", file=sys.stderr)
        return 3
    as_in_runs()
    base = candidate(known(LARGE), rank=64, device="cuda")
    device, rows = torch.device("cuda", 0), list[Row]()
    told = head_of("python benchmarks/gpu_offload.py")
    head = [f"- {name}: {value}" for name, value in told.items()]
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"gpu-offload-{look().device_name.lower().replace(' ', '-')}.md"
    for name, layout in layouts():
        if given.only in name or not rows:  # the first is what others are compared with
            rows.append(row_of(evolve(base, layout=layout), device, given.steps, name))
            print(rows[-1], flush=True)
            path.write_text(table(rows, head), encoding="utf-8")
    print(f"\nwrote {path}")
    return FAILED if any(row.why for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
