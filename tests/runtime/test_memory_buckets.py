"""Which buckets and which parts of batches a plan counts with, against all of them."""

from __future__ import annotations

from itertools import product
from math import inf
from random import Random

import pytest
import torch
from attrs import evolve

from compiler.memory import Candidate
from runtime.memory import step
from runtime.memory.buckets import Bounds, Shape, of_batch, part_sizes, parts_run, worst
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.tracker import Tracker
from tests.runtime.memory_cases import candidate, known, small

FLUX = "black-forest-labs/FLUX.1-dev"
CPU = torch.device("cpu")


def train(given: Candidate, model: RuntimeMemoryModel) -> int:
    return next(p.device_bytes for p in model.simulate(given).phases if p.name == "train")


def test_small_pictures_in_a_large_batch_with_long_prompts_need_most() -> None:
    model = RuntimeMemoryModel()
    large, many = (1024, 1024, 1), (256, 256, 12)  # 4096 and 3072 places, 512 and 6144 tokens
    shallow = known(FLUX, num_layers=3, num_single_layers=4)
    given = candidate(shallow, rank=16, checkpointing=1)
    each = {s: train(evolve(given, shapes=(s,)), model) for s in (large, many)}
    assert each[many] > each[large]
    assert train(evolve(given, shapes=(large, many)), model) == each[many]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_no_bucket_left_out_needs_more(family: str) -> None:
    model, random = RuntimeMemoryModel(), Random(0)
    shapes = [(64 * random.randint(1, 5), 64, random.randint(1, 8)) for _ in range(4)]
    given = small(family, rank=2, checkpointing=1, tokens=64)
    each = [train(evolve(given, shapes=(shape,)), model) for shape in shapes]
    assert train(evolve(given, shapes=tuple(shapes)), model) == max(each)


def test_each_evaluated_bucket_is_counted_until_one_is_the_worst() -> None:
    model = RuntimeMemoryModel()
    one, many = (256, 256, 1), (128, 128, 6)

    def peak(*shapes: Shape) -> int:
        given = small("sd3", rank=4, shapes=((64, 64, 1),), evaluated=shapes)
        return {p.name: p for p in model.simulate(given).phases}["evaluate"].device_bytes

    each = [peak(one), peak(many)]
    assert each[1] > each[0]
    assert peak(one, many) == max(each)


def costs(shape: Shape, places: float, tokens: float, micro_batch: int) -> float:
    """A step's bytes where a pixel costs `places` and a prompt `tokens`."""
    batch = min(micro_batch or shape[2], shape[2])
    return batch * (places * shape[0] * shape[1] + tokens)


def test_bounds_leave_the_worst_in_for_every_cost_between() -> None:
    random = Random(1)
    edges = (256, 512, 768, 1024)
    for _ in range(200):
        shapes = [
            (random.choice(edges), random.choice(edges), random.randint(1, 16)) for _ in range(5)
        ]
        micro, text = random.choice((0, 0, 1, 3)), random.choice((4928.0, 131072.0, inf))
        kept = worst(shapes, Bounds(text=text, micro_batch=micro))
        for places, share in product((1.0, 3.0), (0.0, 0.5, 1.0)):
            token = share * places * (1e6 if text == inf else text)
            most = max(costs(shape, places, token, micro) for shape in shapes)
            assert max(costs(shape, places, token, micro) for shape in kept) == most


def test_ordinary_buckets_are_one() -> None:
    flux = Bounds(text=512 * 256.0)
    aspects = ((1024, 1024, 4), (1152, 896, 4), (896, 1152, 4), (768, 1344, 4), (1216, 832, 3))
    assert worst(aspects, flux) == [(1024, 1024, 4)]
    assert worst(((1024, 1024, 4), (512, 512, 6)), flux) == [(1024, 1024, 4)]
    assert worst(((1024, 1024, 1), (256, 256, 12)), Bounds(text=77 * 64.0)) == [
        (1024, 1024, 1),  # the other's bounds are 0.75 and 0.84 of it
        (256, 256, 12),
    ]
    in_parts = Bounds(text=77 * 64.0, micro_batch=1)
    assert worst(((1024, 1024, 2), (512, 512, 6)), in_parts) == [(1024, 1024, 2)]


@pytest.mark.parametrize(
    ("batch", "micro_batch", "accumulate", "sizes", "run"),
    [
        (4, 0, 1, [4], [0]),
        (4, 0, 3, [4, 4, 4], [0, 2]),
        (4, 3, 1, [3, 1], [0, 1]),
        (4, 3, 2, [3, 1, 3, 1], [0, 2]),
        (5, 2, 1, [2, 2, 1], [0, 1]),
    ],
)
def test_parts_that_are_run(
    batch: int, micro_batch: int, accumulate: int, sizes: list[int], run: list[int]
) -> None:
    assert part_sizes(batch, micro_batch) * accumulate == sizes
    assert parts_run(sizes) == run


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
@pytest.mark.parametrize(("batch", "micro_batch"), [(4, 3), (3, 2)])
def test_window_of_unequal_parts_is_planned_to_the_byte(
    family: str, batch: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = evolve(
        small(family, shapes=((64, 64, batch),), optimizer="sgd", max_grad_norm=0.0),
        micro_batch=micro_batch,
        accumulate=2,
    )
    planned = RuntimeMemoryModel().course(given, given.shapes[0])
    monkeypatch.setattr(step, "parts_run", lambda sizes: range(len(sizes)))  # all of them
    real = step.run_step(given, given.shapes[0], CPU, Tracker({"cpu"}))
    assert planned.train_peak == real.train_peak
    assert planned.update_peak == real.update_peak


def test_operations_are_those_of_one_batch() -> None:
    given = small("sd3", rank=2, shapes=((64, 64, 5),))
    whole = RuntimeMemoryModel().simulate(given).flops
    for micro_batch, accumulate in ((3, 1), (3, 2)):
        cut = evolve(given, micro_batch=micro_batch, accumulate=accumulate)
        assert RuntimeMemoryModel().simulate(cut).flops == whole
    assert of_batch(evolve(given, micro_batch=3, accumulate=2), (64, 64, 5), 600) == 500
