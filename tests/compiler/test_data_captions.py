"""What a recipe says of captions, from the file to the manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.compile import Compiled
from compiler.data.manifest import Manifest
from compiler.data.prompts import prompts_of
from compiler.diagnostics import Diagnostic
from compiler.plan import Plan
from tests.compiler.recipes import RECIPE, codes, compiled, make_pictures, project

INSTANCE = 'captions = { from = "instance", prompt = "a photo of sks dog" }'


def tagged(folder: Path, captions: str, data: str = "", tags: str = "k, a, b, c, d") -> Path:
    """A project whose five pictures have captions of tags."""
    recipe = RECIPE.replace(INSTANCE, f"captions = {captions}" if captions else "")
    path = project(folder, recipe.replace("resolution = 64", f"resolution = 64\n{data}"))
    make_pictures(folder / "pictures", [(64, 64)] * 5, caption=tags)
    return path


def made(result: Compiled) -> tuple[Plan, Manifest]:
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    return result.plan, result.manifest


def refusal(result: Compiled) -> Diagnostic:
    assert result.plan is None
    (fault,) = result.diagnostics
    return fault


@pytest.mark.parametrize("setting", ["shuffle = true", "tag_dropout = 0.1"])
def test_shuffling_needs_variants_and_says_how(tmp_path: Path, setting: str) -> None:
    fault = refusal(compiled(tagged(tmp_path, f"{{ {setting} }}")))
    assert fault.code == "needs-variants" and fault.help == "variants = 8"
    key = setting.split()[0]
    assert f"`{key}`" in fault.message and fault.path == f"data.source[0].captions.{key}"
    pasted = RECIPE.replace(INSTANCE, f"captions = {{ {setting}, {fault.help} }}")
    (tmp_path / "recipe.toml").write_text(pasted)
    plan, _ = made(compiled(tmp_path / "recipe.toml"))
    assert plan.sources[0].captions.variants == 8


def test_variants_are_in_the_manifest_and_counted(tmp_path: Path) -> None:
    rule = "{ shuffle = true, keep_tokens = 1, variants = 6, dropout = 0.1 }"
    plan, manifest = made(compiled(tagged(tmp_path, rule)))
    for row in range(5):
        forms = manifest.captions_of(row)
        assert len(forms) == 6 and all(form.startswith("k, ") for form in forms)
        assert {"".join(sorted(form)) for form in forms} == {"".join(sorted("k, a, b, c, d"))}
    assert manifest.captions_of(0) != manifest.captions_of(1)
    texts = {text for row in range(5) for text in manifest.captions_of(row)}
    assert plan.sources[0].texts == len(texts) == len(manifest.captions) > 12
    assert len(prompts_of(plan, manifest)) == len(texts) + 1  # the empty one, for dropout
    again, other = (
        made(compiled(tmp_path / "recipe.toml")),
        made(compiled(tmp_path / "recipe.toml", "seed=1")),
    )
    assert again[1].digest == manifest.digest != other[1].digest


def test_each_line_is_a_caption_of_its_own(tmp_path: Path) -> None:
    path = tagged(tmp_path, '{ multiline = "alternatives", prefix = "k4s4," }', tags="a\nb c\n\na")
    plan, manifest = made(compiled(path))
    assert {manifest.captions_of(row) for row in range(5)} == {("k4s4, a", "k4s4, b c")}
    assert plan.sources[0].texts == 2


def test_json_sidecars(tmp_path: Path) -> None:
    path = tagged(tmp_path, '{ from = "json", key = "text", missing = "skip" }')
    for number, content in enumerate(('{"text": "a dog"}', '{"text": ["x", "y"]}', '{"no": 1}')):
        (tmp_path / "pictures" / f"00{number}.json").write_text(content)
    plan, manifest = made(compiled(path))
    assert [manifest.captions_of(row) for row in range(len(manifest))] == [("a dog",), ("x y",)]
    assert (plan.sources[0].images, plan.sources[0].skipped) == (2, 3)
    (tmp_path / "pictures" / "001.json").write_text('{"text": 3}')
    fault = next(d for d in compiled(path).diagnostics if d.severity == "error")
    assert fault.code == "broken-captions" and "1 caption file in" in fault.message
    assert "001.json: `text` is neither a text nor a list" in fault.notes[0]


def test_captions_that_can_not_be_read_are_left_out_with_their_images_if_the_recipe_says(
    tmp_path: Path,
) -> None:
    path = tagged(tmp_path, "{}", tags="a dog")
    (tmp_path / "pictures" / "001.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "pictures" / "003.txt").write_bytes("a dog".encode("utf-16"))
    fault = next(d for d in compiled(path).diagnostics if d.severity == "error")
    assert fault.code == "broken-captions" and 'broken = "skip"' in fault.help
    for key in ("data.broken", "data.source.0.broken"):
        result = compiled(path, f'{key}="skip"', 'data.captions.missing="empty"')
        warning = next(d for d in result.diagnostics if d.code == "broken-captions")
        assert warning.severity == "warning" and "2 caption files in" in warning.message
        assert "their images are skipped" in warning.message
        assert [note.rpartition("/")[2][:7] for note in warning.notes] == ["001.txt", "003.txt"]
        plan, manifest = made(result)
        assert (plan.sources[0].images, plan.sources[0].skipped) == (3, 2)
        assert result.outlook is not None
        told = [(one.images, one.why) for one in result.outlook.skipped]
        assert told == [(2, "a caption that can't be read")]
        assert sorted(manifest[row].key for row in range(3)) == ["000.png", "002.png", "004.png"]
    for number in range(5):
        (tmp_path / "pictures" / f"00{number}.txt").write_bytes(b"\xe9")
    result = compiled(path, 'data.broken="skip"')
    assert result.plan is None and "no-images" in [d.code for d in result.diagnostics]


@pytest.mark.parametrize(
    ("missing", "texts", "images", "fallbacks"),
    [
        ('"skip"', {"a dog"}, 1, 0),
        ('"empty"', {"a dog", ""}, 5, 4),
        ('"filename"', {"a dog", "red car"}, 5, 4),
        ('"instance", prompt = "a photo"', {"a dog", "a photo"}, 5, 4),
    ],
)
def test_missing_captions(
    tmp_path: Path, missing: str, texts: set[str], images: int, fallbacks: int
) -> None:
    recipe = RECIPE.replace(INSTANCE, f"captions = {{ missing = {missing} }}")
    path = project(tmp_path, recipe.replace("batch_size = 2", "batch_size = 1"))
    for number, file in enumerate(sorted((tmp_path / "pictures").iterdir())):
        file.rename(file.with_name(f"red_car_{number:02}.png"))
    (tmp_path / "pictures" / "red_car_00.txt").write_text("a dog")
    plan, manifest = made(compiled(path))
    assert set(manifest.captions) == texts
    source = plan.sources[0]
    assert (source.images, source.fallbacks) == (images, fallbacks)
    assert source.images + source.skipped == 5


def test_a_fallback_that_has_nothing_to_say(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE.replace(INSTANCE, 'captions = { missing = "filename" }'))
    fault = refusal(compiled(path))  # 000.png
    assert fault.code == "missing-captions" and "rename the files" in fault.help


@pytest.mark.parametrize(
    ("captions", "key"),
    [
        ("{ keep_tokens = 2 }", "keep_tokens"),
        ('{ separator = "|" }', "separator"),
        ("{ variants = 4 }", "variants"),
        ('{ key = "text" }', "key"),
        ('{ prompt = "a dog" }', "prompt"),
        ('{ from = "filename", multiline = "first", missing = "empty" }', "multiline"),
        ("{ tag_dropout = 0.0, keep_tokens = 1 }", "keep_tokens"),
    ],
)
def test_settings_without_effect(tmp_path: Path, captions: str, key: str) -> None:
    fault = refusal(compiled(tagged(tmp_path, captions)))
    assert fault.code == "no-effect" and fault.path == f"data.source[0].captions.{key}"
    assert f"`{key}`" in fault.message


def test_a_default_for_all_must_matter_to_one(tmp_path: Path) -> None:
    """A setting of [data] that only one of two sources makes use of is no mistake."""
    path = tagged(tmp_path, "", data="captions = { keep_tokens = 1 }")
    fault = refusal(compiled(path))
    assert (fault.code, fault.path) == ("no-effect", "data.captions.keep_tokens")
    more = '\n[[data.source]]\nid = "two"\npath = "pictures"\n'
    more += "captions = { shuffle = true, variants = 3 }\n\n[train]"
    path.write_text(path.read_text().replace("\n[train]", more))
    plan, manifest = made(compiled(path))
    assert [source.captions.variants for source in plan.sources] == [1, 3]
    assert [len(manifest.captions_of(row)) for row in (0, 5)] == [1, 3]


def test_nothing_to_shuffle(tmp_path: Path) -> None:
    rule = "{ shuffle = true, keep_tokens = 1, variants = 3 }"
    result = compiled(tagged(tmp_path, rule, tags="a dog, in snow"))
    assert codes(result) == ["no-effect"] and result.diagnostics[0].severity == "warning"
    assert made(result)[0].sources[0].texts == 1
    rule = '{ shuffle = true, separator = "|", variants = 3 }'
    assert codes(compiled(tagged(tmp_path / "other", rule))) == ["no-effect"]


def test_captions_that_never_say_the_trigger(tmp_path: Path) -> None:
    path = tagged(tmp_path, '{ trigger = "k4s4" }', tags="a dog")
    (tmp_path / "pictures" / "001.txt").write_text("a [trigger] dog")
    (tmp_path / "pictures" / "002.txt").write_text("a K4S4 dog")
    result = compiled(path)
    (fault,) = result.diagnostics
    assert (fault.code, fault.severity) == ("no-trigger", "warning")
    assert "3 of 5 captions" in fault.message and fault.help == 'prefix = "k4s4,"'
    assert set(made(result)[1].captions) == {"a dog", "a k4s4 dog", "a K4S4 dog"}
    path.write_text(path.read_text().replace("trigger =", 'prefix = "k4s4,", trigger ='))
    assert codes(compiled(path)) == []


def test_a_placeholder_that_nothing_fills(tmp_path: Path) -> None:
    result = compiled(tagged(tmp_path, "{ }", tags="a [trigger] dog"))
    assert codes(result) == ["no-trigger"] and "is trained as it stands" in str(
        result.diagnostics[0].message
    )


def test_an_instance_prompt_of_tags_is_shuffled_for_each_image(tmp_path: Path) -> None:
    captions = '{ from = "instance", prompt = "a, b, c, d, e", shuffle = true, variants = 2 }'
    _, manifest = made(compiled(tagged(tmp_path, captions)))
    assert len({manifest.captions_of(row) for row in range(5)}) == 5
