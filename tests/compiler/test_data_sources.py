"""Sources beyond folders in recipes: what a plan says of them, and what it says is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compiler.compile import Compiled
from compiler.data.index import Index
from compiler.diagnostics import Diagnostic
from tests.compiler.data import containers
from tests.compiler.data.pictures import encoded, picture, put, settle
from tests.compiler.recipes import RECIPE, codes, compiled, project

ROOT = Path(__file__).parents[2]
SOURCE = 'path = "pictures"\ncaptions = { from = "instance", prompt = "a photo of sks dog" }'
JPEG = encoded(picture(64, 64), "JPEG")
TOLD = {f"{n}.jpg": (encoded(picture(64, 64, seed=n), "JPEG"), f"a dog, {n}") for n in range(4)}

Try = Callable[..., Compiled]


@pytest.fixture
def attempt(tmp_path: Path) -> Try:
    """Compiles a recipe with these lines in place of the data source's."""
    path = project(tmp_path)
    containers.as_folder(tmp_path / "folder", TOLD)
    containers.as_table(tmp_path / "folder" / "t.jsonl", TOLD)
    containers.as_tar(tmp_path / "t.tar", TOLD)
    containers.as_parquet(tmp_path / "t.parquet", TOLD)

    def compile_it(text: str, more: str = "", index: Index | None = None) -> Compiled:
        path.write_text(RECIPE.replace(SOURCE, text) + more, encoding="utf-8")
        return compiled(path, index=index)

    return compile_it


def only(result: Compiled) -> Diagnostic:
    assert len(result.diagnostics) == 1, result.diagnostics
    return result.diagnostics[0]


@pytest.mark.parametrize(
    ("path", "kind", "name", "column"),
    [
        ("folder", "folder", "folder", ""),
        ("folder/t.jsonl", "table", "t", "file_name"),
        ("t.tar", "webdataset", "t", ""),
        ("t.parquet", "parquet", "t", "image"),
        ("*.parquet", "parquet", "source", "image"),
    ],
)
def test_the_plan_says_what_it_found(
    attempt: Try, tmp_path: Path, path: str, kind: str, name: str, column: str
) -> None:
    plan = attempt(f'path = "{path}"').plan
    assert plan is not None
    source = plan.sources[0]
    assert (source.kind, source.id, source.column) == (kind, name, column)
    assert source.path == str(tmp_path / path) and source.files == (kind != "folder")
    assert source.captions.kind == ("column" if kind in ("table", "parquet") else "textfile")
    found = {d.key: d.value for d in plan.decisions}
    assert found["data.source[0].format"] == kind


@pytest.mark.parametrize(
    ("text", "code", "marked", "words"),
    [
        ('path = "t.tar"\ncaptions = { from = "column" }', "captions-elsewhere", '"column"', ""),
        ('path = "folder"\ncaptions = { from = "column" }', "captions-elsewhere", '"column"', ""),
        ('path = "t.parquet"\ncaptions = { from = "json" }', "captions-elsewhere", '"json"', ""),
        ('path = "folder"\nimage = "x"', "no-effect", "image", "names a column"),
        ('path = "folder"\nformat = "folder"\nfiles = ["x"]', "no-effect", '["x"]', "files"),
        ('path = "t.tar"\nfiles = ["x"]', "no-effect", '["x"]', "picks files of a folder"),
        ('path = "t.parquet"\nimage = "x"', "wrong-column", '"x"', "`image` (struct"),
        (
            'path = "t.parquet"\ncaptions = { column = "words" }',
            "wrong-column",
            '"words"',
            "`text` (string)",
        ),
        (
            'path = "t.parquet"\ncaptions = { fallback = ["words"] }',
            "wrong-column",
            '["words"]',
            "`text` (string)",
        ),
        ('path = "folder/t.jsonl"\nimage = "x"', "wrong-column", '"x"', "`file_name`, `text`"),
        ('path = "folder/0.jpg"', "missing-path", '"folder/0.jpg"', ".parquet"),
        ('path = "none*.tar"', "missing-path", '"none*.tar"', "relative to the recipe"),
        ('path = "t.tar"\nformat = "folder"', "unreadable-source", '"folder"', "asks for a folder"),
        (
            'path = "t.tar"\nmask = { from = "file", suffix = "-m" }',
            "conflict",
            '{ from = "file", suffix = "-m" }',
            "folder",
        ),
        ('path = "hub:x"', "bad-path", '"hub:x"', "hub:owner/name"),
        ('path = "s3://b/x"', "not-downloaded", '"s3://b/x"', "`tuner run`"),
        ('path = "t.tar"\nformat = "zip"', "unknown-value", '"zip"', "webdataset"),
    ],
)
def test_one_mistake_one_message(
    attempt: Try, text: str, code: str, marked: str, words: str
) -> None:
    result = attempt(text)
    fault = only(result)
    assert fault.code == code and fault.span is not None
    assert words in fault.message + fault.label + fault.help
    line = next(iter(result.texts.values())).split("\n")[fault.span.line - 1]
    assert line[fault.span.column - 1 : fault.span.end_column - 1] == marked


def test_a_default_in_data_is_blamed_where_it_stands(attempt: Try) -> None:
    result = attempt(
        'path = "t.parquet"',
        '[data.captions]\ncolumn = "words"\nfrom = "column"\n',
    )
    assert only(result).path == "data.captions.column"


def test_one_default_for_folders_and_tables(attempt: Try) -> None:
    """What is stated for all sources holds for those that can take it, and is no idle setting."""
    both = 'path = "t.parquet"\n[[data.source]]\npath = "folder"'
    plan = attempt(both, '[data.captions]\nfallback = ["text"]\n').plan
    assert plan is not None
    assert [source.captions.kind for source in plan.sources] == ["column", "textfile"]


def test_broken_shards_are_handled_as_the_recipe_says(attempt: Try, tmp_path: Path) -> None:
    put(tmp_path / "shards", {"a.parquet": b"PAR1 and no more"})
    containers.as_parquet(tmp_path / "shards" / "b.parquet", TOLD)
    fault = only(attempt('path = "shards"'))
    assert (fault.code, fault.severity) == ("broken-images", "error")
    assert "not a whole Parquet file" in fault.notes[0] and "a.parquet" in fault.notes[0]
    result = attempt('path = "shards"\nbroken = "skip"')
    assert result.plan is not None and result.plan.sources[0].images == 4
    assert only(result).severity == "warning"


def test_captions_that_are_missing_in_a_column(attempt: Try, tmp_path: Path) -> None:
    told = TOLD | {"4.jpg": (JPEG, " ")}
    containers.as_parquet(tmp_path / "t.parquet", told)
    fault = only(attempt('path = "t.parquet"'))
    assert fault.code == "missing-captions" and "4.jpg" in fault.help
    plan = attempt('path = "t.parquet"\ncaptions = { missing = "empty" }').plan
    assert plan is not None and plan.sources[0].fallbacks == 1


def test_a_table_and_its_folder_share_what_is_held_out(attempt: Try) -> None:
    both = 'path = "folder"\nholdout = 2\n[[data.source]]\npath = "folder/t.jsonl"'
    assert codes(attempt(both)) == ["holdout-leak"]
    assert codes(attempt(both + "\nholdout = 2")) == []


def test_a_folder_as_datasets_lays_them_out(attempt: Try, tmp_path: Path) -> None:
    """ImageFolder: pictures in folders named after splits, captions in tables called metadata."""
    for split in ("train", "test"):
        folder = containers.as_folder(tmp_path / "set" / split, TOLD)
        for path in folder.glob("*.txt"):
            path.unlink()
    said = '\ncaptions = { from = "instance", prompt = "a dog" }'
    fault = only(attempt(f'path = "set/"{said}'))
    assert fault.code == "several-splits" and "test, train" in fault.message
    assert fault.help.startswith('path = "set/train" for one of them')
    for picked, images in (('path = "set/train"', 4), ('path = "set"\nformat = "folder"', 8)):
        plan = attempt(picked + said).plan
        assert plan is not None and plan.sources[0].images == images
    for split in ("train", "test"):
        containers.as_table(tmp_path / "set" / split / "metadata.jsonl", TOLD)
    fault = only(attempt(f'path = "set"{said}'))
    pasted = 'files = ["train/metadata.jsonl"]'
    assert fault.code == "several-splits" and fault.help.startswith(pasted)
    result = attempt(f'path = "set"\n{pasted}')
    assert result.plan is not None and result.manifest is not None
    assert [sample.captions for sample in result.manifest] == [(t,) for _, t in TOLD.values()]
    fault = only(attempt('path = "set/train"'))
    pasted = 'files = ["metadata.jsonl"]'
    assert fault.code == "missing-captions" and pasted in fault.help
    assert attempt(f'path = "set/train"\n{pasted}').plan is not None
    (tmp_path / "set/test/0.jpg").rename(tmp_path / "set/0.jpg")  # now pictures lie at the top
    assert only(attempt(f'path = "set"{said}')).code == "several-splits"
    (tmp_path / "set/test").rename(tmp_path / "set/tests")
    assert attempt(f'path = "set"{said}').plan is not None


def test_all_rows_of_a_picture_are_held_out_together(attempt: Try, tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.jpg", "text": f"{n}, {m}"} for n in range(4) for m in range(5)]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "folder/many.jsonl").write_text(lines)
    source = 'path = "folder/many.jsonl"\nholdout = '
    sets = []
    for holdout in ("0.3", "1", "2"):  # a share of four pictures, not of twenty rows
        result = attempt(source + holdout)
        assert result.plan is not None and result.manifest is not None
        assert result.manifest.held_out is not None
        out = [sample.file for sample in result.manifest.held_out]
        assert not set(out) & {sample.file for sample in result.manifest}
        assert len(out) == 5 * len(set(out)) == result.plan.sources[0].held_out
        sets.append(set(out))
    assert [len(each) for each in sets] == [1, 1, 2] and sets[0] == sets[1] < sets[2]
    fault = only(attempt(source + "4"))
    assert fault.code == "holdout-too-large" and "4 images are held out of 4" in fault.message


def test_a_second_plan_opens_no_shard(
    attempt: Try, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle()
    index = Index(tmp_path / "index")
    first = attempt('path = "t.parquet"', index=index)
    assert first.plan is not None and index.save()

    def refuse() -> None:
        raise AssertionError("pyarrow is asked for")

    monkeypatch.setattr("compiler.data.sources.columns.pyarrow", refuse)
    second = attempt('path = "t.parquet"', index=Index(tmp_path / "index"))
    assert second.plan is not None and second.plan.manifest == first.plan.manifest


def test_folders_and_second_plans_load_no_reader(attempt: Try, tmp_path: Path) -> None:
    attempt('path = "folder"')
    script = (
        "import sys\nfrom pathlib import Path\nfrom tests.compiler.recipes import MACHINE\n"
        "from compiler.compile import compile_file\n"
        "made = compile_file(Path(sys.argv[1]), machine=MACHINE)\n"
        "assert made.plan is not None, made.diagnostics\n"
        "heavy = {'pyarrow', 'fsspec', 'huggingface_hub', 'tarfile', 'csv', 'torch', 'numpy'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "recipe.toml")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
