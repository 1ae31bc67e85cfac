"""`tuner run` twice, whole: one that ended before it trained goes on with a changed recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler import lock
from compiler.data.manifest import Manifest
from compiler.plan import lock_path
from tests.compiler.data.pictures import encoded, picture, put
from tests.runtime.tiny import make_tiny
from tuner.cli import run_command
from tuner.exits import DONE, FAILED, REFUSED

RECIPE = """\
name = "one"
[model]
family = "sana"
base = "base"
[adapter]
kind = "lora"
rank = 2
[cache]
path = "cache"
[memory]
budget = "none"
[precision]
compute = "fp32"
[train]
epochs = 1
batch_size = 2
optimizer = { name = "adamw", lr = 1e-3 }
[data]
resolution = 64
captions = { from = "instance", prompt = "a dog" }
[[data.source]]
path = "dogs"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe's folder, with five pictures, of which one is broken where no header shows it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    make_tiny("sana", tmp_path / "base")
    files = {f"{n}.png": encoded(picture(70, 70, seed=n), "PNG") for n in range(5)}
    sound = files["2.png"]
    middle = sound.index(b"IDAT") + 40
    files["2.png"] = sound[:middle] + bytes(len(sound) - middle - 12) + sound[-12:]
    put(tmp_path / "dogs", files)
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def ran(here: Path, *words: str) -> int:
    return run_command(["run", str(here / "r.toml"), *words])


@pytest.mark.slow
def test_as_the_message_about_broken_pictures_says(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run again, which names them, and again with `skip`. What is trained then is held to."""
    assert ran(here) == FAILED
    assert "run the recipe again" in capsys.readouterr().err
    run = here / "runs" / "one"
    first = lock.read(lock_path(run))
    assert ran(here) == REFUSED
    assert "2.png: broken image data" in " ".join(capsys.readouterr().err.split())
    assert lock.read(lock_path(run)).digest == first.digest
    (here / "r.toml").write_text(RECIPE.replace("[data]\n", '[data]\nbroken = "skip"\n'))
    assert ran(here) == DONE
    said = capsys.readouterr()
    assert "begun here, without a checkpoint: it starts over" in said.err
    assert str(run) in said.out
    plan = lock.read(lock_path(run))
    assert (first.sources[0].images, plan.sources[0].images) == (5, 4)
    assert Manifest.load(run / "manifest.jsonl").digest == plan.manifest
    assert run_command(["run", str(lock_path(run))]) == DONE
    assert ran(here, "--set", "train.optimizer.lr=2e-3") == REFUSED
    assert "begun with another plan" in capsys.readouterr().err
    assert lock.read(lock_path(run)).digest == plan.digest
