"""Feeding from the cache, with a family without models and with tiny ones."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image, ImageOps

from compiler.plan import DataSource, NoiseTable
from runtime import rng
from runtime.data.cache import Cache, CacheIncomplete
from runtime.data.feed import Feed, Window
from runtime.data.fill import (
    fill_latents,
    fill_text,
)
from runtime.data.located import sample_keys
from runtime.events import Silent
from runtime.families import family_of
from runtime.noise_levels import draw_uniform, sigmas_from_uniform
from runtime.noise_table import cumulative
from runtime.objective import per_sample_loss
from tests.runtime.data.fakes import embedding_of
from tests.runtime.data.fed import CPU, all_windows, filled, same_windows
from tests.runtime.plans import draw_data, source_of, tiny_plan
from tests.runtime.tiny import make_tiny


def test_a_window_that_can_t_be_pinned_is_the_host_s_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: torch.Tensor) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", full)
    feed = Feed(*filled(tmp_path), torch.device("cuda"))
    with closing(feed.windows(0)) as windows, pytest.raises(MemoryError, match="pinned"):
        next(windows)


def test_every_epoch_is_fed_whole(tmp_path: Path) -> None:
    plan, manifest, family, cache = filled(tmp_path)
    windows = all_windows(Feed(plan, manifest, family, cache, CPU))
    assert [w.step for w in windows] == list(range(12)) and plan.steps.per_epoch == 5
    assert [w.epoch for w in windows] == [1] * 5 + [2] * 5 + [3] * 2
    for epoch in (windows[:5], windows[5:10]):
        names = Counter(name for window in epoch for name in window.names)
        assert sum(names.values()) == plan.steps.samples_per_epoch == 17
        assert sum(w.samples for w in epoch) == 17
        assert all(names[f"cats/0{n}.png"] == 1 for n in range(4))
        assert all(names[f"dogs/0{n}.png"] in (1, 2) for n in range(8))
        assert sum(len(w.batches) for w in epoch) == plan.steps.batches_per_epoch


def test_batches_hold_what_belongs_together(tmp_path: Path) -> None:
    plan, manifest, family, cache = filled(tmp_path)
    rows = {manifest.name(row): row for row in range(len(manifest))}
    for window in all_windows(Feed(plan, manifest, family, cache, CPU)):
        names = iter(window.names)
        slot = 0
        for batch in window.batches:
            assert batch.latents.dtype == batch.noise.dtype == batch.sigmas.dtype == torch.float32
            assert batch.weights is None
            for index in range(len(batch.latents)):
                row = rows[next(names)]
                placed = manifest.placement(row)
                assert batch.latents[index].shape == (3, placed.height // 8, placed.width // 8)
                caption = embedding_of(manifest.captions_of(row)[0], False)["states"]
                assert torch.equal(batch.text["states"][index][: len(caption)], caption)
                shape = tuple(batch.latents.shape[1:])
                noise = rng.normal(shape, plan.seed, "noise", window.step, slot)
                assert torch.equal(batch.noise[index], noise)
                drawn = rng.uniforms(plan.seed, "timestep", window.step, [slot])
                sigma = sigmas_from_uniform(draw_uniform(plan.objective, drawn), plan.objective)
                assert batch.sigmas[index] == sigma[0]
                slot += 1
        assert slot == window.samples


def test_offset_noise_is_the_same_in_all_places_of_a_channel(tmp_path: Path) -> None:
    plan, manifest, family, cache = filled(tmp_path)
    table = NoiseTable(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    objective = evolve(plan.objective, prediction="epsilon", table=table, shift=1.0)
    plain = evolve(plan, objective=objective)
    moved = evolve(plan, objective=evolve(objective, offset_noise=0.1))
    added: list[torch.Tensor] = []
    windows = (all_windows(Feed(p, manifest, family, cache, CPU)) for p in (plain, moved))
    for before, after in zip(*windows, strict=True):
        for one, other in zip(before.batches, after.batches, strict=True):
            change = (other.noise - one.noise) / 0.1
            assert change.std((2, 3)).max() < 1e-5
            added.append(change.mean((2, 3)).flatten())
            assert torch.equal(one.latents, other.latents)
            assert one.kept is not None
            levels = (one.sigmas * 1000).round().long() - 1
            assert torch.equal(one.kept, cumulative(table)[levels])
    drawn = torch.cat(added)
    assert len(drawn) > 100 and len(drawn.unique()) == len(drawn)
    assert abs(drawn.mean()) < 4 / len(drawn) ** 0.5 and 0.7 < drawn.std() < 1.3


def test_the_posterior_is_drawn_anew_each_step(tmp_path: Path) -> None:
    plan, manifest, family, cache = filled(tmp_path, batch_size=1, accumulate=1)
    seen: dict[str, list[torch.Tensor]] = {}
    for window in all_windows(Feed(plan, manifest, family, cache, CPU)):
        seen.setdefault(window.names[0], []).append(window.batches[0].latents)
    twice = next(latents for latents in seen.values() if len(latents) > 1)
    assert not torch.equal(twice[0], twice[1]) and torch.allclose(twice[0], twice[1], atol=3.0)


def test_any_step_can_be_gone_to(tmp_path: Path) -> None:
    def changing(source: DataSource) -> DataSource:
        rule = evolve(source.captions, prompt="a, b c, d e f", shuffle=True, variants=3)
        return evolve(source, captions=rule, geometry=evolve(source.geometry, flip=True))

    plan, manifest, family, cache = filled(tmp_path, dropout=0.4, edit=changing)
    whole = all_windows(Feed(plan, manifest, family, cache, CPU))
    for start in (0, 3, 7, 11):
        rest = all_windows(Feed(plan, manifest, family, Cache(cache.folder), CPU), start)
        assert len(rest) == 12 - start
        assert all(same_windows(a, b) for a, b in zip(whole[start:], rest, strict=True))
    assert all_windows(Feed(plan, manifest, family, cache, CPU), 12) == []


def test_cutting_a_window_otherwise_changes_nothing(tmp_path: Path) -> None:
    """One sample a batch and four batches, dealt to two ranks or not: the same draws per slot."""
    plan, manifest, family, cache = filled(tmp_path, batch_size=1, accumulate=4)
    ranks = evolve(plan, steps=evolve(plan.steps, ranks=2, accumulate=2))
    one = all_windows(Feed(plan, manifest, family, cache, CPU))
    parts = [all_windows(Feed(ranks, manifest, family, cache, CPU, rank=r)) for r in range(2)]
    for window, *mine in zip(one, *parts, strict=True):
        assert all(part.samples == window.samples for part in mine)
        for index, batch in enumerate(window.batches):
            other = mine[index % 2].batches[index // 2]
            assert torch.equal(batch.latents, other.latents)
            assert torch.equal(batch.noise, other.noise) and torch.equal(batch.sigmas, other.sigmas)


def test_caption_dropout_has_its_share(tmp_path: Path) -> None:
    plan, manifest, family, cache = filled(tmp_path, dropout=0.3)
    plan = evolve(plan, steps=evolve(plan.steps, total=200))
    feed = Feed(plan, manifest, family, cache, CPU)
    empty = embedding_of("", True)["states"]
    drops = Counter[tuple[str, bool]]()
    for window in feed.windows(0):
        names = iter(window.names)
        for batch in window.batches:
            for states in batch.text["states"]:
                dropped = torch.equal(states[: len(empty)], empty)
                drops[next(names)[:4], dropped] += 1
    assert drops["cats", True] == 0
    share = drops["dogs", True] / (drops["dogs", True] + drops["dogs", False])
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 500)


def test_one_of_several_forms_is_drawn_at_each_use(tmp_path: Path) -> None:
    """Each form is encoded once, is drawn equally often, and by (step, slot) alone."""

    def tagged(source: DataSource) -> DataSource:
        if source.id != "dogs":
            return source
        rule = evolve(source.captions, prompt="a, b c, d e f", shuffle=True, variants=4)
        return evolve(source, captions=rule)

    plan, manifest, family, cache = filled(tmp_path, edit=tagged)
    texts = {text for row in range(len(manifest)) for text in manifest.captions_of(row)}
    assert sorted(family.prompts) == sorted((text, False) for text in texts)
    assert texts - {"a grey cat"} <= {
        "a, b c, d e f", "a, d e f, b c", "b c, a, d e f",
        "b c, d e f, a", "d e f, a, b c", "d e f, b c, a",
    }  # fmt: skip
    plan = evolve(plan, steps=evolve(plan.steps, total=300))
    rows = {manifest.name(row): row for row in range(len(manifest))}
    drawn, possible = Counter[int](), 0
    for window in Feed(plan, manifest, family, cache, CPU).windows(0):
        names = iter(window.names)
        slot = 0
        for batch in window.batches:
            for states in batch.text["states"]:
                said = manifest.captions_of(rows[next(names)])
                which = int(rng.uniform(plan.seed, "caption", window.step, slot) * 4)
                slot += 1
                expected = embedding_of(said[which if len(said) > 1 else 0], False)["states"]
                assert torch.equal(states[: len(expected)], expected)
                if len(said) > 1:
                    drawn[which] += 1
                    possible += 1
    assert all(abs(drawn[n] - possible / 4) < 5 * np.sqrt(possible * 3 / 16) for n in range(4))


def test_a_mirrored_sample_is_the_picture_mirrored(tmp_path: Path) -> None:
    plan, manifest, family, cache = filled(
        tmp_path,
        edit=lambda source: evolve(source, geometry=evolve(source.geometry, flip=True)),
    )
    assert len(manifest) == 24 and family.pictures == 24
    keys = sample_keys(plan, manifest, family, cache)
    for row in range(0, 24, 2):
        assert manifest.name(row + 1) == manifest.name(row) + " (mirrored)"
        one, other = cache.get(keys[row])["mean"], cache.get(keys[row + 1])["mean"]
        assert torch.allclose(one.flip(-1), other, atol=1e-6) and not torch.equal(one, other)
    seen = Counter(
        name
        for window in all_windows(Feed(plan, manifest, family, cache, CPU))[: plan.steps.per_epoch]
        for name in window.names
    )
    assert {name for name in seen if name.startswith("cats")} == {
        manifest.name(row) for row in range(24) if manifest.source(row) == 1
    }


def test_samples_carry_the_weight_of_their_source(tmp_path: Path) -> None:
    plan, manifest, family, cache = filled(
        tmp_path, edit=lambda source: evolve(source, loss_weight=0.25 if source.id == "cats" else 1)
    )
    seen: set[float] = set()
    for window in all_windows(Feed(plan, manifest, family, cache, CPU)):
        names = iter(window.names)
        for batch in window.batches:
            assert batch.weights is not None and batch.weights.dtype == torch.float32
            expected = [0.25 if next(names).startswith("cats") else 1.0 for _ in batch.latents]
            assert batch.weights.tolist() == expected
            seen |= set(expected)
            prediction = torch.zeros_like(batch.latents)
            loss = per_sample_loss(prediction, batch, plan.objective)
            plain = per_sample_loss(prediction, evolve(batch, weights=None), plan.objective)
            assert torch.allclose(loss, plain * torch.tensor(expected))
    assert seen == {0.25, 1.0}


def test_encodings_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed of the cache that was filled looks for nothing, and reads what another finds; whether
    encodings were missing or not."""
    plan, manifest, family, cache = filled(tmp_path)
    expected = all_windows(Feed(plan, manifest, family, Cache(cache.folder), CPU))
    again = Cache(cache.folder)
    fill_text(plan, manifest, family, again, Silent())
    fill_latents(plan, manifest, family, again, Silent())
    monkeypatch.setattr(Cache, "find", None)
    monkeypatch.setattr("runtime.data.located.item_hashes", None)
    for each in (cache, again):
        windows = all_windows(Feed(plan, manifest, family, each, CPU))
        assert len(windows) == len(expected) and all(map(same_windows, windows, expected))


def test_a_cache_that_lost_something_says_so(tmp_path: Path) -> None:
    plan, manifest, family, cache = filled(tmp_path)
    for shard in cache.folder.rglob("*.safetensors"):
        shard.unlink()
    with pytest.raises(CacheIncomplete, match="are not in the cache"):
        Feed(plan, manifest, family, Cache(cache.folder), CPU)


def feeders() -> int:
    return sum(thread.name == "feed" for thread in threading.enumerate())


def test_windows_wait_on_the_host(tmp_path: Path) -> None:
    """On the device is the one that is asked for, or plans would have to count all of them."""
    plan, manifest, family, cache = filled(tmp_path)
    feed = Feed(plan, manifest, family, cache, torch.device("meta"))

    def devices(window: Window) -> set[str]:
        batches = window.batches
        tensors = [t for b in batches for t in (b.latents, b.noise, b.sigmas, *b.text.values())]
        return {tensor.device.type for tensor in tensors}

    assert devices(feed._made(0)) == {"cpu"} and devices(feed.window(0)) == {"meta"}
    assert all(devices(window) == {"meta"} for window in feed.windows(0))


def test_closing_early_ends_the_thread(tmp_path: Path) -> None:
    plan, manifest, family, cache = filled(tmp_path)
    feed = Feed(plan, manifest, family, cache, CPU)
    with closing(feed.windows(0)) as windows:
        assert next(windows).step == 0 and feeders() == 1
    assert feeders() == 0


def test_what_goes_wrong_ahead_arrives_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, manifest, family, cache = filled(tmp_path)
    feed = Feed(plan, manifest, family, cache, CPU)
    real = feed._made

    def failing(step: int) -> Window:
        if step == 3:
            raise RuntimeError("torn")
        return real(step)

    monkeypatch.setattr(feed, "_made", failing)
    seen: list[int] = []

    def read(windows: Iterator[Window]) -> None:
        seen.extend(window.step for window in windows)

    with pytest.raises(RuntimeError, match="torn"):
        for window in feed.windows(0):
            seen.append(window.step)
    assert seen == [0, 1, 2] and feeders() == 0


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_real_families(tmp_path: Path, family: str) -> None:
    """Tiny pipelines from files to batches: latents as the VAE gives them, text as the pipeline."""
    base = make_tiny(family, tmp_path / "base")
    data = draw_data(tmp_path / "dogs", [(64, 64)] * 3)
    plan, manifest = tiny_plan(family, base, data, tmp_path / "run", steps=2)
    kind, cache = family_of(family), Cache(tmp_path / "cache")
    fill_text(plan, manifest, kind, cache, Silent())
    fill_latents(plan, manifest, kind, cache, Silent())
    windows = all_windows(Feed(plan, manifest, kind, cache, CPU))
    assert sorted(w.samples for w in windows) == [1, 2]
    factor = kind.card.vae_factor(json.loads(plan.model.configs["vae"]))
    for window in windows:
        (batch,) = window.batches
        assert batch.latents.shape[2:] == (64 // factor, 64 // factor)
        assert torch.isfinite(batch.latents).all()
        model = kind.load(plan.model, "transformer", torch.float32, CPU)
        with torch.no_grad():
            found = kind.predict(model, batch.latents, batch.sigmas, batch.text)
        assert found.shape == batch.latents.shape


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_real_photographs(tmp_path: Path, data_root: Path, family: str) -> None:
    """A dog and a backpack: what is fed is what Pillow and Diffusers' own VAE make of the files."""
    base = make_tiny(family, tmp_path / "base")
    sources = [
        source_of(data_root / "dreambooth" / "dog6", prompt="a photo of sks dog", repeats="1.5"),
        source_of(data_root / "dreambooth" / "backpack", prompt="a photo of a zwx backpack"),
    ]
    plan, manifest = tiny_plan(family, base, sources, tmp_path / "run", steps=4)
    kind, cache = family_of(family), Cache(tmp_path / "cache")
    fill_text(plan, manifest, kind, cache, Silent())
    fill_latents(plan, manifest, kind, cache, Silent())
    vae = kind.load(plan.model, "vae", torch.float32, CPU)
    located = cache.locate(sample_keys(plan, manifest, kind, cache))
    for row in range(0, len(manifest), 4):
        placed = manifest.placement(row)
        with Image.open(manifest.path(row)) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        size = (placed.resize_width, placed.resize_height)
        box = (placed.crop_x, placed.crop_y)
        cut = image.resize(size, Image.Resampling.LANCZOS).crop(
            (*box, box[0] + placed.width, box[1] + placed.height)
        )
        pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            coded = vae.encode(pixels)
        expected = coded.latent if family == "sana" else coded.latent_dist.mean
        difference = (cache.read(located, row)["mean"] - expected[0]).abs().max()
        assert difference < 0.05 * expected.abs().max()  # pixels differ by rounding alone
    names = Counter(n for w in all_windows(Feed(plan, manifest, kind, cache, CPU)) for n in w.names)
    assert {name.split("/")[0] for name in names} == {"dog6", "backpack"}
