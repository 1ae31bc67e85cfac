"""Text encoders from few of their layers: the same bytes as all give."""

from __future__ import annotations

import json

import pytest
from attrs import evolve

from compiler.memory import Candidate
from runtime.families import family_of
from runtime.memory.curve import NotAlike
from runtime.memory.layers import run_few
from runtime.memory.phases import META, run_text
from runtime.memory.pretend import as_on
from runtime.memory.simulate import RuntimeMemoryModel
from tests.runtime.memory_cases import small

MODEL = RuntimeMemoryModel()


def of_layers(count: int, device: str, quantize: str = "none") -> Candidate:
    """Small encoders with so many layers and prompts of full length."""
    step = small("sd3", device=device)
    configs = dict(step.model.configs)
    for name in family_of("sd3").card.text_encoders:
        config = json.loads(configs[name])
        key = "num_layers" if "num_layers" in config else "num_hidden_layers"
        configs[name] = json.dumps({**config, key: count})
    parts = tuple(
        evolve(part, quantize=quantize) if part.name == "text_encoder_3" else part
        for part in step.model.components
    )
    return evolve(step, model=evolve(step.model, configs=configs, components=parts))


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("count", [7, 19])
def test_few_layers_tell_what_all_need(count: int, device: str, quantize: str) -> None:
    step, family = of_layers(count, device, quantize), family_of("sd3")
    compared = 0
    with as_on(device):
        for name in family.card.text_encoders:
            whole = run_text(step, family, name, META, MODEL.tracker(device))
            try:
                few = run_few(step, family, name, MODEL.tracker(device))
            except NotAlike as reason:  # a small model's end may need more than its layers
                assert "after the layers" in str(reason)
                continue
            assert few == whole, name
            compared += 1
    assert compared


def test_encoders_of_few_layers_or_unknown_ones_are_run_whole() -> None:
    step = of_layers(6, "cpu")
    with pytest.raises(NotAlike, match="no equal layers"):
        run_few(step, family_of("sd3"), "text_encoder", MODEL.tracker("cpu"))
    other = small("sana")
    with pytest.raises(NotAlike, match="no equal layers"):
        run_few(other, family_of("sana"), "text_encoder", MODEL.tracker("cpu"))
