"""The CLIP score: against the formula by hand, and in a run."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from compiler.passes.clip import KNOWN, NUMBER, parameters
from compiler.plan import Plan
from runtime.errors import MachineUnfit
from runtime.execute import execute
from runtime.scores.clip import ClipScore
from tests.runtime.plans import PICTURES, draw_data, tiny_plan
from tests.runtime.run_plan import Interrupting
from tests.runtime.tiny import clip_tokenizer
from tests.runtime.tiny_clip import EDGE, TOKENS, make_clip

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LONG = "a very long prompt about a dog " * 30
NEVER = ("", 0, signal.SIGTERM)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written into."""
    return make_clip(tmp_path_factory.mktemp("clip"))


def picture(seed: int) -> Image.Image:
    """Noise of the size that the model sees, so that nothing is resized."""
    values = np.random.default_rng(seed).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    return Image.fromarray(values)


def by_hand(folder: Path, image: Image.Image, prompt: str) -> float:
    """The formula in float64, from the model's two towers."""
    model = CLIPModel.from_pretrained(folder).double().eval()
    tokenizer = clip_tokenizer("<|endoftext|>")
    ids = tokenizer(prompt)["input_ids"]
    if len(ids) > TOKENS:
        ids = [*ids[: TOKENS - 1], ids[-1]]
    values = (np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD
    pixels = torch.from_numpy(values).permute(2, 0, 1)[None]
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0].numpy()
        read = model.text_model(torch.tensor([ids])).pooler_output
        read = model.text_projection(read)[0].numpy()
    cosine = float(seen @ read / np.sqrt((seen @ seen) * (read @ read)))
    return max(100 * cosine, 0.0)


def test_it_is_the_formula(clip: Path) -> None:
    score = ClipScore(str(clip)).score
    found = []
    for seed in range(6):
        for prompt in ("a dog", "a photo of sks dog", "", LONG):
            ours = score(picture(seed), prompt)
            assert ours == pytest.approx(by_hand(clip, picture(seed), prompt), abs=1e-3)
            found.append(ours)
    assert min(found) == 0.0 < max(found) < 100.0  # both sides of the maximum were met


def test_it_draws_from_no_generator(clip: Path) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    score = ClipScore(str(clip)).score
    score(picture(0), "a dog")
    assert torch.equal(torch.randn(3), expected)


def test_what_can_not_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(MachineUnfit, match="model of the CLIP score") as caught:
        ClipScore(str(tmp_path))
    assert "clip_score=false" in caught.value.help


@pytest.fixture
def made(clip: Path, tiny_sana: Path, tmp_path: Path) -> Any:
    """A plan of eight steps with pictures after every fourth."""
    draw_data(tmp_path / "dog")
    plan, manifest = tiny_plan(
        "sana", tiny_sana, tmp_path / "dog", tmp_path / "run", steps=8, every=3
    )
    return evolve(plan, validation=evolve(PICTURES, clip_model=str(clip))), manifest


def told(plan: Plan) -> dict[int, float]:
    """The score by step; each must be there once."""
    lines = (Path(plan.run_folder) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "evaluation/clip_score" in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row["evaluation/clip_score"] for row in rows}


def test_a_run_logs_it_with_the_pictures(made: Any, clip: Path) -> None:
    plan, manifest = made
    execute(plan, manifest, Interrupting(*NEVER))
    found = told(plan)
    assert sorted(found) == [0, 4, 8]
    for step, value in found.items():
        folder = Path(plan.run_folder) / "samples" / f"step-{step:06d}"
        content = json.loads((folder / "clip.json").read_text())
        assert content["mean"] == value and content["model"] == str(clip)
        with Image.open(folder / "dog-64x64-42.png") as image:
            image.load()
            assert value == ClipScore(str(clip)).score(image, plan.validation.prompts[0].text)


def test_a_run_that_goes_on_tells_what_was_lost(made: Any) -> None:
    """Pictures of step 4 are there, but the metrics behind checkpoint 3 are dropped."""
    plan, manifest = made
    execute(plan, manifest, Interrupting("step", 5, signal.SIGTERM))
    folder = Path(plan.run_folder)
    before = told(plan)
    for name in ("step-000005", "step-000006"):
        shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
    drawn = folder / "samples" / "step-000004" / "dog-64x64-42.png"
    changed = drawn.stat().st_mtime_ns
    execute(plan, manifest, Interrupting(*NEVER))
    after = told(plan)
    assert sorted(after) == [0, 4, 8] and before.items() <= after.items()
    assert drawn.stat().st_mtime_ns == changed


def test_parameters_are_those_that_are_built(tmp_path: Path) -> None:
    """The compiler's count, of what is known by name and of one in a folder."""
    for name, config in KNOWN.items():
        vision = {"num_attention_heads": 16 if "large" in name else 12}
        built = {**config, "vision_config": {**config.get("vision_config", {}), **vision}}
        with torch.device("meta"):
            model = CLIPModel(CLIPConfig(**built))
        assert parameters(config) == model.num_parameters(), name
    config = json.loads((make_clip(tmp_path / "clip") / "config.json").read_text())
    held = ClipScore(str(tmp_path / "clip"))._model
    assert NUMBER * parameters(config) == sum(p.nbytes for p in held.parameters())
