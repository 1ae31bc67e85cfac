"""Pictures named by URL are asked for again, and copied again where they have changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from compiler.data.sources.remote import picture_path
from compiler.plan import lock_path
from runtime.data.pictures import STATES, copy_pictures, renew_pictures
from tests.compiler.data.pictures import encoded, picture
from tests.compiler.recipes import RECIPE, compiled, make_base
from tests.runtime.data.servers import Site, served
from tests.runtime.data.test_downloads import SOURCE
from tuner.copying import compile_copied


@pytest.fixture
def site() -> Iterator[Site]:
    with served() as found:
        found.pages = {f"/{n}.png": drawn(n) for n in range(4)}
        yield found


def drawn(seed: int, size: int = 64) -> bytes:
    return encoded(picture(size, size, seed=seed), "PNG")


def asked(site: Site, method: str) -> list[str]:
    found = [path for m, path, _ in site.asked if m == method]
    site.asked.clear()
    return sorted(found)


def test_only_what_has_changed_is_copied_again(site: Site, tmp_path: Path) -> None:
    urls, said = [f"{site.url}/{n}.png" for n in range(4)], []
    copy_pictures(urls, tmp_path, said.append)
    before = {url: picture_path(tmp_path, url).stat().st_mtime_ns for url in urls}
    said.clear()
    assert asked(site, "GET") == ["/0.png", "/1.png", "/2.png", "/3.png"]
    assert not renew_pictures(urls, tmp_path, said.append) and said == []
    assert not [1 for method, _, _ in site.asked if method == "GET"]
    site.pages["/2.png"] = drawn(9)
    site.asked.clear()
    assert renew_pictures(urls, tmp_path, said.append)
    assert said == ["1 of 4 images on the web have changed and are copied again"]
    assert asked(site, "GET") == ["/2.png"]
    assert picture_path(tmp_path, urls[2]).read_bytes() == drawn(9)
    after = {url: picture_path(tmp_path, url).stat().st_mtime_ns for url in urls}
    assert [url for url in urls if before[url] != after[url]] == [urls[2]]
    assert not renew_pictures(urls, tmp_path, said.append)


def test_a_run_that_was_begun_and_servers_that_do_not_answer(site: Site, tmp_path: Path) -> None:
    urls, said = [f"{site.url}/{n}.png" for n in range(4)], []
    copy_pictures(urls, tmp_path, lambda _: None)
    site.pages |= {"/0.png": 404, "/1.png": 503, "/2.png": drawn(9)}
    assert not renew_pictures(urls, tmp_path, said.append, begun="runs/x")
    assert len(said) == 2
    assert said[0].startswith("2 of 4 images on the web can't be asked") and "404" in said[0]
    assert said[1].startswith("1 of 4 images on the web have changed. runs/x was begun")
    assert [picture_path(tmp_path, urls[n]).read_bytes() for n in range(4)] == [
        drawn(n) for n in range(4)
    ]
    assert renew_pictures(urls, tmp_path, said.append)
    assert picture_path(tmp_path, urls[2]).read_bytes() == drawn(9)


def test_without_a_state_the_length_tells(site: Site, tmp_path: Path) -> None:
    """Also of copies that were made before states were kept."""
    url, said = f"{site.url}/0.png", []
    site.states = False
    copy_pictures([url], tmp_path, said.append)
    assert not renew_pictures([url], tmp_path, said.append)
    site.pages["/0.png"] = drawn(1, 80)
    assert renew_pictures([url], tmp_path, said.append)
    (tmp_path / STATES).unlink()
    assert not renew_pictures([url], tmp_path, said.append)
    (tmp_path / STATES).write_bytes(b"no database" * 100)
    site.pages["/0.png"] = drawn(1, 90)
    assert renew_pictures([url], tmp_path, said.append)


def test_a_run_asks_once_and_offline_says_so(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tuner.compiling.compile_here", lambda path, more: compiled(path, *more))
    make_base(tmp_path / "base")
    rows = [{"url": f"{site.url}/{n}.png", "text": "a"} for n in range(4)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace(SOURCE, 'path = "t.jsonl"'), encoding="utf-8")
    first = compile_copied(path, [], offline=False)
    assert first.plan is not None and first.manifest is not None
    assert asked(site, "HEAD") == []  # they were copied a moment ago
    site.pages["/3.png"] = drawn(7, 80)
    kept = compile_copied(path, [], offline=True)
    assert kept.manifest is not None and kept.manifest.digest == first.manifest.digest
    assert "4 images on the web are not asked whether" in capsys.readouterr().err
    assert site.asked == []
    lock = lock_path(Path(first.plan.run_folder))
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    begun = compile_copied(path, [], offline=False)
    assert begun.manifest is not None and begun.manifest.digest == first.manifest.digest
    assert "goes on with them" in capsys.readouterr().err
    lock.unlink()
    again = compile_copied(path, [], offline=False)
    assert again.manifest is not None and again.manifest[3].width == 80
