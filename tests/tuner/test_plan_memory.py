"""The memory of a plan as a person reads it."""

from __future__ import annotations

from attrs import evolve

from compiler.plan import Decision, Layout, Rung
from tests.tuner.examples import sd35_large_lora
from tuner.plan_memory import memory_lines
from tuner.plan_settings import filled_in

GIB = 2**30


def rung(peak: int, time: float, *, alters: bool = False, chosen: bool = False, **own: str) -> Rung:
    settings = {"memory.activation_checkpointing": "off", "memory.offload.blocks": "0"}
    settings |= {f"memory.{name}": value for name, value in own.items()}
    return Rung(
        settings=settings,
        peak_bytes=peak * GIB,
        relative_time=time,
        alters=alters,
        chosen=chosen,
    )


LADDER = (
    rung(73, 1.0),
    rung(55, 1.15, activation_checkpointing="3"),
    rung(22, 1.43, activation_checkpointing="1", chosen=True),
    rung(14, 1.45, activation_checkpointing="1", micro_batch="1", alters=True),
    rung(9, 1.6, activation_checkpointing="1", micro_batch="1", alters=True),
)


def shown(*, verbose: bool) -> list[str]:
    plan = sd35_large_lora()
    ladder = tuple(evolve(r, settings={"memory.micro_batch": "4", **r.settings}) for r in LADDER)
    memory = evolve(
        plan.memory,
        ladder=ladder,
        layout=Layout(activation_checkpointing=1, offload_blocks=3, offload_activations=True),
    )
    return memory_lines(evolve(plan, memory=memory), verbose)


def test_the_rungs_beside_the_chosen_one() -> None:
    lines = shown(verbose=False)
    start = next(n for n, line in enumerate(lines) if "ladder" in line)
    assert lines[start:] == [
        "  ladder (training and drawing; time of a step is modelled):",
        "        55.0 GiB  1.15x time  activation_checkpointing = 3",
        "    >   22.0 GiB  1.43x time  activation_checkpointing = 1",
        "        14.0 GiB  1.45x time  micro_batch = 1, alters the result a little",
    ]
    told = " ".join(lines)
    assert "recomputes the activations of every block, keeps activations on the host" in told
    assert "keeps 3 blocks on the host" in told


def test_all_rungs_when_asked() -> None:
    lines = shown(verbose=True)
    start = next(n for n, line in enumerate(lines) if "ladder" in line)
    assert lines[start + 1].endswith("1.00x time  nothing more than the recipe says")
    assert sum("x time" in line for line in lines) == len(LADDER)
    assert sum("alters" in line for line in lines) == sum(rung.alters for rung in LADDER)
    assert all(len(line) <= 80 for line in lines)


def test_what_alters_the_result_is_never_folded_away() -> None:
    plan = sd35_large_lora()
    loud = [
        Decision(key=f"a.key.{n}", value="int8", source="pass memory",
                 why="the fastest that fits; it alters the result a little")
        for n in range(6)
    ]  # fmt: skip
    text = "\n".join(filled_in(evolve(plan, decisions=(*plan.decisions, *loud)), "r.toml", False))
    assert all(f"a.key.{n}" in text for n in range(6))
