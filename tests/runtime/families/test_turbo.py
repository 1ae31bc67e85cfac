"""Few-step models of the UNets: drawn by their own sampler, which adds noise as it goes."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from attrs import evolve

from compiler.families import FAMILIES
from compiler.plan import Text
from runtime.families import family_of
from tests.runtime.families.conformance import CPU, Opened, check_pictures
from tests.runtime.tiny import make_tiny, tiny_model


def turbo(family: str, folder: Path) -> Opened:
    """A tiny pipeline with the scheduler that the published model has."""
    card, made = FAMILIES[family], make_tiny(family, folder)
    known = next(known for known in card.known if known.undistilled)
    config = known.configs["scheduler"]
    getattr(diffusers, config["_class_name"]).from_config(config).save_pretrained(
        made / "scheduler"
    )
    index = made / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", config["_class_name"]))
    model, own = tiny_model(family, made), family_of(family)
    parts = {name: own.load(model, name, torch.float32, CPU) for name in card.components}
    assert type(parts["scheduler"]).__name__ == config["_class_name"]
    assert parts["scheduler"].config.timestep_spacing == "trailing"
    stock = getattr(diffusers, card.pipeline).from_pretrained(made, dtype=torch.float32)
    stock.register_modules(scheduler=type(parts["scheduler"]).from_pretrained(made / "scheduler"))
    stock.set_progress_bar_config(disable=True)
    text = Text(max_length=card.prompt_length, instruction=card.instruction)
    return Opened(folder=made, family=own, parts=parts, stock=stock, text=text)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_pictures_without_guidance_are_the_pipeline_s(family: str, tmp_path: Path) -> None:
    given = turbo(family, tmp_path / "base")
    if family == "sdxl":
        given = evolve(given, text=evolve(given.text, zeros_for_empty=True))
    check_pictures(given, 0.0)
