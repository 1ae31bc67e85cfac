"""New words that go on from files: a run's, a LoRA's own, and one that is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file
from torch import Tensor

from compiler.families import FAMILIES
from compiler.plan import Plan
from runtime.build import build
from runtime.errors import RunFailed
from runtime.events import Silent
from runtime.execute import execute
from runtime.export.draw import draw
from runtime.export.export import export
from runtime.export.pictures import Drawing, Wanted
from runtime.export.request import Refused, chosen, requested
from runtime.families import family_of
from runtime.new_tokens import is_rows
from tests.compiler.recipes import MACHINE, codes, compiled, make_pictures
from tests.runtime.tiny import make_tiny
from tests.test_matrix import RECIPE, KillAfter, Killed

WORDS = '[[embeddings.token]]\nname = "<a>"\nvectors = 2\n[[embeddings.token]]\nname = "<b.1>"\n'


def recipe(folder: Path, name: str, family: str, adapter: str, words: str = WORDS) -> Any:
    path = folder / f"{name}.toml"
    told = RECIPE.format(
        name=name,
        family=family,
        adapter=f'[adapter]\nkind = "lora"\nrank = 2\n{adapter}',
        compute="fp32",
        checkpointing=0,
        drawing="steps = 2",
    )
    told = told.replace("a photo of sks dog", "a photo of <a> and <b.1>")
    path.write_text(f"{told}\n{words}")
    return compiled(path, machine=MACHINE)


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def first(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A finished run that learned two words with a LoRA."""
    folder: Path = tmp_path_factory.mktemp("words")
    make_tiny(request.param, folder / "base")
    make_pictures(folder / "pictures", [(64, 64)] * 2)
    result = recipe(folder, "first", request.param, "")
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    assert execute(result.plan, result.manifest, Silent()).status == "finished"
    plan: Plan = result.plan
    return plan


def vectors(plan: Plan) -> dict[str, Tensor]:
    """What training starts with."""
    family, cpu = family_of(plan.model.family), torch.device("cpu")
    given = (plan.model, plan.adapter, plan.precision, plan.memory.layout, family, cpu)
    built = build(*given, empty=False, seed=plan.seed, embeddings=plan.embeddings)
    return {name: p.detach() for name, p in built.trainable.items() if is_rows(name)}


def learned(plan: Plan) -> dict[str, Tensor]:
    """What the run ended with, by its files."""
    folder = Path(plan.run_folder) / "lora" / "embeddings"
    card, found = FAMILIES[plan.model.family], {}
    for encoder, key in card.embedding_keys.items():
        parts = [
            load_file(folder / f"{word}.safetensors")[key or f"<{word}>"] for word in ("a", "b.1")
        ]
        found[encoder] = torch.cat(parts)
    return found


def same(plan: Plan, expected: dict[str, Tensor]) -> bool:
    found = vectors(plan)
    return len(found) == len(expected) and all(
        torch.equal(rows, expected[name.partition(".")[0]]) for name, rows in found.items()
    )


def test_words_go_on_with_their_adapter(first: Plan, tmp_path: Path) -> None:
    folder, family = Path(first.run_folder).parents[1], first.model.family
    result = f"{first.run_folder}/lora"
    again = recipe(folder, "again", family, f'from = "{result}"')
    assert not codes(again) and same(again.plan, learned(first))
    kohya = tmp_path / "theirs" / "x.safetensors"
    export(requested(chosen(Path(first.run_folder)), format="kohya", bundle=True, out=kohya))
    for part in (kohya.parent / "x-embeddings").iterdir():
        part.unlink()  # the file alone has them too
    other = recipe(folder, "other", family, f'from = "{kohya}"')
    assert not codes(other) and same(other.plan, learned(first))
    assert other.plan.digest != again.plan.digest


def test_a_bundle_is_as_a1111_reads_it(first: Plan, tmp_path: Path) -> None:
    """Its reader splits `bundle_emb.NAME.KEY` at the first dot behind the name, and takes `clip_l`
    and `clip_g` of SDXL, or the only tensor (extensions-builtin/Lora/networks.py,
    modules/textual_inversion)."""
    out = tmp_path / "x.safetensors"
    export(requested(chosen(Path(first.run_folder)), format="kohya", bundle=True, out=out))
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(out).items():
        if key.startswith("bundle_emb."):
            name, _, part = key.removeprefix("bundle_emb.").partition(".")
            found.setdefault(name, {})[part] = tensor
    assert found.keys() == {"a", "b_1"}
    wide = FAMILIES[first.model.family].embedding_keys
    for encoder, rows in learned(first).items():
        key = wide[encoder] or next(iter(found["a"]))
        assert torch.equal(torch.cat([found["a"][key], found["b_1"][key]]), rows)
    assert all(len(each) == len(wide) for each in found.values())


def test_what_can_not_be_bundled(first: Plan, tmp_path: Path) -> None:
    weights, out = chosen(Path(first.run_folder)), tmp_path / "x"
    with pytest.raises(Refused, match="in kohya's keys alone"):
        requested(weights, bundle=True, out=out)
    with pytest.raises(Refused, match="into a LoRA's file"):
        requested(weights, merge=True, bundle=True, out=out)


def test_a_word_s_own_file_and_what_is_said_of_others(first: Plan, tmp_path: Path) -> None:
    folder, family = Path(first.run_folder).parents[1], first.model.family
    alone = tmp_path / "alone"
    alone.mkdir()
    own = f"{first.run_folder}/lora/embeddings"
    (alone / "x.safetensors").write_bytes(
        (Path(first.run_folder) / "lora/pytorch_lora_weights.safetensors").read_bytes()
    )
    start = f'from = "{alone}/x.safetensors"'
    lost = recipe(folder, "lost", family, start)
    assert [(each.severity, each.code) for each in lost.diagnostics] == [
        ("warning", "bad-adapter")
    ] * 2
    assert "the word starts anew" in lost.diagnostics[0].message
    named = WORDS.replace('"<a>"', f'"<a>"\nfrom = "{own}/a.safetensors"').replace(
        '"<b.1>"', f'"<b.1>"\nfrom = "{own}/b.1.safetensors"\ninitial = "dog"'
    )
    found = recipe(folder, "named", family, start, named)
    assert codes(found) == ["no-effect"] and same(found.plan, learned(first))
    fewer = recipe(folder, "fewer", family, start, named.replace("vectors = 2", "vectors = 1"))
    assert "bad-adapter" in codes(fewer)
    (fault,) = [each for each in fewer.diagnostics if each.severity == "error"]
    assert fault.message.startswith("`a.safetensors` has 2 vectors of `<a>`")
    gone = recipe(folder, "gone", family, start, named.replace("a.safetensors", "c.safetensors"))
    assert "missing-path" in codes(gone)
    save_file({"other": torch.zeros(2, 2)}, alone / "a.safetensors")
    other = recipe(folder, "wrong", family, start, named.replace(own, str(alone), 1))
    (fault,) = [each for each in other.diagnostics if each.severity == "error"]
    assert "holds no vectors of `<a>`" in fault.message


def test_the_files_to_start_from_are_needed_once(first: Plan, tmp_path: Path) -> None:
    """A run that has a checkpoint goes on without them, and its pictures are drawn."""
    folder, family = Path(first.run_folder).parents[1], first.model.family
    if family != "sd":
        pytest.skip("one family is enough")
    theirs = tmp_path / "theirs"
    shutil.copytree(Path(first.run_folder) / "lora", theirs)
    start = f'from = "{theirs}/pytorch_lora_weights.safetensors"'
    found = recipe(folder, "once", family, start)
    plan, manifest = found.plan, found.manifest
    assert all(token.start for token in plan.embeddings.tokens)
    with pytest.raises(Killed):
        execute(plan, manifest, KillAfter(2))
    shutil.rmtree(theirs)
    assert execute(plan, manifest, Silent()).status == "finished"
    drawing = Drawing("a photo of <a>", 1, tmp_path / "x.png")
    wanted = Wanted(
        drawings=(drawing,), width=64, height=64, guidance=3.0, steps=2, negative="", device=""
    )
    draw(chosen(Path(plan.run_folder)), wanted)
    assert drawing.path.is_file()
    lost = recipe(folder, "lost-later", family, f'from = "{first.run_folder}/lora"', WORDS).plan
    lost = evolve(lost, adapter=evolve(lost.adapter, start=str(theirs / "x.safetensors")))
    with pytest.raises(RunFailed, match=r"No such file .*theirs/x\.safetensors"):
        execute(lost, manifest, Silent())
    cut = theirs.parent / "cut.safetensors"
    whole = Path(first.run_folder) / "lora/pytorch_lora_weights.safetensors"
    cut.write_bytes(whole.read_bytes()[:-9])
    torn = recipe(folder, "torn", family, f'from = "{first.run_folder}/lora"', WORDS).plan
    torn = evolve(torn, adapter=evolve(torn.adapter, start=str(cut)))
    with pytest.raises(RunFailed, match=r"cut\.safetensors` can't be read"):
        execute(torn, manifest, Silent())
