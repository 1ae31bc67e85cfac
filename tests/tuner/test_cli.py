"""The command line as a person and a script meet it: streams, exit codes, cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuner import __version__, cli, exits
from tuner.cli import run_command

ROOT = Path(__file__).parents[2]
DENIED = {
    "torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "PIL",
    "rich", "rich.progress", "pydantic",
}  # fmt: skip
BROKEN = """\
schema = 1
name = "x"

[model]
family = "sd3"
base = "nowhere"

[adapter]
kind = "lora"
rnk = 16

[data]
[[data.source]]
path = "missing"

[train]
epochs = 1
optimizer = { lr = 1e-4 }
"""
MOST_MODULES = 430  # of `tuner plan broken.toml`; torch alone would add a thousand


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.toml"
    path.write_text(BROKEN)
    return path


def process(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuner", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1", **variables},
        check=False,
    )


def modules_of(*arguments: str) -> set[str]:
    code = (
        "import sys, json; from tuner.cli import run_command\n"
        f"code = run_command({list(arguments)!r})\n"
        "print('\\n' + json.dumps([code, sorted(sys.modules)]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr.splitlines()[-1])[1])


def test_help_names_the_verbs_and_imports_nothing_slow() -> None:
    done = process("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(f"\n  {verb} " in done.stdout for verb in ("plan", "run", "doctor", "report"))
    assert modules_of("--help") & DENIED == set()
    assert not any(name.startswith("compiler") for name in modules_of("--help"))


def test_a_wrong_recipe_is_refused_without_anything_slow(broken: Path) -> None:
    modules = modules_of("plan", str(broken))
    assert modules & DENIED == set()
    assert len(modules) < MOST_MODULES


def test_a_wrong_recipe_is_exit_2_with_all_said_on_stderr(broken: Path) -> None:
    done = process("plan", str(broken))
    assert done.returncode == exits.REFUSED
    assert done.stdout == ""
    assert f"{broken}:10:1" in done.stderr and "did you mean `rank`?" in done.stderr
    assert done.stderr.rstrip().endswith("error") or done.stderr.rstrip().endswith("errors")
    assert "Traceback" not in done.stderr


def test_json_of_a_wrong_recipe_is_one_object_on_stdout(broken: Path) -> None:
    done = process("plan", str(broken), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == exits.REFUSED and done.stderr == ""
    assert found["format_version"] == 1 and found["valid"] is False
    fault = next(fault for fault in found["diagnostics"] if fault["code"] == "unknown-key")
    assert fault["start"] == {"line": 9, "character": 0}
    assert "digest" not in found


def test_run_of_a_wrong_recipe_starts_nothing(broken: Path) -> None:
    done = process("run", str(broken))
    assert done.returncode == exits.REFUSED and done.stdout == ""
    assert list(broken.parent.iterdir()) == [broken]


def test_colour_only_decorates(broken: Path) -> None:
    from tuner.screen import bare

    plain = process("plan", str(broken)).stderr
    coloured = process("plan", str(broken), NO_COLOR="", FORCE_COLOR="1").stderr
    assert "\x1b[" not in plain and "\x1b[" in coloured
    assert bare(coloured) == plain
    assert process("plan", str(broken), FORCE_COLOR="1").stderr == plain  # NO_COLOR wins


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plam"], "no such command 'plam'"),
        (["plan"], "missing argument"),
        (["plan", "x.toml", "--jsn"], "no such option"),
    ],
)
def test_a_wrong_command_line_is_exit_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == exits.REFUSED
    said = capsys.readouterr()
    assert words in said.err.lower() and said.out == ""
    assert "--help` lists what it takes" in said.err


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([]) == exits.REFUSED
    assert "Commands:" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == exits.DONE
    assert capsys.readouterr().out == f"tuner {__version__}\n"


def test_our_bug_is_exit_70_and_the_traceback_is_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken_app(**_: object) -> int:
        raise ZeroDivisionError("one over\nnothing")

    monkeypatch.setattr(cli, "app", broken_app)
    assert run_command(["plan", "x.toml"]) == exits.BUG
    said = capsys.readouterr()
    (saved,) = tmp_path.iterdir()
    assert said.out == "" and "Traceback" not in said.err
    assert said.err.splitlines() == [
        "tuner: this is a bug in tuner, not in your recipe (ZeroDivisionError: one over)",
        f"  please report it with {saved}",
    ]
    story = saved.read_text()
    assert "Traceback" in story and "tuner plan x.toml" in story


def test_ctrl_c_is_exit_130_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(**_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", stopped)
    assert run_command(["plan", "x.toml"]) == exits.STOPPED
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "tuner", "--version"],
            cwd=ROOT, stdout=gone, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
