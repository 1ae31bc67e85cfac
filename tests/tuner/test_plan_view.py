"""The plan's text and JSON against finished ones, and the sums in them against plain counting."""

import json
import math
from pathlib import Path

import pytest
from attrs import evolve

from compiler.diagnostics import Diagnostic
from compiler.occasions import checkpoint_steps, validation_steps
from compiler.plan import (
    Embeddings,
    Evaluation,
    HeldOut,
    NewToken,
    NoiseTable,
    Publish,
    Ranked,
    Schedule,
    Stage,
    TextTraining,
)
from compiler.schedules import multiplier
from compiler.site import Resume
from tests.tuner import examples
from tuner.curve import BLOCKS, COLUMNS, ROWS, draw
from tuner.defaults import default_of, differs
from tuner.formats import amount, clock, duration, in_unit_of, size
from tuner.plan_costs import cost_lines, resume_words
from tuner.plan_json import json_object
from tuner.plan_view import adapter_words, decorated, summary, text
from tuner.screen import bare, paint

GOLDEN = Path(__file__).parent / "golden"
PLANS = {
    "sd35-large-lora": (examples.sd35_large_lora(), False, examples.outlook()),
    "quickstart": (examples.quickstart(), True, None),
}
ONE_SCREEN = 56  # lines


def shown(name: str) -> str:
    plan, verbose, outlook = PLANS[name]
    return text(plan, recipe=f"{name}.toml", verbose=verbose, outlook=outlook)


@pytest.mark.parametrize("name", PLANS)
def test_the_text_is_exactly_this(name: str) -> None:
    expected = (GOLDEN / f"{name}.plan.txt").read_text(encoding="utf-8")
    plan, *_ = PLANS[name]
    assert shown(name) == expected.removesuffix("\n").replace("{digest}", plan.digest[:12])


@pytest.mark.parametrize("name", PLANS)
def test_no_line_is_wider_than_80_columns_nor_ends_in_a_space(name: str) -> None:
    for line in shown(name).split("\n"):
        assert len(line) <= 80 and line == line.rstrip(), line


@pytest.mark.parametrize("name", PLANS)
def test_colour_only_decorates(name: str) -> None:
    plain = shown(name)
    coloured = decorated(plain, paint)
    assert coloured != plain and bare(coloured) == plain


def test_encoders_that_stay_are_told_apart() -> None:
    plan = examples.sd35_large_lora()
    both = ("text_encoder", "text_encoder_2")
    told = NewToken(token="<k4s4>", vectors=3, initial="a white dog that sleeps")
    others = [NewToken(token=f"<other-{n}>", vectors=1) for n in range(3)]
    words = Embeddings(encoders=both, tokens=(told, *others), lr=1e-3, until=10)
    trained = TextTraining(encoders=both[:1], adapter=plan.adapter, lr=2e-5, until=10)
    told_of = evolve(plan, embeddings=words, text_training=trained)
    lines = text(told_of, recipe="a.toml").split("\n")
    assert all(len(line) <= 80 for line in lines)
    fates = {name: line for line in lines if (name := line.strip().partition(" ")[0]) in both}
    first = [line for line in lines if line.startswith("  text_encoder ")]
    assert first[0].endswith("frozen, adapted, in each step")
    assert first[1].startswith("  text_encoder too: rank ") and "up to step 10" in first[1]
    assert fates["text_encoder_2"].endswith("frozen but for new tokens, in each step")
    assert any(line.startswith("  new tokens <k4s4> (3 vectors from ") for line in lines)


def test_a_long_path_stays_whole() -> None:
    plan = examples.quickstart()
    path = "/" + "x" * 200
    plan = evolve(plan, sources=(evolve(plan.sources[0], path=path),))
    assert any(path in line for line in text(plan, recipe="r.toml").split("\n"))


def test_the_sum_of_the_tutorial_is_spelt_out() -> None:
    found = shown("sd35-large-lora")
    assert "476 images x 5 = 2,380 samples / 6 = 397 batches, last of 4" in found
    assert "= 397 steps an epoch x 30 epochs = 11,910 steps" in found
    assert 476 * 5 == 2380 and -(-2380 // 6) == 397 and 397 * 30 == 11_910


def test_fractions_accumulation_and_ranks_are_spelt_out() -> None:
    plan = examples.quickstart()
    plan = evolve(
        plan,
        sources=(evolve(plan.sources[0], repeats="0.3"),),
        buckets=(evolve(plan.buckets[0], images=24, samples=8, batch_size=3, batches=3),),
        steps=evolve(plan.steps, samples_per_epoch=8, batches_per_epoch=4, per_epoch=1,
                     ranks=2, accumulate=2, total=5, epochs=5),
    )  # fmt: skip
    found = " ".join(text(plan, recipe="r.toml").split())
    assert "24 images x 0.3 -> 8 samples / 3 = 3 batches, last of 2" in found
    assert "8 samples in 4 batches / (2 ranks x 2 accumulated) = 1 step an epoch x 5" in found


def test_a_step_has_at_most_the_samples_of_an_epoch() -> None:
    """Steps end where an epoch does; of several stages, in the largest one's."""
    plan = examples.quickstart()
    steps = evolve(plan.steps, samples_per_epoch=120, batches_per_epoch=30, accumulate=32, total=10)
    buckets = (evolve(plan.buckets[0], samples=120, batch_size=4),)
    plan = evolve(plan, buckets=buckets, steps=steps)
    assert "10 steps of up to 120 samples" in text(plan, recipe="r.toml")
    first = Stage(first_epoch=0, first_step=0, per_epoch=1, batches_per_epoch=30,
                  samples_per_epoch=120, sources=("a",))  # fmt: skip
    stages = (first, evolve(first, first_epoch=1, first_step=1, samples_per_epoch=125))
    plan = evolve(plan, steps=evolve(steps, stages=stages))
    assert "10 steps of up to 125 samples" in text(plan, recipe="r.toml")


def test_what_takes_time_beside_training_is_named() -> None:
    plan = evolve(examples.sd35_large_lora(), evaluation=None)
    bare_plan = evolve(plan, validation=evolve(plan.validation, prompts=()))
    held = Evaluation(
        timesteps=(0.5,),
        every=10,
        weights="trained",
        manifest="",
        groups=(HeldOut(source="a", width=64, height=64, images=2, batch_size=1),),
    )
    both, alone = evolve(plan, evaluation=held), evolve(bare_plan, evaluation=held)
    for shown_plan, words in (
        (plan, "for pictures;"),
        (both, "for pictures and evaluation;"),
        (alone, "for evaluation;"),
    ):
        lines = " ".join(cost_lines(shown_plan, examples.outlook(), verbose=False))
        assert words in " ".join(lines.split())


def test_many_buckets_are_folded_unless_verbose() -> None:
    plan = examples.quickstart()
    buckets = tuple(evolve(plan.buckets[0], width=64 * n) for n in range(1, 21))
    plan = evolve(plan, buckets=buckets)
    assert "and 15 buckets more (-v)" in text(plan, recipe="r.toml")
    six = evolve(plan, buckets=buckets[:6])  # a row that says "1 more" would save nothing
    assert "more (-v)" not in text(six, recipe="r.toml")
    assert text(plan, recipe="r.toml", verbose=True).count("24 images x 2 =") == 20


@pytest.mark.parametrize(
    ("every", "start", "expected"),
    [(50, True, [0, 50, 100, 150, 200, 250]), (100, False, [100, 200, 250]), (0, True, [0, 250])],
)
def test_when_pictures_are_drawn(every: int, start: bool, expected: list[int]) -> None:
    plan = examples.quickstart()
    plan = evolve(plan, validation=evolve(plan.validation, every=every, at_start=start))
    assert validation_steps(plan) == expected
    assert checkpoint_steps(plan) == [100, 200, 250]
    assert validation_steps(evolve(plan, validation=evolve(plan.validation, prompts=()))) == []


def test_a_plan_of_many_sources_and_keys_fits_one_screen() -> None:
    plan = examples.sd35_large_lora()
    sources = tuple(evolve(plan.sources[0], id=f"s{n}") for n in range(3))
    buckets = tuple(
        evolve(plan.buckets[0], source=source.id, width=64 * n)
        for source in sources
        for n in range(8, 20)
    )
    chosen = [d for d in plan.decisions if not d.why]
    plan = evolve(plan, sources=sources, buckets=buckets, decisions=plan.decisions + (*chosen,) * 8)
    found = text(plan, recipe="sd35-large-lora.toml", outlook=examples.outlook())
    assert len(found.split("\n")) <= ONE_SCREEN + 6  # two more sources of three lines each
    assert "keys (-v)" in found


@pytest.mark.parametrize(
    ("resume", "words"),
    [
        (
            Resume(step=800, finished=False, changes=(), problem=""),
            "goes on from step 800 of 11,910",
        ),
        (Resume(step=0, finished=False, changes=(), problem=""), "it starts over"),
        (Resume(step=11_910, finished=True, changes=(), problem=""), "nothing to do"),
        (
            Resume(step=5, finished=False, changes=(("seed", "1", "2"),), problem=""),
            "with another plan (seed): `tuner run` will refuse",
        ),
        (Resume(step=5, finished=False, changes=(), problem="format 9"), "begun here: format 9"),
    ],
)
def test_what_a_run_would_go_on_from(resume: Resume, words: str) -> None:
    plan, outlook = examples.sd35_large_lora(), examples.outlook()
    assert outlook.present is not None
    outlook = evolve(outlook, present=evolve(outlook.present, resume=resume))
    found = text(plan, recipe="r.toml", outlook=outlook)
    line = next(
        line for line in found.split("\n") if line.startswith(("  = begun", "  = finished"))
    )
    assert words in " ".join(resume_words(plan, resume).split())
    assert decorated(line, lambda role, text: f"<{role}>{text}") == f"  <quiet>={line[3:]}"


def test_without_a_rate_the_plan_says_why() -> None:
    outlook = evolve(examples.outlook(), duration=None, unknown="there is no card", present=None)
    found = text(examples.sd35_large_lora(), recipe="r.toml", outlook=outlook)
    assert "time      not estimated: there is no card" in found
    assert "cached" not in found


def test_the_curve_follows_the_schedule() -> None:
    schedule = Schedule(name="cosine", warmup=100, length=1000, end=0.0, power=1.0, cycles=1)
    rows = [line[2 + len("0.01") + 1 :].ljust(COLUMNS) for line in draw(schedule, "0.01")[:ROWS]]
    for column in range(COLUMNS):
        drawn = sum(BLOCKS.index(row[column]) for row in rows) / (ROWS * (len(BLOCKS) - 1))
        step = round(column * 999 / (COLUMNS - 1))
        assert math.isclose(drawn, multiplier(schedule, step), abs_tol=0.5 / 24 + 1e-9)


def test_defaults_are_those_of_the_recipe() -> None:
    assert default_of("adapter.rank") == "16"
    assert default_of("train.schedule.warmup") == "0 steps"
    assert default_of("data.source[1].captions.from") == "textfile"
    assert default_of("data.source[0].resolution") == "auto"  # that of [data]
    assert default_of("validation.at_start") == "true"
    for key in ("train.optimizer.lr", "model.base", "no.such.key", "validation.prompts.a.b"):
        assert default_of(key) is None
    assert not differs("1", "1.0") and differs("16", "768") and differs("a", "b")


def test_who_is_told_is_said() -> None:
    rules = Publish(
        hub="me/k4s4", private=True, checkpoints=True, webhook="https://hooks.example/s3cret"
    )
    plan = evolve(examples.quickstart(), track=("wandb",), track_project="zorps", publish=rules)
    words = text(plan, recipe="quickstart.toml")
    for line in (
        "track     wandb (project zorps)",
        "publish   the result and each checkpoint, to me/k4s4 on the hub (private if it",
        "webhook   hooks.example is told of beginning and end",
        "publish to me/k4s4",
    ):
        assert line in words, line
    assert "s3cret" not in words


def test_a_run_begins_with_a_short_summary() -> None:
    lines = summary(examples.quickstart()).split("\n")
    assert len(lines) <= 8 and all(len(line) <= 80 for line in lines)
    assert lines[-1].startswith("Plan: cache 30 images, train 250 steps, draw 24 pictures (")


def test_a_full_fine_tune_and_no_simulation_read_well() -> None:
    plan = examples.quickstart()
    parts = tuple(evolve(c, trained=c.name == "transformer") for c in plan.model.components)
    plan = evolve(
        plan,
        adapter=None,
        model=evolve(plan.model, components=parts),
        memory=evolve(plan.memory, phases=(), counts={}),
    )
    found = text(plan, recipe="r.toml")
    assert "method    full fine-tune" in found and "memory    not simulated" in found
    assert "/model" in found


def test_the_range_of_a_table_is_said_in_timesteps() -> None:
    """The refiner's last fifth, as Diffusers' `denoising_start = 0.8` has it: t below 200."""
    plan = examples.quickstart()
    narrow = evolve(plan.objective, shift=1.0, max_sigma=0.2)
    table = NoiseTable(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for objective, words in (
        (narrow, "sigma 0 to 0.2"),
        (evolve(narrow, table=table), "timesteps 0 to 199 of 1000"),
    ):
        found = text(evolve(plan, objective=objective), recipe="r.toml")
        assert words in " ".join(found.split())


def test_json_has_what_programs_rely_on() -> None:
    plan = examples.sd35_large_lora()
    warning = Diagnostic(code="small-bucket", severity="warning", message="few images")
    found = json.loads(json.dumps(json_object(plan, (warning,), examples.outlook())))
    assert found["format_version"] == 1 and found["valid"] is True
    assert found["digest"] == plan.digest
    assert [found["steps"][k] for k in ("total", "per_epoch", "epochs")] == [11_910, 397, 30]
    assert found["buckets"] == [
        {"source": "k4s4", "width": 1024, "height": 1024, "images": 476, "samples": 2380,
         "batch_size": 6, "batches": 397}
    ]  # fmt: skip
    memory = found["memory"]
    assert memory["budget_bytes"] == 80 * 2**30
    assert (memory["peak_bytes"], memory["peak_phase"]) == (32_300 * 2**20, "train")
    assert set(memory["phases"][0]) == {"name", "device_bytes", "host_bytes", "parts"}
    assert all(set(row) == {"key", "value", "source", "why"} for row in found["decisions"])
    assert [row["code"] for row in found["warnings"]] == ["small-bucket"]
    assert found["disk"]["free_bytes"] == 500 * 2**30
    assert found["disk"]["result_bytes"] == 4 * 567_803_904
    assert found["disk"]["checkpoint_bytes"] == 11 * 12 * 567_803_904


def test_json_without_a_plan_says_why() -> None:
    error = Diagnostic(code="unknown-key", message="unknown key `rnk`")
    found = json_object(None, (error,))
    assert found["valid"] is False and "steps" not in found
    assert found["diagnostics"][0]["code"] == "unknown-key" and found["warnings"] == []


def test_how_numbers_are_spelt() -> None:
    assert [amount(n) for n in (512, 98_304, 83_819_683, 8_056_627_520)] == [
        "512", "98.3k", "83.8M", "8.06B",
    ]  # fmt: skip
    assert [size(n) for n in (812, 2**20, 52 * 2**20, 33_869_004_800)] == [
        "812 B", "1.0 MiB", "52.0 MiB", "31.5 GiB",
    ]  # fmt: skip
    assert in_unit_of(2**29, 2**31) == "0.5" and in_unit_of(2**20, 2**31) == "<0.1"
    assert [duration(s) for s in (0.47, 45, 125, 6600, 270_000)] == [
        "0.5 s", "45 s", "2 min 5 s", "1 h 50 min", "3 d 3 h",
    ]  # fmt: skip
    assert [clock(s) for s in (247, 6100)] == ["4:07", "1:41:40"]


def _rewrite() -> None:
    """Write the golden files anew: `python -m tests.tuner.test_plan_view`, then read the diff."""
    for name, (plan, *_) in PLANS.items():
        content = shown(name).replace(plan.digest[:12], "{digest}") + "\n"
        (GOLDEN / f"{name}.plan.txt").write_text(content, encoding="utf-8")


def test_an_adapter_says_its_sizes() -> None:
    plan = examples.sd35_large_lora()
    assert plan.adapter is not None
    lora = evolve(plan.adapter, rank=64, alpha=16.0, scaling="sqrt-rank", start="/a/lora/b.st")
    words = "lora, rank 64, alpha 16 (scale 2), 1 pattern of other ranks, from lora/b.st"
    assert adapter_words(evolve(lora, ranks=(Ranked(pattern="x", rank=4),))) == words
    dylora = evolve(lora, kind="dylora", block_size=4, ranks=(), start="")
    assert adapter_words(dylora).endswith("), blocks of 4")
    boft = evolve(lora, kind="boft", rank=0, block_size=8, butterfly_factors=2, start="")
    assert adapter_words(boft) == "boft, blocks of 8, 2 butterfly factors"


if __name__ == "__main__":
    _rewrite()
