"""Text encoders that are trained: against a step written apart, and against Diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from attrs import evolve
from torch import Tensor, nn

from compiler.families import FAMILIES
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Layout, Plan
from compiler.plan import Optimizer as plan_optimizer
from runtime.batch import Batch
from runtime.events import Silent
from runtime.execute import execute
from runtime.families import family_of
from runtime.families.clip import TrainsText
from runtime.methods.base import Built
from runtime.optimizers import SHARE, grouped, host_state, make_optimizer, set_lr
from runtime.optimizers import load_state as load_optimizer
from runtime.step import forward_losses, micro_step
from runtime.text_training import Tokenizers
from tests.runtime.text_plans import (
    CPU,
    SEVERAL,
    TRAINING,
    Planned,
    batch_of,
    built_of,
    cached_of,
    final_weights,
    planned,
    states,
    stock_of,
)

__all__ = ["planned"]  # the fixture


@pytest.mark.parametrize("family", TRAINING)
def test_at_first_the_embeddings_are_those_that_are_cached(family: str, planned: Planned) -> None:
    plan, _ = planned(family, "first")
    stock, words = stock_of(plan), built_of(plan).text
    assert words is not None
    for prompt in (*SEVERAL, "red circle " * 60):  # alone, as it is cached
        cached = cached_of(plan, stock, [prompt])
        wrong = {name: torch.full_like(tensor, 7.0) for name, tensor in cached.items()}
        alone = tuple(words.encoders) == words.family.card.text_encoders
        with words.inference():
            found = words.of(batch_of(plan, [prompt], wrong if alone else cached))
        for name, tensor in cached.items():
            assert torch.equal(found[name], tensor), name


def reference(plan: Plan, stock: Any, built: Built, batch: Batch, prompts: list[str]) -> Tensor:
    """The loss of a batch by the stock modules, in which each adapted weight is W + s B A."""
    leaves = built.trainable
    modules = {n: m for n, m in stock.components.items() if isinstance(m, nn.Module)}

    def called(name: str, **inputs: Any) -> Any:
        module, start = modules[name], f"{name}." if name.startswith("text") else ""
        weights = {}
        for key, weight in module.named_parameters():
            a = leaves.get(start + key.replace(".weight", ".lora_A.default.weight"))
            b = leaves.get(start + key.replace(".weight", ".lora_B.default.weight"))
            plain = leaves.get(start + key)
            if plain is not None:
                weights[key] = plain
            elif a is not None and b is not None and not isinstance(a, str):
                adapter = plan.text_training.adapter if start else plan.adapter  # type: ignore[union-attr]
                assert adapter is not None
                weights[key] = weight + adapter.alpha / adapter.rank * (b @ a)
        return torch.func.functional_call(module, weights, kwargs=inputs)

    def numbers(tokenizer: Any) -> Tensor:
        options = {"padding": "max_length", "max_length": 77, "truncation": True}
        found: Tensor = tokenizer(prompts, return_tensors="pt", **options).input_ids
        return found

    first = {"input_ids": numbers(stock.tokenizer), "output_hidden_states": True}
    of_first = called("text_encoder", **first)
    kept = batch.kept[:, None, None, None] if batch.kept is not None else None
    if plan.model.family == "sd":
        assert kept is not None
        noisy = kept.sqrt() * batch.latents + (1 - kept).sqrt() * batch.noise
        found = called(
            "unet",
            sample=noisy,
            timestep=(batch.sigmas * 1000).round().long() - 1,
            encoder_hidden_states=of_first.last_hidden_state,
        ).sample
        return ((found - batch.noise) ** 2).mean(dim=(1, 2, 3))
    of_second = called(
        "text_encoder_2", input_ids=numbers(stock.tokenizer_2), output_hidden_states=True
    )
    states = torch.cat([of_first.hidden_states[-2], of_second.hidden_states[-2]], dim=-1)
    assert kept is not None
    found = called(
        "unet",
        sample=kept.sqrt() * batch.latents + (1 - kept).sqrt() * batch.noise,
        timestep=(batch.sigmas * 1000).round().long() - 1,
        encoder_hidden_states=states,
        added_cond_kwargs={"text_embeds": of_second[0], "time_ids": batch.text["time_ids"]},
    ).sample
    return ((found - batch.noise) ** 2).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_loss_and_gradients_are_those_of_the_stock_modules(
    family: str, whole: bool, planned: Planned
) -> None:
    plan, _ = planned(family, "gradients", whole=whole)
    stock, built = stock_of(plan), built_of(plan)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in built.trainable.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 10)
    batch = batch_of(plan, SEVERAL, cached_of(plan, stock, SEVERAL))
    losses = micro_step(
        family_of(family), built.model, batch, plan.objective, plan.precision, 3, words=built.text
    )
    ours = {n: p.grad for n, p in built.trainable.items()}
    for parameter in built.trainable.values():
        parameter.grad = None
    theirs = reference(plan, stock, built, batch, SEVERAL)
    (theirs.sum() / 3).backward()
    torch.testing.assert_close(losses, theirs.detach(), rtol=1e-5, atol=1e-6)
    compared = 0
    for name, parameter in built.trainable.items():
        expected, found = parameter.grad, ours[name]
        if expected is None:
            assert found is None or not found.any(), name
            continue
        assert found is not None, name
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, msg=name)
        compared += name.startswith("text_encoder") and bool(expected.any())
    assert compared > 20
    assert not whole or compared > 40


def test_encoders_stop_when_they_should_and_have_their_own_rate(planned: Planned) -> None:
    constant = {"name": "constant", "warmup": 0, "end": 1.0}
    plan, manifest = planned("sdxl", "stopped", te=0.25, until=2)
    schedule = evolve(plan.schedule, **constant)
    plan = evolve(plan, schedule=schedule, max_grad_norm=0.0)
    optimizer = evolve(plan.optimizer, arguments={**plan.optimizer.arguments, "weight_decay": 0.0})
    first, second, third, last = states(evolve(plan, optimizer=optimizer), manifest)
    theirs = [n for n in first if n.startswith("text_encoder") and "lora_B" in n and first[n].any()]
    ours = [n for n in first if not n.startswith("text_encoder") and "lora_B" in n]
    # AdamW's first step is the learning rate times the gradient's sign, from a B of zeros.
    largest = {name: first[name].abs().max().item() for name in (*theirs, *ours)}
    assert max(largest[n] for n in ours) == pytest.approx(plan.optimizer.lr, rel=1e-3)
    assert max(largest[n] for n in theirs) == pytest.approx(0.25 * plan.optimizer.lr, rel=1e-3)
    for name in theirs:
        assert not torch.equal(first[name], second[name])
        assert torch.equal(second[name], third[name]), name
        assert torch.equal(second[name], last[name]), name
    assert any(not torch.equal(second[n], last[n]) for n in ours)


def test_dropped_captions_of_a_base_that_zeroes_them_are_zeros(planned: Planned) -> None:
    plan, _ = planned("sdxl", "zeros")
    words, stock = built_of(plan).text, stock_of(plan)
    assert words is not None
    batch = batch_of(plan, SEVERAL, cached_of(plan, stock, SEVERAL))
    family = family_of("sdxl")
    made = Tokenizers(plan.model, family, tuple(words.encoders), plan.text)
    batch = evolve(batch, tokens=made.batch(["a dog", "", "cat"], [False, True, False]))
    found = words.of(batch)
    for tensor in (found["encoder_hidden_states"], found["text_embeds"]):
        assert not tensor[1].any()
        assert tensor[0].any()
        assert tensor[2].any()


def test_updates_in_the_backward_pass_reach_the_encoders(planned: Planned) -> None:
    finals = []
    for fused in (False, True):
        plan, manifest = planned("sd", f"fused-{fused}", whole=True, te=0.5, until=3)
        layout = Layout(fused_backward=fused)
        plan = evolve(plan, max_grad_norm=0.0, memory=evolve(plan.memory, layout=layout))
        assert execute(plan, manifest, Silent()).status == "finished"
        finals.append(final_weights(plan))
    assert all(torch.equal(tensor, finals[1][name]) for name, tensor in finals[0].items())


def test_the_base_is_asked_with_its_own_encoders(planned: Planned) -> None:
    plan, _ = planned("sdxl", "kept")
    built, stock = built_of(plan), stock_of(plan)
    batch = batch_of(plan, SEVERAL[:1], cached_of(plan, stock, SEVERAL[:1]))
    batch = evolve(batch, keeps_base=True)
    given = (built.model, batch, plan.objective, plan.precision)
    losses = forward_losses(family_of("sdxl"), *given, built.text)
    assert not losses.detach().any()  # an adapter that was not trained changes nothing
    with torch.no_grad():
        for name, parameter in built.trainable.items():
            if name.startswith("text_encoder") and "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    assert forward_losses(family_of("sdxl"), *given, built.text).detach().all()


def test_mixed_precision_keeps_masters_of_the_encoders(planned: Planned) -> None:
    plan, _ = planned("sdxl", "mixed")
    parts = tuple(
        evolve(part, dtype="bfloat16") if part.name.startswith("text_encoder") else part
        for part in plan.model.components
    )
    precision = evolve(plan.precision, compute="bfloat16", weights="bfloat16")
    built = built_of(evolve(plan, model=evolve(plan.model, components=parts), precision=precision))
    assert {p.dtype for p in built.trainable.values()} == {torch.float32}
    copies = built.copies()
    assert all(copies[name].dtype == torch.bfloat16 for name in built.trainable)
    batch = batch_of(plan, SEVERAL, cached_of(plan, stock_of(plan), SEVERAL))
    family = family_of("sdxl")
    micro_step(family, built.model, batch, plan.objective, precision, 3, words=built.text)
    reached = [n for n, p in built.trainable.items() if p.grad is not None and p.grad.any()]
    assert any(n.startswith("text_encoder.") for n in reached)
    assert any(n.startswith("text_encoder_2.") for n in reached)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizers_take_a_rate_for_each_group(name: str, planned: Planned) -> None:
    facts = OPTIMIZERS[name]
    if facts.one_lr or facts.compiled or "cpu" not in facts.devices:
        pytest.skip("has one rate, compiles, or needs an accelerator")
    pytest.importorskip(facts.path.partition(".")[0])
    plan, _ = planned("sd", "rates", te=0.25)
    optimizer = plan_optimizer(name=name, lr=1e-2, arguments=dict(facts.defaults), fused=False)
    text = evolve(plan.text_training, lr=2.5e-3)  # type: ignore[type-var]
    plan = evolve(plan, optimizer=optimizer, text_training=text)
    torch.manual_seed(0)
    pairs = {n: nn.Parameter(torch.randn(8, 8)) for n in ("a.weight", "text_encoder.b.weight")}
    made = make_optimizer(optimizer, grouped(pairs.items(), plan), CPU)
    set_lr(made, 4e-3)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([4e-3, 1e-3])
    for parameter in pairs.values():
        parameter.grad = torch.ones_like(parameter)
    before = {n: p.detach().clone() for n, p in pairs.items()}
    for _ in range(8):  # some do not move at first
        made.step()
    assert all(not torch.equal(before[n], p) for n, p in pairs.items())
    again = make_optimizer(optimizer, grouped(pairs.items(), plan), CPU)
    load_optimizer(again, host_state(made))
    assert [group[SHARE] for group in again.param_groups] == [1.0, 0.25]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_cards_say_what_can_be_trained(family: str) -> None:
    card = FAMILIES[family]
    assert set(card.embedding_keys) <= set(card.trainable_encoders) <= set(card.text_encoders)
    clips = [name for name in card.text_encoders if card.components[name].startswith("CLIPText")]
    assert list(card.trainable_encoders) == clips
    assert isinstance(family_of(family), TrainsText) == bool(clips)
    loads = hasattr(getattr(diffusers, card.pipeline), "load_textual_inversion")
    assert bool(card.embedding_keys) == loads
