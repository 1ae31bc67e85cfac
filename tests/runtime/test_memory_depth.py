"""A deep model's memory from that of shallow ones: the same bytes as all its blocks give."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from diffusers import UNet2DConditionModel

from compiler.families import FAMILIES, unet
from compiler.memory import Candidate
from compiler.plan import Layout, Ranked
from runtime.memory.curve import Curve, NotAlike, Step, highest
from runtime.memory.repeat import More, Run, repeated
from runtime.memory.shallow import shallow
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.offload import activations
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
    "block_numbers",
)


@pytest.fixture(autouse=True)
def small_tensors_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or no activation of a small model would wait on the host."""
    monkeypatch.setattr(activations, "SMALLEST", 2**14)


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
    """The same sums, and the same course row by row."""
    less = shallow(step)
    assert less is not None
    ours, whole = MODEL._deep(step, less, step.shapes[0]), MODEL.whole(step, step.shapes[0])
    for name in NUMBERS:
        assert getattr(ours, name) == getattr(whole, name), name
    parts = step.accumulate * -(-step.shapes[0][2] // (step.micro_batch or step.shapes[0][2]))
    alone = parts > 1 and not step.layout.fused_backward  # the later one of two parts
    assert ours.stands_for == 1 + alone
    assert alone or ours.kernels == whole.kernels
    passes = ours.window[alone:]  # what comes before it are the noise and the other parts' losses
    assert len(passes) == len(whole.window) // (1 + alone)
    pairs = list(zip(passes, whole.window[-len(passes) :], strict=True))
    for name in ("evaluate", "validate"):
        pairs += zip(getattr(ours, name), getattr(whole, name), strict=True)
    for one, other in pairs:
        assert one.categories == other.categories
        assert np.array_equal(one.sizes, other.sizes)
        assert np.array_equal(one.live, other.live)
        assert one.hosts[:, 1].max() == other.hosts[:, 1].max()


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
    check(deep(family, enough(options), **options))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd3", {"rank": 4, "layout": Layout(offload_blocks=9, offload_activations=True)}),
        ("sana", {"trained": "bfloat16", "checkpointing": 2, "ema": True, "accumulate": 2}),
    ],
    ids=str,
)
def test_deep_models_whose_batches_are_cut(family: str, options: dict[str, Any]) -> None:
    check(evolve(deep(family, 17, **options), micro_batch=1))


def test_parts_of_nested_ranks() -> None:
    """What is made once for all parts is the batch's, whether one part is run or two."""
    step = deep("sana", 13, rank=4)
    assert step.adapter is not None
    nested = evolve(step.adapter, kind="dylora", block_size=2, init="kaiming")
    check(evolve(step, adapter=nested, micro_batch=1))


def test_parts_that_leave_other_blocks_than_the_first() -> None:
    """Blocks before those that are adapted have no backward pass, and do not come back in it."""
    tiny = import_module("tests.runtime.tinies.flux")
    shape = {**tiny.SMALL, "num_layers": 9, "num_single_layers": 12}
    step = candidate(
        known(tiny.BASE, tiny.PARTS, **shape),
        rank=4,
        tokens=32,
        shapes=((64, 64, 2),),
        targets=(r"single_transformer_blocks\.\d+\.attn\.to_q",),
        layout=Layout(offload_blocks=8, activation_checkpointing=1),
    )
    check(evolve(step, micro_batch=1))


def test_gradients_in_one_storage_are_simulated_whole() -> None:
    step = evolve(deep("sana", 13, trained="bfloat16"), fused_projections=True)
    assert shallow(step) is None
    assert shallow(evolve(step, fused_projections=False)) is not None


def test_views_of_one_storage_are_not_copied_apart() -> None:
    step = deep("sana", 13, rank=4, layout=Layout(offload_blocks=99))
    assert step.adapter is not None
    check(evolve(step, adapter=evolve(step.adapter, kind="oft", rank=0, alpha=0, block_size=8)))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "muon", "trained": "bfloat16"},  # the update multiplies matrices itself
        {"optimizer": "adamw", "device": "cpu", "compute": "float32"},  # one after the other
    ],
    ids=str,
)
def test_updates_by_their_order(options: dict[str, Any]) -> None:
    check(deep("sana", 13, fused=False, **options))


def test_an_unequal_part_is_run_too() -> None:
    step = evolve(deep("sana", 13, rank=4, shapes=((256, 256, 3),)), micro_batch=2)
    assert MODEL.course(step, step.shapes[0]).stands_for == 1


def enough(options: Mapping[str, Any]) -> int:
    """Blocks of which some are left out; more would be more of the same."""
    layout = options.get("layout", Layout())
    if layout.offload_blocks in (10, 15):  # at uneven distances
        return 31
    if "checkpointing" not in options and "layout" not in options:
        return 13
    return 26 if options.get("checkpointing") == 4 else 17


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
    counts = [min(count, 17) for count in runs(published) or ()]
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
    configs = {**step.model.configs, "unet": json.dumps(card.shortened(config, [*short, 2, 9]))}
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
        r"transformer_blocks\.\d+\d+\..*",
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
        {"layout": Layout(offload_blocks=10, activation_checkpointing=1)},
        {"layout": Layout(offload_blocks=7, activation_checkpointing=2)},
        {"layout": Layout(offload_blocks=26, offload_activations=True)},
        {
            "layout": Layout(
                offload_blocks=13, offload_activations=True, activation_checkpointing=1
            )
        },  # even, but the last one that waits is smaller than the others
        {"checkpointing": 16},  # three that are recomputed
    ],
    ids=str,
)
def test_blocks_that_wait_at_uneven_distances(options: dict[str, Any]) -> None:
    """Ten of 38 are four apart, but for two that are three apart."""
    check(deep("sd3", 38, rank=4, **options))


def test_what_does_not_repeat_itself_is_simulated_whole() -> None:
    step = deep("sd3", 26, rank=4, dual=[0, 5])
    assert shallow(step) is None
    assert MODEL.course(step, step.shapes[0]).peak > 0


@pytest.mark.parametrize("family", ["sdxl", "kolors", "sd", "sdxl_refiner"])
def test_places_of_blocks_are_those_of_the_model(family: str) -> None:
    """In the order of Diffusers' own modules: transformers, and residual blocks between them."""
    card = FAMILIES[family]
    config = dict(card.known[0].configs["unet"])
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    lists = [
        name.rpartition(".")[0]
        for name, _ in model.named_modules()
        if re.fullmatch(card.blocks[0], name)
    ]
    found = [(name, len(list(group))) for name, group in groupby(lists)]
    places = unet.places(config)
    assert [count for _, count in found] == [count for _, count in places]
    assert [".attentions." in name for name, _ in found] == [r is not None for r, _ in places]


@pytest.mark.parametrize("family", ["sana", "sd3", "flux", "flux2", "sdxl", "kolors"])
def test_published_models_are_shortened(family: str) -> None:
    card = FAMILIES[family]
    for entry in card.known:
        config = dict(entry.configs[card.trained_component])
        assert card.runs is not None
        runs = card.runs(config)
        assert runs is not None
        assert card.shortened(config, runs) == config


def curve(steps: Sequence[tuple[int, bool, int]], *rows: tuple[int, int]) -> Curve:
    """(bytes of the new tensor, bytes live) each; `steps` are (block, backward, first row)."""
    sizes, live = (np.array(column) for column in zip(*rows, strict=True))
    starts = np.array([1, *(row for _, _, row in steps)])
    return Curve(
        categories=("a",),
        sizes=sizes,
        live=live[:, None],
        steps=[Step(block, backward, 100 * row) for block, backward, row in steps],
        starts=starts,
        levels=(live[starts] - sizes[starts])[:, None],
        hosts=np.array([(row, row + 1) for row in range(len(starts))]),
    )


def test_a_deeper_course_by_hand() -> None:
    """Two tensors a block, of which one stays: 5 + 10 a block, and 7 more inside; a last one."""
    rows = [(0, 5), *(row for n in range(3) for row in ((10, 15 + 10 * n), (7, 22 + 10 * n)))]
    rows.append((1, 36))
    short = curve([(n, False, 1 + 2 * n) for n in range(3)], *rows)
    run = Run(kinds={0: "first", 1: "other", 2: "last"}, order=(0, 1, 1, 1, 2))
    (found,), more = repeated([short], [run], More(live={"a": 3}, host=20))
    whole = [row for n in range(5) for row in ((10, 18 + 10 * n), (7, 25 + 10 * n))]
    assert found.sizes.tolist() == [0, *(size for size, _ in whole), 1]
    assert found.live[:, 0].tolist() == [8, *(live for _, live in whole), 59]
    assert more == More(live={"a": 3 + 2 * 10}, host=20 + 2, flops=2 * 200)
    assert found.hosts[:, 1].max() == 3 + 1 + 22
    assert highest([short, found]) == {"a": 65}


def backwards(order: tuple[int, ...], kinds: Mapping[int, object]) -> Curve:
    """Each block's backward pass frees the 10 that its forward pass had kept."""
    short = curve([(n, True, 3 - n) for n in range(3)][::-1], (0, 35), (2, 37), (2, 27), (2, 17))
    (found,), _ = repeated([short], [Run(kinds=kinds, order=order)], More(live={"a": 20}, host=0))
    return found


def test_backward_passes_come_in_turn() -> None:
    found = backwards((0, 1, 1, 1, 2), {0: "first", 1: "other", 2: "last"})
    assert found.live[:, 0].tolist() == [55, 57, 47, 37, 27, 17]


@pytest.mark.parametrize(
    ("order", "kinds", "message"),
    [
        ((0, 1, 2, 2, 2), {0: "a", 1: "b", 2: "c"}, None),
        ((0, 0, 1, 2), {0: "a", 1: "b", 2: "c"}, "ends"),
        ((0, 1, 2, 3), {0: "a", 1: "b", 2: "c", 3: "d"}, "order"),
        ((0, 1, 1, 2), {0: "a", 2: "a", 1: "a"}, "order"),
    ],
)
def test_courses_that_do_not_repeat_themselves_are_refused(
    order: tuple[int, ...], kinds: Mapping[int, object], message: str | None
) -> None:
    if message is None:
        assert len(backwards(order, kinds).sizes) == 6
        return
    with pytest.raises(NotAlike, match=message):
        backwards(order, kinds)


def test_blocks_of_one_kind_are_compared() -> None:
    rows = [(0, 5), (10, 15), (10, 25), (11, 36), (10, 46)]
    short = curve([(n, False, 1 + n) for n in range(4)], *rows)
    run = Run(kinds={0: "a", 1: "b", 2: "b", 3: "c"}, order=(0, 1, 1, 2, 3))
    with pytest.raises(NotAlike, match="differ"):
        repeated([short], [run], More(live={}, host=0))
    with pytest.raises(NotAlike, match="categories"):
        repeated([short], [], More(live={"b": 1}, host=0))


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


def test_a_fault_is_told_of_the_whole_model() -> None:
    step = deep("sd3", 24, rank=4, targets=(r"transformer_blocks\.\d+\.attn\.to_x",))
    message = r"none of the (\d+) linear layers"
    with pytest.raises(ValueError, match=message) as caught:
        MODEL.course(step, step.shapes[0])
    found = re.search(message, str(caught.value))
    with pytest.raises(ValueError, match=message) as whole:
        MODEL.whole(step, step.shapes[0])
    assert found is not None and str(caught.value) == str(whole.value)


def test_what_trains_nothing_is_told() -> None:
    tiny = import_module("tests.runtime.tinies.qwen_image")
    model = known(tiny.BASE, tiny.PARTS, **{**tiny.SMALL, "num_layers": 3})
    targets = (r"transformer_blocks\.2\.attn\.to_add_out",)  # of the text, which nothing reads
    step = candidate(model, rank=4, tokens=32, shapes=((64, 64, 1),), targets=targets)
    with pytest.raises(ValueError, match="nothing that is trained has a say"):
        MODEL.course(step, step.shapes[0])
