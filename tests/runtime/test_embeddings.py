"""New tokens, alone and with a LoRA: learned, gone on with, and loaded by Diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from torch import Tensor

from compiler.adapters import INVERSION
from compiler.data.counts import bucket_rows
from compiler.families import FAMILIES
from compiler.plan import Adapter, Embeddings, NewToken, Plan
from runtime.build import build
from runtime.errors import RunFailed
from runtime.events import Silent
from runtime.execute import execute
from runtime.export.draw import draw
from runtime.export.export import export
from runtime.export.request import Refused, chosen, requested
from runtime.families import family_of
from runtime.methods.base import Built
from runtime.methods.embedding_files import read
from runtime.methods.lora import PEFT_FILES
from runtime.new_tokens import add_tokens, is_rows
from runtime.step import micro_step
from runtime.text_training import tokenizers
from tests.runtime.plans import PICTURES, manifest_of, source_of
from tests.runtime.text_plans import (
    RUNS,
    STEPS,
    Planned,
    batch_of,
    built_stock,
    drawn,
    final_weights,
    pictured,
    planned,
    states,
    stock_of,
    wanted_of,
)
from tests.test_matrix import CopyAfter, goes_on

__all__ = ["planned"]  # the fixture

ALONE = Adapter(kind=INVERSION, rank=0, alpha=0.0, dropout=0.0, init="", targets=())
TOKENS = (
    NewToken(token="<dog-1>", vectors=2, initial="red dog"),
    NewToken(token="<k4>", vectors=1),
)
PROMPT = "a <k4> photo of <dog-1> and dog"
FAMILIES_WITH = [case for case in RUNS if getattr(case, "values", [case])[0] != "sd3"]


def words(plan: Plan, *, tokens: tuple[NewToken, ...] = TOKENS, **changes: Any) -> Plan:
    """`plan` with new tokens in its captions and its validation, and only them to learn."""
    card = FAMILIES[plan.model.family]
    facts = Embeddings(
        encoders=tuple(card.embedding_keys), tokens=tokens, lr=plan.optimizer.lr, until=STEPS
    )
    prompts = (evolve(PICTURES.prompts[0], text=PROMPT),)
    given: dict[str, Any] = {
        "adapter": ALONE,
        "text_training": None,
        "embeddings": facts,
        "validation": evolve(PICTURES, prompts=prompts),
    }
    return evolve(plan, **{**given, **changes})


def built_of(plan: Plan) -> Built:
    """The model and its encoders, as a run has them."""
    family, layout = family_of(plan.model.family), plan.memory.layout
    return build(
        plan.model,
        plan.adapter,
        plan.precision,
        layout,
        family,
        torch.device("cpu"),
        empty=False,
        seed=plan.seed,
        text_training=plan.text_training,
        embeddings=plan.embeddings,
    )


def taught(plan: Plan, stock: Any, folder: Path) -> Any:
    """A stock pipeline that has loaded the new tokens in `folder`."""
    assert plan.embeddings is not None
    card = FAMILIES[plan.model.family]
    for token in plan.embeddings.tokens:
        held = load_file(folder / f"{token.token.strip('<>')}.safetensors")
        for encoder, key in card.embedding_keys.items():
            stock.load_textual_inversion(
                held[key or token.token],
                token=token.token,
                text_encoder=getattr(stock, encoder),
                tokenizer=getattr(stock, encoder.replace("text_encoder", "tokenizer")),
            )
    return stock


def with_captions(made: tuple[Plan, Any]) -> tuple[Plan, Any]:
    """The plan on the same pictures, whose captions say the new words."""
    plan, _ = made
    source = source_of(Path(plan.sources[0].path), PROMPT)
    manifest = manifest_of([source])
    buckets = bucket_rows(manifest, (source,), [plan.buckets[0].batch_size])
    return evolve(plan, sources=(source,), manifest=manifest.digest, buckets=buckets), manifest


def test_new_vectors_start_from_a_text_or_at_random(planned: Planned) -> None:
    plan = words(planned("sdxl", "start")[0])
    built, stock = built_of(plan), stock_of(plan)
    assert set(built.trainable) == {n for n in built.trainable if is_rows(n)}
    for encoder in ("text_encoder", "text_encoder_2"):
        table = getattr(stock, encoder).get_input_embeddings().weight
        tokenizer = getattr(stock, encoder.replace("text_encoder", "tokenizer"))
        red, *_, dog = tokenizer("red dog", add_special_tokens=False).input_ids
        (rows,) = (p for n, p in built.trainable.items() if n.startswith(f"{encoder}."))
        assert torch.equal(rows[0], table[red])
        assert rows.shape == (3, table.shape[1])
        assert 0.2 * table.std() < rows[2].std() < 5 * table.std()
        assert dog != red


def test_words_are_told_from_each_other_as_diffusers_does(planned: Planned) -> None:
    plan = words(planned("sd", "numbers")[0])
    made, stock = tokenizers(plan, family_of("sd")), stock_of(plan)
    assert made is not None
    first = len(stock.tokenizer)
    assert add_tokens(stock.tokenizer, TOKENS) == first
    expected = stock.tokenizer(stock.maybe_convert_prompt(PROMPT, stock.tokenizer)).input_ids
    found = made.of(PROMPT)["text_encoder"].tolist()
    assert found[: len(expected)] == expected
    assert [n for n in found if n >= first] == [first + 2, first, first + 1]
    with pytest.raises(RunFailed, match="knows `<k4>` already"):
        add_tokens(stock.tokenizer, TOKENS[1:])


@pytest.mark.parametrize("family", FAMILIES_WITH)
def test_inversion_is_resumed_exactly_and_loads_in_diffusers(
    family: str, planned: Planned, tmp_path: Path
) -> None:
    whole, manifest = with_captions(planned(family, "inverted"))
    whole = words(whole)
    whole = evolve(whole, checkpoints=evolve(whole.checkpoints, every=1))
    copied = CopyAfter(whole, 2)
    assert execute(whole, manifest, copied).status == "finished"
    one = final_weights(whole)
    goes_on(whole, manifest, copied)
    other = final_weights(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    start = {n: p.detach() for n, p in built_of(whole).trainable.items()}
    assert one.keys() == start.keys()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in one.items())
    result = Path(whole.run_folder, INVERSION)
    stock = taught(whole, stock_of(whole), result)
    assert np.array_equal(pictured(whole, stock), drawn(whole, STEPS))
    assert not np.array_equal(drawn(whole, 0), drawn(whole, STEPS))
    (again,) = draw(chosen(Path(whole.run_folder)), wanted_of(whole))
    assert again.read_bytes() == next(result.parent.glob(f"samples/*{STEPS:06}/*.png")).read_bytes()
    check_exports(whole, one, tmp_path)


def check_exports(plan: Plan, trained: dict[str, Tensor], folder: Path) -> None:
    """The exported folders hold the vectors."""
    assert plan.embeddings is not None
    weights = chosen(Path(plan.run_folder), step=STEPS)
    out = export(requested(weights, out=folder / "words"))
    found = read(plan.embeddings, FAMILIES[plan.model.family], out, trained)
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    for options in ({"merge": True}, {"format": "kohya"}):
        with pytest.raises(Refused):
            requested(weights, out=folder / "more", **options)


@pytest.mark.parametrize("family", FAMILIES_WITH)
def test_pivotal_tuning_loads_in_diffusers(family: str, planned: Planned, tmp_path: Path) -> None:
    made, manifest = with_captions(planned(family, "pivotal"))
    plan = words(made, adapter=made.adapter, text_training=made.text_training)
    assert execute(plan, manifest, Silent()).status == "finished"
    result = Path(plan.run_folder, "lora")
    stock = taught(plan, stock_of(plan), result / "embeddings")
    stock.load_lora_weights(result)
    assert np.array_equal(pictured(plan, stock), drawn(plan, STEPS))
    weights = chosen(Path(plan.run_folder))
    (again,) = draw(weights, wanted_of(plan))
    assert again.read_bytes() == next(result.parent.glob(f"samples/*{STEPS:06}/*.png")).read_bytes()
    merged = export(requested(weights, merge=True, out=tmp_path / "merged"))
    whole = taught(plan, built_stock(plan, merged), merged / "embeddings")
    apart = pictured(plan, whole).astype(int) - drawn(plan, STEPS).astype(int)
    assert np.abs(apart).max() <= 1
    with pytest.raises(Refused, match="files of their own"):
        requested(weights, merge=True, single_file=True, out=tmp_path / "one.safetensors")
    lora = export(requested(weights, out=tmp_path / "a.safetensors"))
    assert lora.is_file() and (tmp_path / "a-embeddings" / "k4.safetensors").is_file()


@pytest.mark.parametrize(
    ("kind", "formats"), [("lokr", ("kohya", "comfyui")), ("lora", ("peft",)), ("dora", ("kohya",))]
)
def test_words_go_beside_an_adapter_of_any_keys(
    kind: Any, formats: tuple[str, ...], planned: Planned, tmp_path: Path
) -> None:
    made, manifest = with_captions(planned("sd", f"beside-{kind}"))
    assert made.adapter is not None
    own = evolve(made.adapter, kind=kind, factor=4 if kind == "lokr" else 0)
    plan = evolve(words(made, adapter=own), validation=made.validation)
    assert execute(plan, manifest, Silent()).status == "finished"
    weights = chosen(Path(plan.run_folder))
    for form in formats:
        out = export(requested(weights, format=form, out=tmp_path / form))
        written = load_file(out / PEFT_FILES[0] if form == "peft" else out)
        assert written and not any(TOKENS[1].token in key or "rows" in key for key in written)
        assert (tmp_path / f"{form}-embeddings" / "k4.safetensors").is_file()


def test_each_part_stops_in_its_own_time(planned: Planned) -> None:
    made, manifest = with_captions(planned("sd", "stops", until=3))
    plan = words(made, adapter=made.adapter, text_training=made.text_training)
    assert plan.embeddings is not None
    facts = evolve(plan.embeddings, until=2, lr=0.5 * plan.optimizer.lr)
    plan = evolve(plan, embeddings=facts, validation=made.validation)
    _, second, third, last = states(plan, manifest)
    for name in second:
        moves = [not torch.equal(a[name], b[name]) for a, b in ((second, third), (third, last))]
        if is_rows(name):
            assert moves == [False, False]
        elif name.startswith("text_encoder") and "lora_B" in name:
            assert moves == [True, False]
        elif "lora_B" in name:
            assert moves == [True, True]


def test_one_word_is_found_by_its_folder(planned: Planned) -> None:
    made, manifest = with_captions(planned("sd", "folder"))
    plan = words(made, tokens=TOKENS[1:])
    assert execute(plan, manifest, Silent()).status == "finished"
    stock = stock_of(plan)
    stock.load_textual_inversion(plan.run_folder + "/" + INVERSION)  # learned_embeds.safetensors
    assert np.array_equal(pictured(plan, stock), drawn(plan, STEPS))


def test_gradients_are_those_of_a_longer_table(planned: Planned) -> None:
    plan = words(planned("sd", "gradients")[0])
    built, stock = built_of(plan), stock_of(plan)
    prompts = [PROMPT, "a photo of a dog", "<dog-1>"]
    made = tokenizers(plan, family_of("sd"))
    assert made is not None
    cached = {"encoder_hidden_states": torch.zeros(3, 77, 16)}
    batch = evolve(batch_of(plan, prompts, cached), tokens=made.batch(prompts))
    losses = micro_step(
        family_of("sd"), built.model, batch, plan.objective, plan.precision, 3, words=built.text
    )
    (rows,) = built.trainable.values()
    first = add_tokens(stock.tokenizer, TOKENS)
    stock.text_encoder.resize_token_embeddings(len(stock.tokenizer))
    table = stock.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[first:] = rows
    told = stock.maybe_convert_prompt(prompts, stock.tokenizer)
    options = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
    states = stock.text_encoder(stock.tokenizer(told, **options).input_ids)[0]
    assert batch.kept is not None
    kept = batch.kept[:, None, None, None]
    noisy = kept.sqrt() * batch.latents + (1 - kept).sqrt() * batch.noise
    times = (batch.sigmas * 1000).round().long() - 1
    found = stock.unet(noisy, times, encoder_hidden_states=states).sample
    theirs = ((found - batch.noise) ** 2).mean(dim=(1, 2, 3))
    (theirs.sum() / 3).backward()
    torch.testing.assert_close(losses, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert rows.grad is not None and table.grad is not None and rows.grad.any(dim=1).all()
    torch.testing.assert_close(rows.grad, table.grad[first:], rtol=1e-3, atol=1e-7)
    before = {name: p.detach().clone() for name, p in built.copies().items()}
    torch.optim.AdamW(built.trainable.values(), lr=0.1).step()
    changed = [n for n, p in built.copies().items() if not torch.equal(p, before[n])]
    assert changed == list(built.trainable)  # the table itself stays as it is
