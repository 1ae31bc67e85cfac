"""The base's own tensors, however its files hold them."""

from __future__ import annotations

import torch
from attrs import evolve

from compiler.plan import Layout, Precision
from runtime.build import build
from runtime.export.base import base_tensors
from runtime.families import family_of
from tests.runtime.export.runs import pipeline_of

FLOAT32 = Precision(compute="float32", weights="float32", trained="float32", cache="float32")


def assert_same(found, state):
    assert found.keys() == state.keys()
    for name, lazy in found.items():
        assert torch.equal(lazy.read(), state[name])
        assert (lazy.shape, lazy.dtype) == (tuple(state[name].shape), state[name].dtype)


def test_whole_in_shards_and_in_a_form_that_diffusers_translates(runs, tmp_path):
    plan = runs("sd3")
    pipeline = pipeline_of(plan)
    state = pipeline.transformer.state_dict()
    assert_same(base_tensors(plan.model, plan.seed), state)
    for name, options in (
        ("shards", {"max_shard_size": "60KB"}),
        ("bin", {"safe_serialization": False}),
    ):
        pipeline.save_pretrained(tmp_path / name, **options)
        model = evolve(plan.model, base=str(tmp_path / name))
        assert_same(base_tensors(model, plan.seed), state)
    assert len(list((tmp_path / "shards/transformer").glob("*.safetensors"))) > 1


def test_fresh_weights_are_those_that_the_run_began_with(runs):
    plan = runs("sana")
    model = evolve(plan.model, init="random")
    built = build(
        model,
        None,
        FLOAT32,
        Layout(),
        family_of("sana"),
        torch.device("cpu"),
        empty=False,
        seed=plan.seed,
    )
    assert_same(base_tensors(model, plan.seed), built.model.state_dict())
