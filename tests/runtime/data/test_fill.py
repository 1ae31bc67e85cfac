"""Filling the cache, with a family without models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from attrs import evolve

from compiler.data.index import HEADERS, Index
from compiler.data.manifest import Folder, Manifest
from compiler.data.scan import scan
from compiler.plan import Dtype, Prompt
from runtime.data.cache import Cache
from runtime.data.fill import (
    BrokenData,
    NotFinite,
    fill_latents,
    fill_text,
    prompt_embeddings,
)
from runtime.data.located import sample_keys
from runtime.events import Silent
from tests.compiler.data.pictures import encoded, picture
from tests.runtime.data.fakes import FakeFamily, embedding_of
from tests.runtime.data.fed import filled, set_up
from tests.runtime.plans import PICTURES


class Recorder(Silent):
    def __init__(self) -> None:
        self.phases: list[tuple[str, int, str]] = []
        self.done: list[int] = []

    def phase(self, name: str, total: int, unit: str) -> None:
        self.phases.append((name, total, unit))

    def advance(self, done: int, **values: Any) -> None:
        self.done.append(done)


def test_each_prompt_is_encoded_once(tmp_path: Path) -> None:
    plan, manifest, family = set_up(tmp_path, dropout=0.5)
    prompts = (Prompt(name="a", text="a dog"), Prompt(name="b", text="a blue dog"))
    plan = evolve(plan, validation=evolve(PICTURES, prompts=prompts, negative="bad"))
    cache, events = Cache(Path(plan.cache_folder)), Recorder()
    fill_text(plan, manifest, family, cache, events)
    expected = [("a grey cat", False), ("a dog", False), ("", True), ("a blue dog", False)]
    assert sorted(family.prompts) == sorted([*expected, ("bad", True)])
    assert events.phases == [("text", 5, "prompts")] and events.done == [0, 1, 2, 3, 4, 5]
    assert family.loaded == ["tokenizer", "text_encoder"]
    again, events = FakeFamily(family.card), Recorder()
    fill_text(plan, manifest, again, Cache(cache.folder), events)
    assert again.loaded == [] and events.done == [5]
    found = prompt_embeddings(plan, family, cache, ["a blue dog"])
    assert torch.equal(found["a blue dog"]["states"], embedding_of("a blue dog", False)["states"])
    found = prompt_embeddings(plan, family, cache, ["bad"], negative=True)
    assert torch.equal(found["bad"]["states"], embedding_of("bad", True)["states"])


def test_text_depends_on_what_it_should(tmp_path: Path) -> None:
    plan, manifest, family, cache = filled(tmp_path)
    family.prompts.clear()
    changed = [
        evolve(plan, text=evolve(plan.text, max_length=31)),
        evolve(plan, text=evolve(plan.text, instruction=("other",))),
        evolve(plan, precision=evolve(plan.precision, cache="bfloat16")),
        evolve(plan, text=evolve(plan.text, zeros_for_empty=True)),
    ]
    for number, other in enumerate(changed):
        fill_text(other, manifest, family, cache, Silent())
        assert len(family.prompts) == 2 * (number + 1)
    embedding = prompt_embeddings(changed[2], family, cache, ["a dog"])["a dog"]["states"]
    assert embedding.dtype == torch.bfloat16 and embedding.shape == (3, 4)
    (tmp_path / "fake" / "text_encoder" / "config.json").write_text("{}")
    fill_text(plan, manifest, family, cache, Silent())
    assert len(family.prompts) == 10
    fill_text(evolve(plan, seed=9, name="other"), manifest, family, cache, Silent())
    assert len(family.prompts) == 10


def test_each_picture_is_encoded_once(tmp_path: Path) -> None:
    plan, manifest, family = set_up(tmp_path)
    cache, events = Cache(Path(plan.cache_folder)), Recorder()
    fill_latents(plan, manifest, family, cache, events)
    assert family.pictures == 12 and family.loaded == ["vae"]
    assert events.phases == [("latents", 12, "pictures")] and events.done == list(range(13))
    fill_latents(plan, manifest, family, Cache(cache.folder), Silent())
    assert family.pictures == 12
    shutil.copytree(tmp_path / "dogs", tmp_path / "moved")
    moved = Manifest(
        [Folder(id="dogs", path=str(tmp_path / "moved")), manifest.folders[1]], manifest
    )
    fill_latents(plan, moved, family, cache, Silent())
    assert family.pictures == 12  # content, not places
    (tmp_path / "moved" / "00.png").write_bytes((tmp_path / "moved" / "01.png").read_bytes())
    fill_latents(plan, moved, family, cache, Silent())
    assert family.pictures == 12  # known content under another name
    (tmp_path / "fake" / "vae" / "config.json").write_text("{}")
    fill_latents(plan, manifest, family, cache, Silent())
    assert family.pictures == 24


def test_equal_pictures_share_an_entry(tmp_path: Path) -> None:
    plan, manifest, family = set_up(tmp_path)
    for number in range(1, 5):
        shutil.copy(tmp_path / "dogs" / "00.png", tmp_path / "dogs" / f"0{number}.png")
    fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent())
    assert family.pictures == 8


def test_filling_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    plan, manifest, family = set_up(tmp_path)
    family.fail_at = 7
    cache = Cache(Path(plan.cache_folder))
    with pytest.raises(KeyboardInterrupt):
        fill_latents(plan, manifest, family, cache, Silent())
    family.fail_at, events = None, Recorder()
    fill_latents(plan, manifest, family, Cache(cache.folder), events)
    assert family.pictures == 12 and events.done[0] == 7


@pytest.mark.parametrize("broken", ["error", "skip"])
def test_broken_bodies_are_all_named_and_condemned(
    tmp_path: Path, broken: Literal["error", "skip"]
) -> None:
    """A JPEG whose ends are right and whose middle is missing: no header shows it."""
    plan, manifest, family = set_up(tmp_path, edit=lambda source: evolve(source, broken=broken))
    for seed, name in enumerate(("01.png", "03.png")):
        data = encoded(picture(70, 70, seed=seed), "PNG")
        middle = data.index(b"IDAT") + 40
        rotten = data[:middle] + bytes(len(data) - middle - 12) + data[-12:]
        (tmp_path / "dogs" / name).write_bytes(rotten)
    with pytest.raises(BrokenData, match="2 pictures can't be decoded") as caught:
        fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent())
    assert [Path(path).name for path, _ in caught.value.files] == ["01.png", "03.png"]
    assert "01.png: broken image data" in caught.value.message
    assert "run the recipe again" in caught.value.help and family.pictures == 10
    assert ('broken = "skip"' in caught.value.help) is (broken == "error")
    assert "leave them out" in caught.value.help
    index = Index(tmp_path / "xdg" / "tuner" / HEADERS)
    faults = scan(tmp_path / "dogs", index).faults
    assert [Path(f.path).name for f in faults] == ["01.png", "03.png"]
    assert all("broken image data" in f.why for f in faults)


def test_files_that_vanish_or_shrink(tmp_path: Path) -> None:
    plan, manifest, family = set_up(tmp_path)
    (tmp_path / "dogs" / "00.png").write_bytes(encoded(picture(60, 70), "PNG"))
    with pytest.raises(BrokenData, match="60x70 pixels, not 70x70"):
        fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent())
    (tmp_path / "dogs" / "00.png").unlink()
    with pytest.raises(Exception, match="can't be read: No such file"):
        fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent())


@pytest.mark.parametrize(
    ("held", "factor", "why"),
    [
        ("float16", 1e6, "exceeds what the cache's float16 holds"),
        ("bfloat16", 1e6, ""),
        ("float32", float("nan"), "is no finite number"),
    ],
)
def test_what_the_cache_s_numbers_cant_hold_is_never_cached(
    tmp_path: Path, held: Dtype, factor: float, why: str
) -> None:
    """Neither of prompts nor of pictures; what was encoded before is."""
    plan, manifest, family = set_up(tmp_path)
    plan = evolve(plan, precision=evolve(plan.precision, cache=held))
    cache, at = Cache(Path(plan.cache_folder)), 3
    encode, embed = family.encode_pixels, family.encode_with

    def overflowing(vae: torch.nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        made = encode(vae, pixels)
        return {n: t * factor for n, t in made.items()} if family.pictures == at else made

    def large(*args: Any, **kwargs: Any) -> list[dict[str, torch.Tensor]]:
        return [{n: t * factor for n, t in each.items()} for each in embed(*args, **kwargs)]

    family.encode_pixels, family.encode_with = overflowing, large  # type: ignore[assignment]
    if not why:
        fill_text(plan, manifest, family, cache, Silent())
        fill_latents(plan, manifest, family, cache, Silent())
        return
    with pytest.raises(NotFinite, match=rf"of the prompt `a (dog|grey cat)` {why}"):
        fill_text(plan, manifest, family, cache, Silent())
    with pytest.raises(NotFinite, match=rf"0\d\.png {why}"):
        fill_latents(plan, manifest, family, cache, Silent())
    keys = sample_keys(plan, manifest, family, cache)
    assert len(cache.missing(keys)) == len(set(keys)) - (at - 1)
