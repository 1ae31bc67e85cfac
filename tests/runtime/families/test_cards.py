"""The cards' facts against the classes and pipelines they are about."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from compiler.families import FAMILIES
from compiler.families.card import FamilyCard, KnownModel
from runtime.families.common import class_called
from runtime.methods.lora import is_linear, matching

KNOWN = [(card, known) for card in FAMILIES.values() for known in card.known]
ENCODING = {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
counted: dict[str, tuple[int, int]] = {}  # configurations are shared between models


def on_meta(card: FamilyCard, name: str, config: dict[str, Any]) -> nn.Module:
    cls, library = class_called(card.components[name], card)
    with torch.device("meta"):
        if library == "diffusers":
            module: nn.Module = cls.from_config(config)
            return module
        module = cls(cls.config_class.from_dict(config))
        return module


def names(model: KnownModel) -> list[str]:
    return [name for name in model.configs if name != "scheduler"]


@pytest.mark.parametrize(("card", "known"), KNOWN, ids=[known.base for _, known in KNOWN])
def test_parameters_are_those_of_the_classes(card: FamilyCard, known: KnownModel) -> None:
    for name in names(known):
        config = dict(known.configs[name])
        key = repr(config)
        if key not in counted:
            module = on_meta(card, name, config)
            counted[key] = sum(p.numel() for p in module.parameters()), 0
        assert known.parameters[name] == counted[key][0], name
    assert set(known.parameters) == set(names(known))


@pytest.mark.parametrize(("card", "known"), KNOWN, ids=[known.base for _, known in KNOWN])
def test_diffusers_knows_every_key(card: FamilyCard, known: KnownModel) -> None:
    for name in ("scheduler", card.trained_component, "vae"):
        config = dict(known.configs[name])
        cls = getattr(diffusers, config.pop("_class_name"))
        assert set(config) <= set(inspect.signature(cls.__init__).parameters), name
        if name != "scheduler" or card.prediction == "flow":  # others sample as the base says
            assert cls.__name__ == card.components[name]


@pytest.mark.parametrize("card", FAMILIES.values(), ids=list(FAMILIES))
def test_defaults_are_the_pipeline_s(card: FamilyCard) -> None:
    call = inspect.signature(getattr(diffusers, card.pipeline).__call__).parameters
    assert call[card.guidance_argument].default == card.guidance
    assert call["num_inference_steps"].default == card.inference_steps
    length = call["max_sequence_length"].default if "max_sequence_length" in call else 77
    assert length == card.prompt_length
    if "complex_human_instruction" in call:
        assert tuple(call["complex_human_instruction"].default) == card.instruction
    elif "system_prompt" in call:  # its default is the pipeline's own
        parts = dict.fromkeys(card.components)
        assert (getattr(diffusers, card.pipeline)(**parts).system_prompt,) == card.instruction
    else:
        assert card.instruction == ()


@pytest.mark.parametrize("card", FAMILIES.values(), ids=list(FAMILIES))
def test_components_are_the_pipeline_s(card: FamilyCard) -> None:
    pipeline = getattr(diffusers, card.pipeline)
    taken = inspect.signature(pipeline.__init__).parameters
    settings = {name for name, one in taken.items() if isinstance(one.default, bool)}
    wanted = set(taken) - {"self"} - settings
    optional = set(pipeline._optional_components)
    required = set(card.components) - (optional & ENCODING)  # which SDXL can do without
    assert required == wanted - optional - set(card.pipeline_options)
    assert set(card.components) <= wanted
    assert list(card.components) == sorted(card.components)


def transformer_of(base: str) -> tuple[FamilyCard, nn.Module]:
    card, known = next((c, k) for c, k in KNOWN if k.base == base)
    return card, on_meta(card, "transformer", dict(known.configs["transformer"]))


def rank_4(module: nn.Module, card: FamilyCard, targets: str) -> int:
    """Parameters of an adapter of rank 4."""
    total = 0
    for name in matching(module, card.target_sets[targets]):
        layer = module.get_submodule(name)
        out, into = layer.weight.shape[:2]
        total += 4 * (out + into)
    return total


def test_lora_sizes_are_those_measured_with_the_reference_scripts() -> None:
    """2.15 and 2.35 million: measured in the scripts' runs on the published configurations."""
    card, sana = transformer_of("Efficient-Large-Model/Sana_1600M_1024px_diffusers")
    assert rank_4(sana, card, "attention") == pytest.approx(2.15e6, rel=3e-3)
    card, medium = transformer_of("stabilityai/stable-diffusion-3-medium-diffusers")
    assert rank_4(medium, card, "attention") == pytest.approx(2.35e6, rel=3e-3)


@pytest.mark.parametrize(
    ("base", "targets", "count"),
    [
        ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "attention", 20 * 6),
        ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "attention-out", 20 * 8),
        ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "all-linear", 20 * 10),
        ("stabilityai/stable-diffusion-3.5-medium", "attention", 24 * 8 - 1),
        ("stabilityai/stable-diffusion-3.5-medium", "attention-all", 24 * 8 - 1 + 13 * 4),
        ("stabilityai/stable-diffusion-3.5-large", "attention-image", 38 * 4),
    ],
)
def test_target_sets_match_these_many_layers(base: str, targets: str, count: int) -> None:
    card, module = transformer_of(base)
    assert len(matching(module, card.target_sets[targets])) == count


@pytest.mark.parametrize(
    "base", [k.base for c, k in KNOWN if "3.5-medium" in k.base or "600M_1024" in k.base]
)
def test_all_linear_is_every_linear_layer_of_the_blocks(base: str) -> None:
    card, module = transformer_of(base)
    blocks = {
        name
        for name, layer in module.named_modules()
        if name.startswith(card.blocks) and is_linear(layer)
    }
    assert set(matching(module, card.target_sets["all-linear"])) == blocks


def test_the_published_shift_is_found_in_either_key() -> None:
    sana, sd3 = FAMILIES["sana"], FAMILIES["sd3"]
    assert sana.shift(sana.known[0].configs["scheduler"]) == (3.0, "flow_shift")
    assert sd3.shift(sd3.known[0].configs["scheduler"]) == (3.0, "shift")
    assert sana.multiple(sana.known[0].configs) == 32
    assert sd3.multiple(sd3.known[0].configs) == 16
