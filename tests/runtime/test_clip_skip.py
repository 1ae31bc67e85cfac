"""What the help on `clip_skip` says, against Diffusers' own argument."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from runtime.families.common import encode_prompts
from tests.compiler.recipes import FixedMemory, compiled, project
from tests.runtime.families.conformance import opened

PROMPTS = ["a photo of sks dog", ""]


def test_a_layer_less_is_what_clip_skip_is(tmp_path: Path) -> None:
    whole = opened("sd", tmp_path / "base")
    stock: StableDiffusionPipeline = whole.stock
    encoder: Any = stock.text_encoder
    if not hasattr(
        encoder, "text_model"
    ):  # Diffusers looks for it; transformers 5 has no such part
        object.__setattr__(encoder, "text_model", encoder)
    skipped, _ = stock.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=1)
    plain, _ = stock.encode_prompt(PROMPTS, "cpu", 1, False)
    place = tmp_path / "base" / "text_encoder" / "config.json"
    config = json.loads(place.read_text())
    config["num_hidden_layers"] -= 1
    place.write_text(json.dumps(config))
    shorter = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    parts = {name: getattr(shorter, name) for name in ("text_encoder", "tokenizer")}
    found = encode_prompts(whole.family, parts, PROMPTS, whole.text)
    states = torch.stack([each["encoder_hidden_states"] for each in found])
    assert torch.equal(states, skipped) and not torch.equal(states, plain)


@pytest.mark.parametrize("table", ["[text]", "[train]"])
def test_the_name_leads_there(tmp_path: Path, table: str) -> None:
    path = project(tmp_path)
    text = path.read_text()
    key = f"{table}\nclip_skip = 2\n"
    path.write_text(text.replace(f"{table}\n", key) if table in text else text + key)
    (fault,) = compiled(path, memory_model=FixedMemory()).diagnostics
    assert fault.code == "unknown-key" and "num_hidden_layers" in fault.help
