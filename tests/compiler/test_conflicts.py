"""Conflicts and traps of what a run leaves behind, each with its message."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from compiler.diagnostics import Diagnostic
from compiler.memory import Candidate, Simulation
from tests.compiler.recipes import RECIPE, FixedMemory, codes, compiled, project

PROMPT = 'validation.prompts={ a = "a dog" }'


def only(folder: Path, *changes: str, family: str = "sana") -> Diagnostic:
    """The one diagnostic of a changed recipe."""
    text = RECIPE.replace('"sana"', f'"{family}"')
    found = compiled(project(folder, text, family), *changes, memory_model=FixedMemory())
    (fault,) = found.diagnostics
    return fault


@pytest.mark.parametrize(
    ("changes", "code", "path", "words"),
    [
        (['checkpoints.every="99 steps"'], "interval-too-long", "checkpoints.every",
         "every 99 steps in a run of 6: no checkpoint is written before the end"),
        ([PROMPT, 'validation.every="50 epochs"'], "interval-too-long", "validation.every",
         "no picture is drawn before the end"),
        (['train.ema={ every = "99 steps" }'], "no-effect", "train.ema.every", "never is"),
        (["validation.steps=4"], "no-effect", "validation.steps", "no validation prompts"),
        (["validation.prompts={}"], "empty-prompt", "validation.prompts", "no prompt here"),
        (['validation.prompts={ a = " " }'], "empty-prompt", "validation.prompts.a", "is empty"),
        ([PROMPT, 'validation.negative="ugly"', "validation.guidance=1"], "no-effect",
         "validation.negative", "only above 1"),
        ([PROMPT, 'validation.sizes=["1024x1024"]'], "unusual-size", "validation.sizes[0]",
         "far from what the base was made for (128 pixels)"),
        ([PROMPT, 'validation.sizes=["640x64"]'], "unusual-size", "validation.sizes[0]",
         "10 times as long as it is wide"),
        ([PROMPT, 'validation.sizes=["66x64"]'], "bad-size", "validation.sizes[0]",
         "edges must be multiples of"),
        (["data.source[0].captions.dropout=1.0"], "no-effect", "data.source[0].captions.dropout",
         "captions are never learned"),
        (["data.source[0].regularisation={}"], "no-effect", "data.source[0].regularisation",
         "all sources are images of the class"),
        (["data.source[0].holdout=1", 'evaluation.every="99 steps"'], "interval-too-long",
         "evaluation.every", "no loss is measured between the start and the end"),
        (["train.accumulate=9"], "no-effect", "train.accumulate", "an epoch has 3 on a device"),
        (["train.batch_size=1", "train.timesteps.stratified=true"], "no-effect",
         "train.timesteps.stratified", "each step has one sample"),
        (["train.optimizer.lr=1e-12"], "unusual-lr", "train.optimizer.lr",
         "below what changes float32 weights"),
        (["data.source.repeats=2"], "no-such-entry", "data.source.repeats",
         "has no entry `repeats`"),
    ],
)  # fmt: skip
def test_what_is_said(tmp_path: Path, changes: list[str], code: str, path: str, words: str) -> None:
    found = only(tmp_path, *changes)
    assert (found.code, found.path) == (code, path)
    assert words in found.message


def test_a_size_beyond_the_table_of_positions(tmp_path: Path) -> None:
    """SD3 knows 192 places of 16 pixels along an edge."""
    changes = (PROMPT, 'validation.sizes=["3088x64"]')
    found = only(tmp_path, *changes, family="sd3")
    assert found.code == "bad-size" and "positions end at 3072 pixels" in found.message


def test_a_default_interval_is_not_warned_of(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE.replace("epochs = 2", "steps = 1"))
    assert codes(compiled(path, PROMPT)) == []


def test_sizes_near_what_is_trained_are_usual(tmp_path: Path) -> None:
    sizes = 'validation.sizes=["64x64", "96x64", "128x128", "192x128"]'
    assert codes(compiled(project(tmp_path), PROMPT, sizes)) == []


def test_keeping_all_checkpoints_is_said(tmp_path: Path) -> None:
    plan = compiled(project(tmp_path), "checkpoints.keep=0").plan
    assert plan is not None
    assert [d.value for d in plan.decisions if d.key == "checkpoints.keep"] == ["all"]


class Refusing(FixedMemory):
    """A memory model of a base that can't be built, or of patterns that match nothing in it."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        raise ValueError(self.why)


@pytest.mark.parametrize(
    ("adapter", "why", "path"),
    [
        (
            'kind = "lokr", train_norm = true',
            "`train_norm`: this model has no norm",
            "adapter.train_norm",
        ),
        (
            'kind = "oft", block_size = 7',
            "the 9 inputs of `a` can't be cut; block_size may be 3",
            "adapter.block_size",
        ),
        ('kind = "oft"', "the 9 inputs of `a` can't be cut; block_size may be 3", "adapter.kind"),
    ],
)
def test_what_an_adapter_can_not_be_put_on(
    tmp_path: Path, adapter: str, why: str, path: str
) -> None:
    changes = (f"adapter={{ {adapter} }}", 'memory.budget="9 GiB"')
    result = compiled(project(tmp_path), *changes, memory_model=Refusing(why))
    (fault,) = result.diagnostics
    assert (fault.code, fault.path, fault.message) == ("model-refused", path, why)
    assert path.rpartition(".")[2] in fault.help or "block_size may be 3" in fault.help


SMALL = r"`b.0.q` has 16 singular values for `pissa` to start from, not 64: rank may be at most 16"


@pytest.mark.parametrize(
    ("adapter", "why", "marked", "help"),
    [
        ('init = "pissa"\nrank = 64', SMALL, "64", "rank = 16"),
        ('init = "pissa"', SMALL, '"pissa"', "rank = 16"),
        (
            'init = "pissa"\nrank = 64',
            SMALL + r" in `b\.\d+\.q`",
            "64",
            r'rank = 16, or ranks = { "b\\.\\d+\\.q" = 16 }',
        ),
        (
            'init = "pissa"\nranks = { "x" = 2, "b.*" = 64 }',
            SMALL + r" in `b\.\d+\.q`",
            "64",
            '"b.*" = 16',
        ),
        (
            'ranks = { "b.0" = 2 }',
            r"`b.0` matches none of the 9 adapted layers; `b\.0\..*` matches 3",
            '"b.0"',
            r'"b\\.0\\..*" = 2',
        ),
        (
            'alphas = { "c" = 2.0 }',
            "`c` matches none of the 9 adapted layers",
            "c",
            "patterns are matched with whole names",
        ),
        (
            'exclude = ["b.*", "q"]',
            r"`q` of `exclude` matches none of the targets; `.*\.q` matches 3",
            '"q"',
            r'".*\\.q"',
        ),
        (
            'targets = ["q"]',
            r"`q` matches none of the 9 linear layers; `.*\.q` matches 3",
            '"q"',
            r'".*\\.q"',
        ),
        ('targets = "q"', "`q` matches none of the 9 linear layers", '"q"', "named sets"),
    ],
)
def test_a_layer_or_pattern_that_the_model_refuses_is_marked_and_mended(
    tmp_path: Path, adapter: str, why: str, marked: str, help: str
) -> None:
    text = f'{RECIPE}[adapter]\nkind = "lora"\n{adapter}\n'
    result = compiled(project(tmp_path, text), memory_model=Refusing(why))
    (fault,) = result.diagnostics
    assert (fault.code, fault.message) == ("model-refused", why)
    assert fault.span is not None
    line = text.splitlines()[fault.span.line - 1]
    assert line[fault.span.column - 1 : fault.span.end_column - 1].strip('"') == marked.strip('"')
    assert help in fault.help
    if " = " in help and help != "rank = 16":
        tomllib.loads(help.rpartition(", or ")[2])


@pytest.mark.parametrize("budget", ["9 GiB", "none"])
@pytest.mark.parametrize(
    ("why", "path"),
    [
        ("`nope.*` matches none of the 9 linear layers", "adapter.targets[1]"),
        ("`x` of `exclude` matches none of the targets", "adapter.exclude[0]"),
        ("`exclude` leaves nothing to adapt", "adapter.exclude"),
        ("`late.*` matches none of the 9 adapted layers", "adapter.ranks.late.*"),
        ("groups must be a positive integer", "model.base"),
    ],
)
def test_what_a_simulation_refuses_is_blamed_on_what_it_names(
    tmp_path: Path, why: str, path: str, budget: str
) -> None:
    changes = (
        'adapter={ kind = "lora", targets = [".*", "nope.*"], exclude = ["x"], '
        'ranks = { "late.*" = 4 } }',
        f'memory.budget="{budget}"',
    )
    result = compiled(project(tmp_path), *changes, memory_model=Refusing(why))
    (fault,) = result.diagnostics
    assert (fault.code, fault.path, fault.message) == ("model-refused", path, why)
