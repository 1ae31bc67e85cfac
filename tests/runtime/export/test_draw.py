"""`tuner sample` draws what the run drew for itself; refuses what the family can't draw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attrs import evolve
from PIL import Image
from safetensors import SafetensorError

from compiler.plan import Precision
from runtime.errors import MachineUnfit, OutOfMemory, RunFailed
from runtime.export.draw import draw
from runtime.export.pictures import pictures
from runtime.export.request import Refused, chosen
from tests.runtime.export.runs import PROMPT, VALIDATION

MIXED = Precision(compute="bfloat16", weights="bfloat16", trained="float32", cache="bfloat16")


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@pytest.mark.parametrize(
    ("family", "settings"),
    [("sd3", {}), ("sana", {}), ("sd3", {"full": True}), ("sd3", {"precision": MIXED})],
    ids=["sd3", "sana", "full", "mixed"],
)
def test_the_run_s_own_pictures(runs, family, settings, tmp_path):
    """Bit for bit: same prompt, negative prompt, seeds, size, and weights (the average)."""
    plan = runs(family, **settings)
    weights = chosen(Path(plan.run_folder))
    wanted = pictures(weights, [PROMPT], count=2, out=tmp_path)
    assert (wanted.negative, wanted.steps, wanted.guidance) == ("a cat", 2, 3.0)
    drawn = draw(weights, wanted)
    own = Path(plan.run_folder) / "samples/step-000004"
    for seed, path in zip(VALIDATION.seeds, drawn, strict=True):
        assert pixels(path) == pixels(own / f"dog-64x64-{seed}.png")
    assert pixels(drawn[0]) != pixels(drawn[1])


def test_a_checkpoint_and_other_wishes(runs, tmp_path):
    plan = runs("sd3")
    weights = chosen(Path(plan.run_folder), step=2, ema=False)
    wanted = pictures(
        weights, ["a cat", "a dog"], size="80x64", negative="", guidance=1.5, steps=3, seed=9
    )
    assert [d.seed for d in wanted.drawings] == [9, 9]
    assert wanted.drawings[0].path.parent == Path(plan.run_folder) / "drawn/step-000002"
    moved = evolve(
        wanted, drawings=tuple(evolve(d, path=tmp_path / d.path.name) for d in wanted.drawings)
    )
    for path in draw(weights, moved):
        with Image.open(path) as image:
            assert image.size == (80, 64)


def test_no_file_is_written_over(runs, tmp_path):
    weights = chosen(Path(runs("sd3").run_folder))
    (tmp_path / "a%2Fb-64x64-42.png").touch()
    wanted = pictures(weights, ["a/b", "a/b"], out=tmp_path)
    assert [d.path.name for d in wanted.drawings] == [
        "a%2Fb-64x64-42 (2).png",
        "a%2Fb-64x64-42 (3).png",
    ]


@pytest.mark.parametrize(
    ("options", "message", "help"),
    [
        ({"size": "70x64"}, "multiples of 16", "64x64"),
        ({"size": "large"}, "no size", "1024x768"),
        ({"device": "tpu"}, "unknown device", "cuda"),
    ],
)
def test_refusals(runs, options, message, help, tmp_path):
    weights = chosen(Path(runs("sd3").run_folder))
    with pytest.raises(Refused, match=message) as caught:
        pictures(weights, ["x"], out=tmp_path, **options)
    assert help in caught.value.help


def test_a_device_that_is_not_here(runs, tmp_path):
    weights = chosen(Path(runs("sd3").run_folder))
    with pytest.raises(MachineUnfit, match="xpu"):
        draw(weights, pictures(weights, ["x"], device="xpu", out=tmp_path))


def failing(monkeypatch, error):
    """Drawing ends with `error`."""

    def fails(*_):
        raise error

    monkeypatch.setattr("runtime.export.draw._draw", fails)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError("no memory left")]
)
def test_pictures_that_need_too_much_memory(runs, tmp_path, monkeypatch, error):
    failing(monkeypatch, error)
    weights = chosen(Path(runs("sd3").run_folder))
    wanted = pictures(weights, ["x"], size="512x640", out=tmp_path)
    with pytest.raises(OutOfMemory, match="memory drawing pictures of 512x640 pixels") as caught:
        draw(weights, wanted)
    assert caught.value.help == "draw smaller ones with --size"


@pytest.mark.parametrize("error", [SafetensorError("header too large"), OSError("disk full")])
def test_files_that_fail(runs, tmp_path, monkeypatch, error):
    failing(monkeypatch, error)
    weights = chosen(Path(runs("sd3").run_folder))
    with pytest.raises(RunFailed, match=str(error)):
        draw(weights, pictures(weights, ["x"], out=tmp_path))
