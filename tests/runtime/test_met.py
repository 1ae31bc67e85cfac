"""Whether a run met what its plan counted: only then an allocator's peak corrects the next plan."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve

from compiler.families import FAMILIES
from compiler.plan import Ema as EmaFacts
from compiler.plan import Plan
from runtime import clock as clocks
from runtime import execute as executing
from runtime.batch import Batch
from runtime.clock import Clock
from runtime.data.feed import Window
from runtime.events import Silent
from runtime.families import family_of
from runtime.families.base import Framed
from runtime.families.common import config_of
from runtime.loop import Trained
from runtime.measured import measured
from runtime.memory.corrections import read, remember
from runtime.memory.gauge import Gauge
from runtime.met import AVERAGE, NOTHING, judged, met_readings, noted
from tests.compiler.recipes import GPU
from tests.runtime.memory_cases import small
from tests.runtime.plans import LORA, draw_data, tiny_plan
from tests.runtime.run_plan import Interrupting
from tests.runtime.test_measured import planned

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
CUDA, META = torch.device("cuda"), torch.device("meta")
SHORT, FULL = 2, 512


def on_cuda(
    folder: Path, monkeypatch: pytest.MonkeyPatch, family: str, *overrides: str, tokens: int = 0
) -> tuple[Plan, dict[str, Any]]:
    """A run's plan, and the rows of the memory that a CUDA device's allocator would have told of
    it: four fifths of what was planned. `tokens`: as many are read of a prompt."""
    monkeypatch.setattr(clocks, "Gauge", lambda device: Gauge(CUDA))

    def told(plan: Plan, trained: Trained, clock: Clock, _: torch.device) -> dict[str, Any]:
        peaks = {phase.name: phase.device_bytes * 4 // 5 for phase in plan.memory.phases}
        update = peaks.pop("update", 0)
        clock.peak_bytes = {**peaks, "train": max(peaks["train"], update)}
        return measured(plan, trained, clock, CUDA)

    monkeypatch.setattr(executing, "measured", told)
    made = planned(folder, family, "", *overrides)
    assert made.plan is not None and made.manifest is not None, made.diagnostics
    plan = made.plan
    if tokens:
        plan = evolve(plan, text=evolve(plan.text, max_length=tokens))
    return plan, executing.execute(plan, made.manifest, Silent()).measured["memory"]


def remembered(folder: Path, plan: Plan, row: Mapping[str, Any]) -> list[float]:
    path = folder / "memory.json"
    remember(path, plan, GPU, {"train": row})
    return [each.ratio for each in read(path).values()]


def test_shorter_prompts_than_planned_correct_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sana pads to the longest prompt of a batch, "a dog": 7 tokens of the tiny tokenizer."""
    plan, memory = on_cuda(tmp_path, monkeypatch, "sana")
    for name in ("train", "evaluate"):
        planned_on, measured_on = memory[name]["planned_on"], memory[name]["measured_on"]
        assert f"{plan.text.max_length:,} tokens" in planned_on, name
        assert measured_on == planned_on.replace("300", "7"), name
    assert remembered(tmp_path, plan, memory["train"]) == []


@pytest.mark.parametrize(("family", "tokens"), [("sana", SHORT), ("sd3", 0)])
def test_what_was_met_in_full_corrects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tokens: int
) -> None:
    """Prompts as long as they may be; SD3's always are."""
    plan, memory = on_cuda(tmp_path, monkeypatch, family, "train.steps=6", tokens=tokens)
    for name in ("train", "evaluate"):
        assert "measured_on" not in memory[name], name
    assert remembered(tmp_path, plan, memory["train"]) == [pytest.approx(0.8, abs=1e-3)]


def text_of(count: int, tokens: int) -> dict[str, torch.Tensor]:
    return {"states": torch.zeros(count, tokens, 8), "mask": torch.ones(count, tokens)}


def batch_of(count: int = 2, tokens: int = FULL, width: int = 64) -> Batch:
    latents = torch.zeros(count, 4, 2, width // 32)
    sigmas = torch.ones(count)
    return Batch(latents=latents, noise=latents, sigmas=sigmas, text=text_of(count, tokens))


class Stand:
    """In a run's place: a plan of one bucket, and what is trained of it on `device`; of a small
    model of `family`, or of one that takes any text."""

    def __init__(
        self,
        folder: Path,
        sana: Path,
        accumulate: int = 1,
        every: int = 1,
        turns: bool = False,
        family: str = "",
        device: torch.device = CUDA,
    ) -> None:
        plan, _ = tiny_plan("sana", sana, draw_data(folder / "dog"), folder / "run", steps=9)
        bucket = evolve(plan.buckets[0], width=64, height=64, batch_size=2, samples=2)
        ema = EmaFacts(decay=0.9, device="cpu", every=every)
        self.plan = evolve(
            plan,
            buckets=(bucket,),
            steps=evolve(plan.steps, accumulate=accumulate),
            text=evolve(plan.text, max_length=FULL),
        )
        if family:
            step = small(family)
            self.plan = evolve(self.plan, model=step.model, text=step.text)
        own = family_of(family) if family else SimpleNamespace(example_batch=self._example)
        trained: Any = SimpleNamespace(
            family=own,
            ema=SimpleNamespace(facts=ema),
            rival=object() if turns else None,
            shards=None,
            turn=lambda step: trained.rival if turns and step % 2 else trained,
        )
        self.trained, self.gauge = trained, Gauge(device)
        self._given: list[Window] = []
        given = iter(self._given.pop, None)
        self._passed = iter(noted(given, self.plan, trained, self.gauge))

    def trains(self, step: int, *batches: Batch) -> Window:
        """The window that an update is given, after it has passed what notes it."""
        window = Window(step=step, epoch=1, batches=batches, samples=2, names=())
        self._given.append(window)
        assert next(self._passed) is window
        return window

    @staticmethod
    def _example(model: Any, width: int, height: int, count: int, text: Any, device: Any) -> Batch:
        return batch_of(count, text.max_length, width)

    def unlike(self) -> tuple[str, str]:
        """What was met and what was planned; two empty words where these are alike."""
        found = met_readings(self.trained, self.gauge, ["train"])["train"]
        return found.on, found.planned


@pytest.fixture
def stand(tmp_path: Path, tiny_sana: Path) -> Callable[..., Stand]:
    return lambda **changes: Stand(tmp_path, tiny_sana, **changes)


def test_the_first_update_finds_no_state_and_says_nothing(stand: Callable[..., Stand]) -> None:
    run = stand()
    assert run.trains(0, batch_of()).step == 0
    assert run.unlike()[0] == NOTHING
    run.trains(1, batch_of())
    assert run.unlike() == ("", "")


def test_of_what_was_not_planned_the_largest_is_told(stand: Callable[..., Stand]) -> None:
    run = stand()
    for step, tokens in enumerate((FULL, 3, 40, 7)):
        run.trains(step, batch_of(tokens=tokens))
    assert "40 tokens" in run.unlike()[0]


def test_of_two_sides_each_has_to_be_met(stand: Callable[..., Stand]) -> None:
    run = stand(turns=True)
    for step in range(3):  # the first of each says nothing
        run.trains(step, batch_of())
    assert "for the discriminator" in run.unlike()[1]
    run.trains(3, batch_of())
    assert run.unlike() == ("", "")


def test_nothing_is_looked_at_where_no_allocator_is_asked(stand: Callable[..., Stand]) -> None:
    run = stand(device=torch.device("cpu"))
    for step in range(3):
        run.trains(step, batch_of())
    judged(run.plan, run.gauge)(batch_of())
    assert not run.gauge.met


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_full_prompts_are_as_planned(family: str, stand: Callable[..., Stand]) -> None:
    """Of one prompt that is as long as it may be, and one that is shorter where that is possible.
    Else nothing would ever be corrected."""
    run, own = stand(family=family), family_of(family)
    configs = {name: config_of(run.plan.model, name) for name in run.plan.model.configs}
    texts = [
        {
            name: torch.zeros(each)
            for name, each in own.card.embedding_shapes(configs, count).items()
        }
        for count in (run.plan.text.max_length, run.plan.text.max_length - own.card.unpadded_text)
    ]
    frame = Framed(original=(64, 64), crop=(0, 0), target=(64, 64))
    text = own.collate_text(texts) | own.size_conditions([frame] * 2)
    example = own.example_batch(run.plan.model, 64, 64, 2, run.plan.text, META)
    for step in range(2):
        run.trains(step, evolve(example, text=text))
    assert run.unlike() == ("", "")


@pytest.mark.parametrize(
    "batch", [batch_of(tokens=FULL - 1), batch_of(count=1), batch_of(width=32)], ids=repr
)
def test_one_step_of_the_planned_size_is_enough_and_no_other(
    batch: Batch, stand: Callable[..., Stand]
) -> None:
    run = stand()
    for step in range(3):
        run.trains(step, batch)
    on, counted = run.unlike()
    assert on != counted and "512 tokens" in counted
    run.trains(3, batch_of())
    assert run.unlike() == ("", "")


def test_all_batches_of_a_window_have_to_be_as_planned(stand: Callable[..., Stand]) -> None:
    """Gradients of the first wait while the second runs, and both are there."""
    run = stand(accumulate=2)
    windows = [(batch_of(), batch_of(tokens=40)), (batch_of(),), (batch_of(tokens=40), batch_of())]
    for step, batches in enumerate(windows):
        run.trains(step, *batches)
    assert run.unlike()[1].startswith("2 times")
    run.trains(3, batch_of(), batch_of())
    assert run.unlike() == ("", "")


def test_the_average_has_to_be_among_the_updates(stand: Callable[..., Stand]) -> None:
    run = stand(every=5)
    for step in range(4):
        run.trains(step, batch_of())
    assert run.unlike()[1] == AVERAGE
    run.trains(4, batch_of(tokens=1))
    assert run.unlike() == ("", "")


def test_what_devices_that_share_a_model_draw_is_not_looked_at(
    stand: Callable[..., Stand],
) -> None:
    run = stand()
    for shards in (None, object()):
        run.trained.shards = shards
        found = met_readings(run.trained, run.gauge, ["validate"])
        assert all(row.on != row.planned for row in found.values())
        assert bool(found) is (shards is not None)


class Weighing(Clock):
    """All live tensors in the place of an allocator, looked at where a phase begins or ends."""

    def _book(self) -> None:
        if self._stack:
            name = self._stack[-1]
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), live())
        super()._book()


def live() -> int:
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_loading_is_the_model_however_a_run_goes_on(
    tmp_path: Path, tiny_sana: Path, monkeypatch: pytest.MonkeyPatch, adapter: Any
) -> None:
    """With an average, and of a run that is resumed with the optimizer's state."""
    ema = EmaFacts(decay=0.9, device="same", every=1)
    plan, manifest = tiny_plan(
        "sana", tiny_sana, draw_data(tmp_path / "dog"), tmp_path / "run",
        steps=4, ema=ema, adapter=adapter,
    )  # fmt: skip
    clocks: list[Weighing] = []

    def clock(device: torch.device) -> Clock:
        clocks.append(Weighing(device))
        return clocks[-1]

    monkeypatch.setattr(executing, "Clock", clock)
    stopped = executing.execute(plan, manifest, Interrupting("step", 2, signal.SIGTERM))
    assert stopped.status == "stopped"
    assert executing.execute(plan, manifest, Silent()).status == "finished"
    rows = [{k: v - c.peak_bytes["latents"] for k, v in c.peak_bytes.items()} for c in clocks]
    fresh, resumed = rows
    assert fresh["load"] == pytest.approx(resumed["load"], rel=0.02) and fresh["load"] > 0
    trained = 4 * sum(p.numel() for p in _trained(plan).values())
    assert fresh["prepare"] - fresh["load"] == pytest.approx(trained, rel=0.05)  # the average
    assert resumed["prepare"] - resumed["load"] > 2.5 * trained  # AdamW's two besides


def _trained(plan: Plan) -> Mapping[str, torch.nn.Parameter]:
    from runtime.build import build

    given = (plan.model, plan.adapter, plan.precision, plan.memory.layout)
    built = build(*given, family_of("sana"), torch.device("meta"), empty=True, seed=0)
    return built.trainable
