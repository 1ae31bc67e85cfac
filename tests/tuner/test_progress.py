"""Progress: the lines, their rhythm, and an ETA that is checked by hand."""

import io

import pytest
from attrs import evolve

from tests.tuner.examples import quickstart
from tuner.bars import Bars
from tuner.eta import Eta
from tuner.lines import Lines, log_every, step_line
from tuner.progress import progress


class Clock:
    """Time that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, seconds: float = 3.2) -> dict[str, float]:
    return {
        "step": number, "epoch": 0, "loss": 0.4123, "grad_norm": 0.8311, "lr": 1e-4,
        "samples": 4, "seconds": seconds,
    }  # fmt: skip


def test_the_line_is_exactly_this() -> None:
    plan = quickstart()
    plan = evolve(
        plan,
        steps=evolve(plan.steps, total=2000),
        validation=evolve(plan.validation, prompts=()),
    )
    eta = Eta(plan, Clock())
    for number in range(1, 101):
        eta.step(step(number))
    assert step_line(step(100), 2000, eta) == (
        "step 100/2000  loss 0.412  grad_norm 0.83  lr 1.0e-04  3.2 s/step  eta 1:41:20"
    )
    assert 1900 * 3.2 == 3600 + 41 * 60 + 20


def test_the_eta_counts_the_validations_that_are_left() -> None:
    plan, clock = quickstart(), Clock()  # 250 steps, pictures at 0, 50, ..., 250
    eta = Eta(plan, clock)
    assert eta.seconds_left() is None
    eta.phase("validate")
    clock.now += 20
    eta.phase("train")
    for number in range(1, 11):
        clock.now += 2
        eta.step(step(number, seconds=2))
    assert eta.step_seconds == 2
    assert eta.seconds_left() == 240 * 2 + 5 * 20


def test_a_validation_is_timed_without_the_step_after_it() -> None:
    plan, clock = quickstart(), Clock()
    eta = Eta(plan, clock)
    eta.step(step(50, seconds=2))
    eta.phase("validate")
    clock.now += 30 + 2
    eta.step(step(51, seconds=2))
    assert eta.seconds_left() == 199 * 2 + 4 * 30


def test_the_eta_follows_recent_steps() -> None:
    eta = Eta(quickstart(), Clock())
    for number in range(1, 101):
        eta.step(step(number, seconds=9))
    for number in range(101, 201):
        eta.step(step(number, seconds=1))
    assert eta.step_seconds == 1


@pytest.mark.parametrize(
    ("total", "every"), [(1, 1), (39, 2), (250, 20), (400, 20), (2000, 100), (11_910, 100)]
)
def test_the_rhythm_of_lines(total: int, every: int) -> None:
    assert log_every(total) == every


def test_plain_lines_tell_of_each_phase_and_of_some_steps() -> None:
    stream, plan = io.StringIO(), quickstart()
    lines = Lines(plan, stream, Clock())
    lines.phase("text", 32, "prompts")
    lines.advance(32)
    lines.phase("load", 0, "")
    lines.message("two images are small", "warning")
    lines.phase("train", 250, "steps")
    for number in range(1, 251):
        lines.step(step(number, seconds=0.1))
    lines.close()
    said = stream.getvalue().splitlines()
    assert said[:3] == ["cache text: 32 prompts", "load model", "warning: two images are small"]
    assert [line.split()[1] for line in said[3:]] == [
        f"{n}/250" for n in (1, *range(20, 250, 20), 250)
    ]
    assert "10.0 it/s  eta 0:25" in said[3] and said[-1].endswith("eta 0:00")


def test_what_is_left_of_a_cache_goes_by_what_was_done_now() -> None:
    """A hundred lay there; then two hundred in 40 seconds, and as quickly on: 700 x 0.2 s."""
    stream, time_ = io.StringIO(), Clock()
    lines = Lines(quickstart(), stream, time_)
    lines.phase("latents", 1000, "pictures")
    for now, done in ((5, 100), (20, 200), (45, 300), (60, 400), (85, 500), (205, 1000)):
        time_.now = now
        lines.advance(done)
    lines.phase("latents", 50, "pictures")  # of what is held out
    time_.now += 100
    lines.advance(50)
    assert stream.getvalue().splitlines() == [
        "cache latents: 1,000 pictures",
        "cache latents: 300/1,000 pictures  eta 2:20",
        "cache latents: 500/1,000 pictures  eta 1:40",
        "cache latents: 50 pictures",
    ]


def test_a_bar_counts_its_phase_down() -> None:
    stream, time_ = io.StringIO(), Clock()
    bars = Bars(quickstart(), stream, time_)
    bars.phase("text", 64, "prompts")
    bars.advance(0)
    time_.now = 8
    bars.advance(16)
    bars.close()
    assert "16/64 prompts" in stream.getvalue() and "eta 0:24" in stream.getvalue()


def test_a_stream_that_is_no_terminal_gets_lines_and_a_closed_one_harms_nothing() -> None:
    stream = io.StringIO()
    shown = progress(quickstart(), stream)
    assert isinstance(shown, Lines)
    stream.close()
    shown.message("nobody reads this")


def test_bars_show_pace_loss_and_eta_under_the_names_of_the_plan() -> None:
    stream, clock = io.StringIO(), Clock()
    bars = Bars(quickstart(), stream, clock)
    bars.phase("latents", 30, "images")
    bars.advance(30)
    bars.phase("load", 0, "")
    bars.phase("train", 250, "steps")
    bars.step(step(1, seconds=0.1))
    bars.phase("validate", 4, "pictures")
    bars.advance(2)
    bars.phase("train", 250, "steps")
    bars.step(step(2, seconds=0.1))
    bars.message("[adapter] is shown as it stands", "warning")
    bars.close()
    said = stream.getvalue()
    for words in ("cache latents", "30/30 images", "2/250", "10.0 it/s", "loss 0.412", "eta 0:2"):
        assert words in said, words
    assert "warning: [adapter] is shown as it stands" in said
