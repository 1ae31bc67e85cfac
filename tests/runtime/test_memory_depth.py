"""A deep model's memory from that of shallow ones: the same bytes as all its blocks give."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from compiler.families import FAMILIES
from compiler.memory import Candidate
from compiler.plan import Layout, Ranked
from runtime.memory.curve import Curve, NotAlike, affine, deeper, highest
from runtime.memory.shallow import shallow
from runtime.memory.simulate import RuntimeMemoryModel
from tests.runtime.memory_cases import BASES, SMALL, SMALL_PARTS, candidate, known, small

MODEL = RuntimeMemoryModel()
NUMBERS = (
    "load",
    "train_peak",
    "after",
    "update_peak",
    "save",
    "evaluate_peak",
    "validate_peak",
    "host",
    "largest",
    "flops",
    "parameters",
    "adapted_modules",
    "trainable",
)


def deep(family: str, depth: int, **options: Any) -> Candidate:
    """A small model of `depth` blocks with everything that the large ones have."""
    shape = {**SMALL[family], "num_layers": depth}
    if family == "sd3":
        shape["dual_attention_layers"] = options.pop("dual", [])
    given = {
        "tokens": 32,
        "shapes": ((256, 256, 2),),
        "pictures": ((128, 128),),
        "evaluated": ((256, 192, 3),),
        **options,
    }
    return candidate(known(BASES[family], SMALL_PARTS[family], **shape), **given)


def check(step: Candidate) -> None:
    depths = shallow(step)
    assert depths is not None
    ours, whole = MODEL._deep(step, depths, step.shapes[0]), MODEL.whole(step, step.shapes[0])
    for name in NUMBERS:
        assert getattr(ours, name) == getattr(whole, name), name


OPTIONS: list[dict[str, Any]] = [
    {"rank": 4},
    {"rank": 4, "checkpointing": 1},
    {"rank": 4, "checkpointing": 2},
    {"rank": 4, "checkpointing": 4, "dropout": 0.1},
    {"rank": 4, "layout": Layout(offload_activations=True, activation_checkpointing=1)},
    {"rank": 4, "layout": Layout(offload_blocks=99)},
    {"rank": 4, "layout": Layout(offload_blocks=99, offload_activations=True)},
    {"rank": 4, "accumulate": 3, "ema": True, "device": "cpu", "compute": "float32"},
    {"rank": 4, "layout": Layout(offload_blocks=15, offload_activations=True)},
    {"rank": 4, "layout": Layout(offload_blocks=10, activation_checkpointing=1)},
    {"layout": Layout(fused_backward=True), "max_grad_norm": 0.0, "ema": True},
    {
        "layout": Layout(fused_backward=True, activation_checkpointing=1),
        "max_grad_norm": 0.0,
        "trained": "bfloat16",
        "optimizer": "adamw-8bit",
    },
    {"rank": 4, "layout": Layout(fused_backward=True), "max_grad_norm": 0.0},
    {"checkpointing": 1, "trained": "bfloat16"},
    {"trained": "float32", "optimizer": "radam", "fused": False},
    {"trained": "bfloat16", "optimizer": "sgd", "checkpointing": 2, "max_grad_norm": 0.0},
]
PAIRS = [  # the first two with both families, the others with one of them
    (family, options)
    for number, options in enumerate(OPTIONS)
    for family in ("sana", "sd3")
    if number < 2 or number % 2 == (family == "sd3")
]


@pytest.mark.parametrize(("family", "options"), PAIRS, ids=str)
def test_deep_models(family: str, options: dict[str, Any]) -> None:
    plain = "checkpointing" not in options and "layout" not in options
    check(deep(family, 13 if plain else 31, **options))


LATER = ["lumina2", "pixart", "qwen_image", "z_image"]
ADAPTED = {"rank": 4, "layout": Layout(offload_blocks=99, activation_checkpointing=2)}
WHOLE = {"trained": "bfloat16", "optimizer": "sgd", "checkpointing": 1, "max_grad_norm": 0.0}
FUSED = {"layout": Layout(fused_backward=True), "max_grad_norm": 0.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, ADAPTED) for family in LATER[::2]),
    *((family, WHOLE) for family in LATER[1::2]),
    ("qwen_image", FUSED),  # part of its last block gets no gradient
]


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_deep_models_of_later_families(family: str, options: dict[str, Any]) -> None:
    """Small, but with long runs of equal blocks, where the published ones have them."""
    step, card = small(family, device="cuda", compute="bfloat16", **options), FAMILIES[family]
    configs, runs = dict(step.model.configs), card.runs
    config = json.loads(configs[card.trained_component])
    published = dict(card.known[0].configs[card.trained_component])
    assert runs is not None
    counts = [min(count, 23) for count in runs(published) or ()]
    configs[card.trained_component] = json.dumps(card.shortened(config, counts))
    check(evolve(step, model=evolve(step.model, configs=configs)))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sdxl", {"rank": 4, "layout": Layout(offload_blocks=99, activation_checkpointing=1)}),
        ("sdxl", {"trained": "bfloat16", "checkpointing": 2, "accumulate": 2, "ema": True}),
        ("kolors", {"layout": Layout(fused_backward=True), "max_grad_norm": 0.0}),
    ],
    ids=str,
)
def test_transformers_in_several_places(family: str, options: dict[str, Any]) -> None:
    """Those of a UNet's levels, on the way down, in the middle and on the way up."""
    step, card = small(family, device="cuda", compute="bfloat16", **options), FAMILIES[family]
    config = json.loads(step.model.configs["unet"])
    short = [1] * (len(config["down_block_types"]) - 2)
    configs = {**step.model.configs, "unet": json.dumps(card.shortened(config, [*short, 2, 11]))}
    check(evolve(step, model=evolve(step.model, configs=configs)))


def ranked(pattern: str) -> Candidate:
    step = deep("sd3", 30, rank=4)
    assert step.adapter is not None
    return evolve(step, adapter=evolve(step.adapter, ranks=(Ranked(pattern=pattern, rank=16),)))


@pytest.mark.parametrize(
    "pattern",
    [
        r"transformer_blocks\.25\..*",
        r"transformer_blocks\.[0-9]\..*",
        r"transformer_blocks\.\d\..*",
        r"transformer_blocks\...*",
        r".{20,24}attn.*",
    ],
)
def test_blocks_that_are_adapted_otherwise_are_simulated_whole(pattern: str) -> None:
    assert shallow(ranked(pattern)) is None


@pytest.mark.parametrize("pattern", [r".*\.attn\.to_[qk]", r"transformer_blocks\.\d+\.attn.*"])
def test_layers_of_every_block_may_be_adapted_otherwise(pattern: str) -> None:
    check(ranked(pattern))


def test_two_runs_of_equal_blocks() -> None:
    check(deep("sd3", 24, dual=list(range(12)), rank=4))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("flux", {"rank": 4, "checkpointing": 1}),
        ("flux", {"trained": "bfloat16"}),
        ("flux2", {"rank": 4}),
    ],
)
def test_double_and_single_blocks(family: str, options: dict[str, Any]) -> None:
    """Two module lists, one after the other."""
    tiny = import_module(f"tests.runtime.tinies.{family}")
    shape = {**tiny.SMALL, "num_layers": 9, "num_single_layers": 12}
    given = {"tokens": 32, "shapes": ((256, 256, 2),), "pictures": ((128, 128),), **options}
    check(candidate(known(tiny.BASE, tiny.PARTS, **shape), **given))


def test_every_block_of_the_second_kind() -> None:
    check(deep("sd3", 12, dual=list(range(12)), rank=4))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4, "layout": Layout(offload_blocks=13)},
        {"rank": 4, "checkpointing": 12},
        {"rank": 4, "dual": [0, 5]},
    ],
    ids=str,
)
def test_what_has_no_period_is_simulated_whole(options: dict[str, Any]) -> None:
    step = deep("sd3", 30, **options)
    assert shallow(step) is None
    assert MODEL.course(step, step.shapes[0]).peak > 0


@pytest.mark.parametrize("family", ["sana", "sd3", "flux", "flux2", "sdxl", "kolors"])
def test_published_models_are_shortened(family: str) -> None:
    card = FAMILIES[family]
    for entry in card.known:
        config = dict(entry.configs[card.trained_component])
        assert card.runs is not None
        runs = card.runs(config)
        assert runs is not None
        assert card.shortened(config, runs) == config


def curve(*rows: tuple[int, int]) -> Curve:
    """(bytes of the new tensor, bytes live) each."""
    sizes, live = zip(*rows, strict=True)
    return Curve(categories=("a",), sizes=np.array(sizes), live=np.array(live)[:, None])


def test_deeper_by_hand() -> None:
    """Two tensors a block, of which one stays: 5 + 10 a block, and 7 more inside."""
    two = curve((0, 5), (10, 15), (7, 22), (10, 25), (7, 32), (1, 26))
    three = curve((0, 5), (10, 15), (7, 22), (10, 25), (7, 32), (10, 35), (7, 42), (1, 36))
    assert deeper(two, [(three, 8)]).at_peak() == {"a": 5 + 10 * 10 + 7}
    assert highest([two, three]) == {"a": 42}


def test_deeper_in_two_places_by_hand() -> None:
    """Blocks of a tensor of 10 that stays, two in each of two runs, with 3 between and behind."""
    two = curve((0, 5), (10, 15), (10, 25), (3, 28), (10, 38), (10, 48), (3, 51))
    rows = [(0, 5), *((10, 15 + 10 * n) for n in range(3)), (3, 38)]
    rows += [*((10, 48 + 10 * n) for n in range(3)), (3, 71)]
    assert deeper(two, [(curve(*rows), 4)], together=True).at_peak() == {"a": 5 + 120 + 6}
    with pytest.raises(NotAlike):
        deeper(two, [(curve(*rows), 4)])


def test_sums_grow_by_the_same_number() -> None:
    assert affine({"a": 5, "b": 1}, [({"a": 7}, 3)]) == {"a": 11, "b": -2}


def test_unlike_courses_are_refused() -> None:
    two = curve((0, 5), (10, 15), (7, 22))
    with pytest.raises(NotAlike):
        deeper(two, [(curve((0, 5), (9, 14), (9, 23), (8, 24)), 1)])
    with pytest.raises(NotAlike):
        deeper(two, [(curve((0, 5)), 1)])


def test_one_candidate_is_simulated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = RuntimeMemoryModel(), deep("sana", 4, rank=4)
    first = model.simulate(step)
    monkeypatch.setattr(model, "course", None)  # a second call would fail
    again = model.simulate(step)
    assert again.phases == first.phases
    other = evolve(
        step.model,
        components=tuple(
            evolve(part, quantize="int8") if part.name == "text_encoder" else part
            for part in step.model.components
        ),
    )
    smaller = {p.name: p for p in model.simulate(evolve(step, model=other)).phases}
    before = {p.name: p for p in first.phases}
    assert smaller["text_encoder"].device_bytes < before["text_encoder"].device_bytes
    assert smaller["train"] == before["train"]
