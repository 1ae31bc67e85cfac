"""The report: what it says, that it needs nothing from outside, and that nothing breaks it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from attrs import evolve
from PIL import Image

from compiler.data.counts import bucket_rows
from compiler.data.manifest import Manifest
from compiler.plan import Prompt
from tests.runtime.plans import manifest_of, source_of
from tests.tuner.examples import fake_run, quickstart
from tuner.charts import COLOURS, MAX_POINTS, chart, envelope, moving_average, thinned, ticks
from tuner.exits import DONE, FAILED, REFUSED
from tuner.report import rewrite_report, write_report
from tuner.report_compare import compare, titles
from tuner.report_pictures import MAX_STEPS, chosen, embedded
from tuner.run_data import read_run

HOSTILE = "</title><script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Tags, attributes and text of a document; fails if tags do not close as they opened."""

    VOID = frozenset({"meta", "img", "line", "polyline", "polygon", "input"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_finished_run_is_told_whole(tmp_path: Path) -> None:
    plan = quickstart()
    page = page_of(fake_run(tmp_path / "quickstart"))
    for words in (
        "finished",
        f"Plan {plan.digest[:12]}",
        "LoRA of rank 16 on /app/recipes/quickstart/base (sana)",
        "50% of the pictures showed what their prompt asks for before training;",
        "95% do after 250 steps.",
        "Untrained",
        "Step 250",
        "Gradient norm",
        "train.optimizer.lr 0.001 quickstart.toml:20",
        "2.13.0+cpu",
    ):
        assert words in page.text, words
    assert re.search(r"train 61\.0 MiB 60\.1 MiB \+1\.5%", page.text)
    assert page.count("svg") == 4
    # 2 prompts x 1 size x 2 seeds at 0, 50, ..., 250
    assert page.count("img") == 2 * 2 * 6


def test_it_needs_nothing_from_outside(tmp_path: Path) -> None:
    source = write_report(fake_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w+\.|@import|url\(|<script|<link", source)
    assert "default-src 'none'" in source
    page = Page(source)
    assert all(str(a.get("src", "data:")).startswith("data:") for _, a in page.tags)
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")


def test_the_untrained_picture_stands_first(tmp_path: Path) -> None:
    page = page_of(fake_run(tmp_path / "run"))
    columns = [
        a.get("class") for tag, a in page.tags if tag == "figure" and a.get("class") != "chart"
    ]
    assert columns == (["base"] + [None] * 5) * 2
    buttons = [a for tag, a in page.tags if tag == "input"]
    assert [a["aria-label"] for a in buttons[:5]] == [f"Step {n}" for n in (50, 100, 150, 200, 250)]
    assert ["checked" in a for a in buttons] == [False, False, False, False, True] * 2
    assert len({a["name"] for a in buttons}) == 2 and page.count("script") == 0


def test_the_style_sheet_has_a_rule_for_each_place_of_the_slider() -> None:
    css = (Path(__file__).parents[2] / "tuner" / "report.css").read_text()
    rule = re.compile(r":nth-child\((\d+)\):checked ~ \.pair \.frames > :nth-child\((\d+)\)")
    assert rule.findall(css) == [(str(n), str(n)) for n in range(1, MAX_STEPS + 1)]
    for place in range(COLOURS):
        assert css.count(f"--run-{place}:") == 2 and f"svg .run-{place} {{" in css


def test_what_happened_is_told(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[59]["spike"] = ["grad_norm"]
    rows[99] = {k: v for k, v in rows[99].items() if k not in ("loss", "grad_norm")}
    rows[99] |= {"skipped": 1, "names": ["zorps/1.png"]}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    happened = [
        {"at": 1.8e9, "step": 100, "level": "warning", "text": f"a bad step {HOSTILE}"},
        {"at": "x", "step": None, "level": "<b>", "text": "odd"},
        {"at": 1.8e9, "text": 5},
    ]
    lines = [*map(json.dumps, happened), '{"at": 1', ""]
    (folder / "events.jsonl").write_text("\n".join(lines))
    page = page_of(folder)
    for words in (
        "The gradient norm stood far above its running median at step 60;",
        "1 step changed no weight, because the loss or a gradient was not finite: step 100.",
        "Passed over 1 step with bad numbers",
        "a bad step",
        "- - odd",
    ):
        assert words in page.text, words
    assert page.count("polygon") == 1 and page.count("script") == 0


def test_a_contact_sheet_of_the_data(tmp_path: Path) -> None:
    folder, manifest = _run_with_data(tmp_path)
    page = page_of(folder)
    shown = [str(a["alt"]) for tag, a in page.tags if tag == "img" and "zorps/" in str(a["alt"])]
    assert len(shown) == 6 + 2  # six of the ten squares, both wide ones
    assert set(shown) <= {manifest.name(row) for row in range(len(manifest))}
    assert "zorps 64 x 64 \u00b7 10 images" in page.text
    for path in (tmp_path / "zorps").iterdir():
        path.unlink()
    assert not any("zorps/" in str(a.get("alt")) for _, a in page_of(folder).tags)


def _run_with_data(folder: Path) -> tuple[Path, Manifest]:
    (folder / "zorps").mkdir()
    for number in range(12):
        size = (70, 70) if number < 10 else (140, 70)
        Image.new("RGB", size, (20 * number, 90, 200)).save(folder / "zorps" / f"{number:02}.png")
    source = source_of(folder / "zorps")
    manifest = manifest_of([source])
    buckets = bucket_rows(manifest, (source,), [4])
    plan = evolve(quickstart(), sources=(source,), buckets=buckets, manifest=manifest.digest)
    manifest.save(fake_run(folder / "run", plan) / "manifest.jsonl")
    return folder / "run", manifest


def test_several_runs_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = quickstart()
    assert plan.adapter is not None
    other = evolve(
        plan,
        name=HOSTILE,
        adapter=evolve(plan.adapter, rank=4),
        checkpoints=evolve(plan.checkpoints, keep=7),
    )
    folders = [fake_run(tmp_path / "a"), fake_run(tmp_path / "b", other, done=120)]
    folders.append(fake_run(tmp_path / "c"))
    assert titles([read_run(f) for f in folders]) == [
        f"quickstart ({tmp_path / 'a'})",
        HOSTILE,
        f"quickstart ({tmp_path / 'c'})",
    ]
    assert compare(folders, tmp_path / "page.html") == DONE
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    source = (tmp_path / "page.html").read_text()
    page = Page(source)
    assert page.count("script") == 0 and not re.search(r"https?:|url\(|<link", source)
    assert "! adapter.rank 16 4 16" in page.text
    assert re.search(r"(?<!! )checkpoints\.keep 2 7 2", page.text)
    assert "run_folder" not in page.text
    # four charts, a line for each run; the last pictures of two prompts with two seeds each
    assert page.count("svg") == 4
    lines = [str(a["class"]) for tag, a in page.tags if tag == "polyline"]
    assert lines == ["line run-0", "line run-1", "line run-2"] * 4
    assert page.count("img") == 3 * 2 * 2
    assert "step 250" in page.text and "step 100" in page.text


def test_a_comparison_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake_run(tmp_path / "a")
    assert compare([run, tmp_path / "nothing", tmp_path], tmp_path / "x") == REFUSED
    told = capsys.readouterr().err
    assert "no folder" in told and "is no run folder" in told
    assert compare([run, run], tmp_path / "x") == REFUSED
    assert "given twice" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    plan = quickstart()
    plan = evolve(
        plan,
        name=HOSTILE,
        model=evolve(plan.model, base=HOSTILE),
        sources=(evolve(plan.sources[0], id=HOSTILE, path=HOSTILE),),
        buckets=(evolve(plan.buckets[0], source=HOSTILE),),
        validation=evolve(plan.validation, prompts=(Prompt(name="zorp", text=HOSTILE),)),
        decisions=tuple(evolve(d, value=HOSTILE, why=HOSTILE) for d in plan.decisions),
    )
    folder = fake_run(tmp_path / "run", plan)
    (folder / "recipe.toml").write_text(HOSTILE)
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (folder / "samples" / "step-000050" / f"{'%3Cb%3E'}-64x64-1.png").write_bytes(
        (folder / "samples" / "step-000050" / "zorp-64x64-42.png").read_bytes()
    )
    page = page_of(folder)
    assert page.count("script") == 0 and page.count("title") == 1
    assert page.text.count("alert(1)") > 8
    assert "<b>" in page.text


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    page = page_of(fake_run(tmp_path / "run", done=120))
    assert "step 120 of 250" in page.text and "finished" not in page.text
    assert "do after 100 steps." in page.text


@pytest.mark.parametrize(
    "missing",
    [
        "metrics.jsonl",
        "measured.json",
        "environment.json",
        "recipe.toml",
        "samples",
        "plan.lock.toml",
    ],
)
def test_what_is_missing_is_left_out(tmp_path: Path, missing: str) -> None:
    folder = fake_run(tmp_path / "run")
    (folder / missing).rename(tmp_path / "gone")
    page = page_of(folder)
    assert "run" in page.text or "quickstart" in page.text
    assert (page.count("svg") == 0) is (missing == "metrics.jsonl")
    assert (page.count("img") == 0) is (missing == "samples")


def test_damage_is_left_out(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 251, "loss": NaN, "lr": "x"}\n[1]\n{"step"')
    (folder / "measured.json").write_text("[" * 100_000)
    (folder / "environment.json").write_text("[]")
    (folder / "samples" / "step-000050" / "zorp-64x64-42.png").write_bytes(b"no picture")
    (folder / "samples" / "step-000050" / "scores.json").write_text('{"mean": null}')
    (folder / "samples" / "step-000250" / "scores.json").write_text('{"mean": 1.0, "prompts": 3}')
    page = page_of(folder)
    assert page.count("img") == 2 * 2 * 6 - 1 and page.count("svg") == 4
    assert "By prompt" not in page.text


def test_only_like_is_set_beside_like(tmp_path: Path) -> None:
    """Measured on something smaller, or not at all: no figure for how far off the plan was."""
    folder = fake_run(tmp_path / "run")
    measured = json.loads((folder / "measured.json").read_text())
    memory = {
        name: {"planned_bytes": 4096, "measured_bytes": 2048} for name in ("train", "validate")
    }
    memory["validate"] |= {"measured_on": "64x64", "planned_on": "<b>128x64"}
    memory["latents"] = {"planned_bytes": 4096, "measured_bytes": None, "note": "all was cached"}
    (folder / "measured.json").write_text(json.dumps(measured | {"memory": memory}))
    section = (
        write_report(folder).read_text().split("Device memory at its peak")[1].split("<h2>")[0]
    )
    rows = {row.split("</td>")[0].split(">")[-1]: row for row in section.split("<tr>")}
    assert ">+100.0%<" in rows["train"] and ">4.0 KiB<" in rows["train"]
    assert all(rows[name].split("</tr>")[0].count("%<") == 0 for name in ("validate", "latents"))
    assert "validate was measured on 64x64, planned for &lt;b&gt;128x64" in section
    assert "latents: all was cached" in section


def test_a_step_that_was_written_twice_counts_once(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 250, "loss": 7.0}\n')
    points = read_run(folder).series("loss")
    assert len(points) == 250 and points[-1] == (250.0, 7.0)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fake_run(tmp_path / "run")
    assert rewrite_report(folder) == DONE
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert rewrite_report(tmp_path / "nothing") == REFUSED
    assert rewrite_report(tmp_path) == REFUSED
    assert "is no run folder" in capsys.readouterr().err


def test_a_report_that_can_not_be_written_is_said_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake_run(tmp_path / "run")

    def full(path: Path, content: bytes) -> None:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert rewrite_report(folder) == FAILED
    assert "the report can't be written: [Errno 28] No space left" in capsys.readouterr().err
    assert not list(folder.glob(".partial-*"))


def test_large_pictures_are_embedded_small(tmp_path: Path) -> None:
    import base64
    import io

    noise = Image.effect_noise((1280, 768), 90.0)
    noise.save(tmp_path / "x.png")
    kind, _, content = embedded(tmp_path / "x.png").partition(",")
    small = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == "data:image/jpeg;base64" and small.size == (448, 269)


def test_of_many_steps_the_first_and_the_last_are_shown() -> None:
    found = chosen(range(0, 3001, 100))
    assert len(found) == MAX_STEPS and found[0] == 0 and found[-1] == 3000
    assert chosen({5, 0}) == [0, 5]


def test_the_moving_average_is_bias_corrected() -> None:
    constant = [(float(n), 3.0) for n in range(50)]
    assert all(abs(value - 3.0) < 1e-12 for _, value in moving_average(constant))
    # window 5: decay 0.8; by hand: (0.2 * 0.8 * 1 + 0.2 * 2) / (1 - 0.8**2)
    assert moving_average([(1.0, 1.0), (2.0, 2.0)])[1][1] == pytest.approx(0.56 / 0.36)


def test_long_curves_keep_their_spikes_and_ends() -> None:
    points = [(float(n), 100.0 if n == 7777 else n % 7 / 7) for n in range(12_000)]
    assert max(value for _, value in envelope(points)) == 100.0
    assert len(envelope(points)) <= 2 * MAX_POINTS
    assert len(thinned(points)) <= MAX_POINTS + 1 and thinned(points)[-1] == points[-1]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 250, [0, 50, 100, 150, 200, 250]),
        (3, 4.1, [3, 3.5, 4]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5 if low == 0 else 3) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[1.0], [], [float("nan")] * 3])
def test_nothing_to_draw_is_no_chart(values: list[float]) -> None:
    assert chart("x", list(enumerate(values, 1))) == ""


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 5.0], [-1.0, 1e9], [1e-30, 2e-30]])
def test_any_range_can_be_drawn(values: list[float]) -> None:
    drawn = chart("x", list(enumerate(values, 1)), smooth=True)
    assert Page(drawn).count("polyline") == 2 and "nan" not in drawn


def _judged(folder: Path, values: dict[int, float], key: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": n, key: value}) + "\n" for n, value in values.items())


def test_what_was_judged_has_curves(tmp_path: Path) -> None:
    plan = quickstart()
    rules = evolve(plan.checkpoints, best="evaluation/loss")
    run = fake_run(tmp_path / "run", evolve(plan, checkpoints=rules))
    _judged(run, {0: 0.9, 100: 0.5, 200: 0.6}, "evaluation/loss")
    _judged(run, {0: 0.8, 100: 0.4, 200: 0.5}, "evaluation/loss/cats")
    _judged(run, {0: 20.0, 200: 25.5}, "evaluation/clip_score")
    for step in (100, 200):
        place = run / "checkpoints" / f"step-{step:06d}"
        place.mkdir(parents=True)
        (place / "state.json").write_text(json.dumps({"step": step, "files": {}}))
    page = page_of(run)
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels[4:] == [
        "Evaluation loss: 0.9 at first, 0.6 at last",
        "Evaluation loss: cats: 0.8 at first, 0.5 at last",
        "CLIP score: 20 at first, 25.5 at last",
    ]
    assert "the triangle marks step 100, the best that is kept" in page.text
    assert "Evaluation loss 0.6 from 0.9" in page.text and "CLIP score 25.5 from 20" in page.text
    other = fake_run(tmp_path / "other")
    assert compare([run, other], tmp_path / "both.html") == DONE
    both = Page((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert any("CLIP score at last: 25.5" in str(attrs.get("aria-label")) for _, attrs in both.tags)
