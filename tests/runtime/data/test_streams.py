"""What is streamed gives the same samples, keys and latents as its copy, and is never copied."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from attrs import evolve
from PIL import Image

from compiler.compile import Compiled
from compiler.data.manifest import Manifest
from compiler.plan import Plan
from runtime.data import items, ranged, streams
from runtime.data.cache import Cache
from runtime.data.fill import fill_latents
from runtime.data.located import sample_keys
from runtime.errors import RunFailed
from runtime.events import Silent
from runtime.families import family_of
from tests.compiler.data import containers
from tests.compiler.data.pictures import encoded, picture
from tests.compiler.recipes import codes, compiled
from tests.runtime.data.servers import Site, served
from tests.runtime.data.test_containers import RECIPE
from tests.runtime.tiny import make_tiny
from tuner.copying import compile_copied

SIZES = [(70, 70), (140, 70), (64, 64), (70, 140), (80, 81), (96, 64)]
TOLD = {
    f"{'ab'[n % 2]}/{n}.png": (encoded(picture(*size, seed=n), "PNG"), f"a, b{n}, c, d")
    for n, size in enumerate(SIZES)
}
IDLE = 5 << 20  # bytes of a column that nobody asks for


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with served() as found:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(ranged, "_PAUSE", 0.01)
        ranged._hub_files.cache_clear()
        ranged._unchanged.cache_clear()
        yield found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, whose runs keep all that they note in it."""
    monkeypatch.setattr("tuner.compiling.compile_here", lambda path, more: compiled(path, *more))
    make_tiny("sana", tmp_path / "base")
    return tmp_path


def shard(folder: Path, told: containers.Told = TOLD, *, idle: int = 0, rows: int = 2) -> bytes:
    table = containers.rows_of(told)
    if idle:
        noise = [os.urandom(idle // len(told)) for _ in told]
        table = table.append_column("depth", pa.array(noise, pa.binary()))
    pq.write_table(table, folder / "shard", row_group_size=rows)
    return (folder / "shard").read_bytes()


def tar(folder: Path, told: containers.Told = TOLD) -> bytes:
    return containers.as_tar(folder / "tar", told).read_bytes()


def recipe(folder: Path, path: str, kind: str, more: str = "streaming = true") -> Path:
    text = RECIPE.format(kind=kind, path=path, steps=2).replace("holdout", f"{more}\nholdout")
    (folder / f"{kind}.toml").write_text(text, encoding="utf-8")
    return folder / f"{kind}.toml"


def whole(result: Compiled) -> tuple[Plan, Manifest]:
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    return result.plan, result.manifest


def facts(result: Compiled) -> tuple[object, ...]:
    """All that must not depend on where the pictures lie."""
    plan, manifest = whole(result)
    cache, family = Cache(Path(plan.cache_folder)), family_of("sana")
    fill_latents(plan, manifest, family, cache, Silent())
    keys = sample_keys(plan, manifest, family, cache)
    values = [cache.get(key)["mean"].flatten().tolist() for key in keys]
    samples = [evolve(sample, file="", at=0) for sample in manifest]
    return plan.manifest, plan.buckets, samples, keys, values


def kept(folder: Path) -> list[str]:
    """Files that hold a picture, or a part of one that is longer than any name."""
    bodies = [data[100:180] for data, _ in TOLD.values()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(p) for p in files if any(body in p.read_bytes() for body in bodies)]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("place_of", ["web", "hub", "store"])
def test_what_is_streamed_is_as_its_copy(site: Site, place: Path, kind: str, place_of: str) -> None:
    name, data = ("t.parquet", shard(place)) if kind == "parquet" else ("t.tar", tar(place))
    (place / "copied").mkdir()
    (place / "copied" / name).write_bytes(data)
    expected = facts(compiled(recipe(place, f"copied/{name}", "copied", more="")))
    store = pytest.importorskip("fsspec").filesystem("memory")
    site.pages[f"/{name}"] = site.hub[f"data/{name}"] = data
    site.hub["README.md"] = b"about it"
    store.pipe({f"/streamed/{name}": data})
    path = {"web": f"{site.url}/{name}", "hub": "hub:a/b", "store": f"memory://streamed/{name}"}
    try:
        toml = recipe(place, path[place_of], "streamed")
        assert codes(compiled(toml)) == ["not-downloaded"] and site.asked == []
        result = compile_copied(toml, [], offline=False)
        asked = len(site.asked)
        again = compiled(toml)
        assert len(site.asked) == asked, "a plan opens no connection"
        assert whole(again)[1].digest == whole(result)[1].digest
        assert facts(result) == expected
        assert kept(place / "cache") == kept(place / "xdg") == []
        assert kept(place / "cache-streamed") == []
        asked = len(site.asked)
        assert facts(compile_copied(toml, [], offline=True)) == expected
        assert len(site.asked) == asked, "all is cached"
    finally:
        store.store.clear()


def test_pictures_of_another_column_are_not_taken_for_those_of_this_one(
    site: Site, place: Path
) -> None:
    table = containers.rows_of(TOLD)
    cells = table.column("image").to_pylist()
    table = table.append_column("other", pa.array(cells[::-1], table.schema.field("image").type))
    pq.write_table(table, place / "two.parquet")
    site.pages["/two.parquet"] = (place / "two.parquet").read_bytes()
    copied = {}
    for column in ("image", "other"):
        toml = recipe(place, "two.parquet", f"copied-{column}", more=f'image = "{column}"')
        copied[column] = facts(compiled(toml))
    both = {}
    for column in ("image", "other"):  # listed one after the other, then encoded
        more = f'image = "{column}"\nstreaming = true'
        both[column] = recipe(place, f"{site.url}/two.parquet", f"streamed-{column}", more=more)
        compile_copied(both[column], [], offline=False)
    for column, toml in both.items():
        assert facts(compiled(toml)) == copied[column]
    assert copied["image"] != copied["other"]


def test_of_a_shard_only_the_columns_that_are_asked_for(site: Site, place: Path) -> None:
    data = site.pages["/t.parquet"] = shard(place, idle=IDLE)
    toml = recipe(place, f"{site.url}/t.parquet", "columns")
    result = compile_copied(toml, [], offline=False)
    images = sum(len(data) for data, _ in TOLD.values())
    listed = site.given("/t.parquet")
    assert images < listed < images + 200_000 < len(data) // 4
    facts(result)
    held = sum(whole(result)[1][row].bytes for row in range(len(whole(result)[1]))) // 2
    # The server counts what it has sent, of which a client that has enough may leave some unread.
    assert held <= site.given("/t.parquet") - listed < len(data) // 4
    groups = sum(1 for method, path, _ in site.asked if method == "GET")
    assert groups < 30


def test_of_a_tar_of_large_pictures_little_more_than_headers(site: Site, place: Path) -> None:
    noise = pytest.importorskip("numpy").random.default_rng(0)
    large = {}
    for n in range(6):
        pixels = Image.fromarray(noise.integers(0, 255, (512, 640, 3), dtype="uint8"))
        large[f"{n}.jpg"] = (encoded(pixels, "JPEG", quality=98), f"a, {n}")
    data = site.pages["/t.tar"] = tar(place, large)
    toml = recipe(place, f"{site.url}/t.tar", "headers")
    result = compile_copied(toml, [], offline=False)
    assert len(whole(result)[1]) == 2 * 5  # mirrored, and one is held out
    assert site.given("/t.tar") < len(data) // 5
    (place / "copied.tar").write_bytes(data)
    copied = compiled(recipe(place, "copied.tar", "copied", more=""))
    assert whole(copied)[1].digest == whole(result)[1].digest


def test_small_members_are_read_in_long_pieces(site: Site, place: Path) -> None:
    small = {
        f"{n:04}.png": (encoded(picture(64, 64, seed=n % 7), "PNG"), f"a, {n}") for n in range(300)
    }
    data = site.pages["/t.tar"] = tar(place, small)
    compile_copied(recipe(place, f"{site.url}/t.tar", "small"), [], offline=False)
    gets = [count for method, _, count in site.asked if method == "GET"]
    assert sum(gets) < 1.1 * len(data) and len(gets) < 20
    site.asked.clear()
    facts(compiled(place / "small.toml"))  # whose content is known, and 7 of them differ
    gets = [count for method, _, count in site.asked if method == "GET"]
    assert len(gets) == 2 * 7 and sum(gets) < len(data) // 20  # each mirrored, too


def test_what_was_listed_before_an_interruption_is_not_listed_again(
    site: Site, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(TOLD)
    for number in range(3):
        part = {name: TOLD[name] for name in names[number::3]}
        site.hub[f"train_{number:03}.parquet"] = shard(place, part)
    toml = recipe(place, "hub:a/b", "killed")
    monkeypatch.setattr(streams, "_TOGETHER", 1)
    real = streams._note
    done: list[int] = []

    def killed(*given: object) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(streams, "_note", killed)
    with pytest.raises(KeyboardInterrupt):
        compile_copied(toml, [], offline=False)
    monkeypatch.setattr(streams, "_note", real)
    before = {name: site.given(name) for name in site.hub}
    result = compile_copied(toml, [], offline=False)
    assert len(whole(result)[1]) == 2 * 5
    after = {name: site.given(name) for name in site.hub}
    assert after["train_000.parquet"] == before["train_000.parquet"] > 0
    assert after["train_001.parquet"] == before["train_001.parquet"] > 0
    assert after["train_002.parquet"] > before["train_002.parquet"]


def test_a_commit_that_changes_one_shard_has_that_one_listed_anew(site: Site, place: Path) -> None:
    names = list(TOLD)
    for number in range(2):
        part = {name: TOLD[name] for name in names[number::2]}
        site.hub[f"train_{number:03}.parquet"] = shard(place, part)
    toml = recipe(place, "hub:a/b", "commits")
    first = compile_copied(toml, [], offline=False)
    site.commit = "decade" * 6 + "beef"
    site.hub["README.md"] = b"more about it"
    site.hub["train_001.parquet"] = shard(place, {names[1]: TOLD[names[1]]})
    site.asked.clear()
    second = compile_copied(toml, [], offline=False)
    assert (len(whole(first)[1]), len(whole(second)[1])) == (2 * 5, 2 * 3)
    assert site.given("train_000.parquet") == 0 < site.given("train_001.parquet")


def test_what_was_encoded_before_an_interruption_is_not_fetched_again(
    site: Site, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shard(place, rows=1)
    site.pages["/t.parquet"] = data
    toml = recipe(place, f"{site.url}/t.parquet", "half").read_text().replace("flip = true", "")
    (place / "half.toml").write_text(toml)
    plan, manifest = whole(compile_copied(place / "half.toml", [], offline=False))
    plan = evolve(plan, workers=1)
    family, real, fetched = family_of("sana"), ranged.web.part, []

    def cut(url: str, start: int, count: int, mark: str) -> bytes:
        if len(fetched) == 4:  # the footer, and three of five pictures
            raise KeyboardInterrupt
        fetched.append(count)
        return real(url, start, count, mark)

    items._layout.cache_clear()
    items._group.cache_clear()
    monkeypatch.setattr(ranged.web, "part", cut)
    with pytest.raises(KeyboardInterrupt):
        fill_latents(plan, manifest, family, Cache(place / "c"), Silent())
    monkeypatch.setattr(ranged.web, "part", real)
    items._layout.cache_clear()
    items._group.cache_clear()
    cache = Cache(place / "c")
    left = cache.missing(sample_keys(plan, manifest, family, cache))
    assert 2 <= len(left) < len(manifest) == 5
    site.asked.clear()
    fill_latents(plan, manifest, family, cache, Silent())
    assert len([1 for method, _, _ in site.asked if method == "GET"]) == 1 + len(left)
    assert not Cache(place / "c").missing(sample_keys(plan, manifest, family, cache))


def test_a_server_that_fails_now_and_then(site: Site, place: Path) -> None:
    site.pages["/t.tar"] = tar(place)
    site.fail = {"/t.tar": 0}
    toml = recipe(place, f"{site.url}/t.tar", "flaky")
    result = compile_copied(toml, [], offline=False)
    site.fail["/t.tar"] = 2
    facts(result)  # the third try
    plan, manifest = whole(result)
    site.fail["/t.tar"] = 10**6
    fresh = evolve(plan, cache_folder=str(place / "fresh"))
    with pytest.raises(RunFailed, match=r"t.tar` can't be read: the server says 503") as caught:
        fill_latents(fresh, manifest, family_of("sana"), Cache(place / "fresh"), Silent())
    assert "what was cached is kept" in caught.value.help
    assert codes(compiled(toml)) == []  # nobody calls the pictures broken


def test_what_fails_while_it_is_listed_is_not_taken_for_damage(site: Site, place: Path) -> None:
    for name, data in (("t.parquet", shard(place)), ("t.tar", tar(place))):
        site.pages[f"/{name}"] = data
        toml = recipe(place, f"{site.url}/{name}", name.replace(".", "-"))
        given = compiled(toml).draft
        assert given is not None
        from runtime.data.downloads import copy_sources

        copy_sources(given.remotes, given.downloads, lambda _: None)
        site.fail[f"/{name}"] = 10**6
        with pytest.raises(RunFailed, match="the server says 503"):
            compile_copied(toml, [], offline=False)
        site.fail[f"/{name}"] = 0
        assert len(whole(compile_copied(toml, [], offline=False))[1]) == 2 * 5


def test_a_server_without_parts_and_one_that_has_changed(site: Site, place: Path) -> None:
    site.pages["/t.tar"] = tar(place)
    site.parts = False
    toml = recipe(place, f"{site.url}/t.tar", "parts")
    with pytest.raises(RunFailed, match="the server gives whole files only"):
        compile_copied(toml, [], offline=False)
    site.parts = True
    result = compile_copied(toml, [], offline=False)
    plan, manifest = whole(result)
    other = {name: (data, "a, other") for name, (data, _) in reversed(TOLD.items())}
    site.pages["/t.tar"] = tar(place, other)
    with pytest.raises(RunFailed, match="it has changed since it was listed"):
        fill_latents(plan, manifest, family_of("sana"), Cache(place / "c"), Silent())
    renewed = compile_copied(toml, [], offline=False)
    assert {text for sample in whole(renewed)[1] for text in sample.captions} != {
        text for sample in manifest for text in sample.captions
    }
    (place / "copied.tar").write_bytes(tar(place, other))
    assert facts(renewed) == facts(compiled(recipe(place, "copied.tar", "copied", more="")))


def test_what_can_not_be_streamed(site: Site, place: Path) -> None:
    import gzip

    site.hub["a.tar.gz"] = gzip.compress(tar(place))
    assert codes(compile_copied(recipe(place, "hub:a/b", "x"), [], offline=False)) == [
        "not-streamed"
    ]
    site.hub.clear()
    site.hub["a.tar"] = gzip.compress(tar(place))
    with pytest.raises(RunFailed, match="is a compressed tar"):
        compile_copied(recipe(place, "hub:a/c", "y"), [], offline=False)
    site.hub.clear()
    site.hub["a.jpg"] = b""
    with pytest.raises(RunFailed, match="holds no tar or Parquet shard at all"):
        compile_copied(recipe(place, "hub:a/d", "z"), [], offline=False)
    table = pa.table({"image": ["x/1.png", "x/2.png"], "text": ["a", "b"]})
    pq.write_table(table, place / "paths")
    site.pages["/paths.parquet"] = (place / "paths").read_bytes()
    toml = recipe(place, f"{site.url}/paths.parquet", "paths")
    found = compile_copied(toml, [], offline=False)
    assert codes(found) == ["not-streamed"] and "paths or URLs" in found.diagnostics[0].message
    assert codes(compiled(recipe(place, "https://a.org/x.jsonl", "w"))) == ["not-streamed"]
    assert codes(compiled(recipe(place, "photos", "v"))) == ["no-effect"]
