"""Mutated recipes through the whole compiler: a plan or diagnostics, no exception, no write."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.compiler.recipes import project

FULL = """\
schema = 1
name = "try"
seed = 3
output = "runs"

[model]
family = "sana"
base = "base"
[model.transformer]
init = "pretrained"

[adapter]
kind = "lora"
rank = 4
alpha = 8
dropout = 0.1
init = "kaiming"
targets = "attention"

[memory]
budget = "9 GiB"
activation_checkpointing = "auto"

[precision]
compute = "bf16"

[text]
max_length = 300
instruction = true

[data]
resolution = 64
resolution_type = "pixel_area"
multiple = 16
crop = { style = "random", aspect = "closest", buckets = ["1:1", "3:2"], resize = "none" }
captions = { dropout = 0.1, missing = "skip", trigger = "sks", prefix = "a", suffix = ", b" }
min_size = 8
max_size = 4000
min_aspect = 0.1
max_aspect = 9.5
upscale = false
flip = true
broken = "skip"
workers = 2
[[data.source]]
id = "one"
path = "pictures"
repeats = 1.5
captions = { from = "instance", prompt = "a photo of sks dog" }
[[data.source]]
path = "pictures"
resolution = [32, 64]
holdout = 0
regularisation = { weight = 0.5 }
captions = { from = "filename", missing = "empty", shuffle = true, tag_dropout = 0.1, variants = 3 }
[[data.source]]
id = "three"
path = "pictures"
resolution = 32
crop = { style = "face", aspect = "random", buckets = ["2:3"], resize = "cover" }
[data.source.captions]
from = "json"
key = "text"
missing = "instance"
prompt = "x | y | z"
separator = "|"
keep_tokens = 1
shuffle = true
variants = 2
multiline = "alternatives"

[train]
steps = 20
batch_size = 2
accumulate = 2
max_grad_norm = 0.5
optimizer = { name = "adamw", lr = 1e-4, betas = [0.9, 0.99], eps = 1e-8, weight_decay = 0.1 }
schedule = { name = "cosine-with-restarts", warmup = "10%", end = 0.1, cycles = 1 }
timesteps = { sampling = "logit-normal", shift = 3, mean = 0.0, std = 1.0 }
loss = { kind = "mse", weighting = "none" }
ema = { decay = 0.99, device = "cpu", every = "2 steps" }

[checkpoints]
every = "1 epoch"
keep = 2

[validation]
every = "5 steps"
prompts = { a = "a dog", more = { b = "a cat" } }
sizes = ["64x64", "128x64"]
guidance = 4.5
steps = 3
seed = 1
count = 2

[track]
to = ["tensorboard"]
[launch]
device = "cpu"
threads = 1
"""

HOSTILE = (
    *("-1", "0", "1e400", "nan", "-inf", "1e-320", "9223372036854775807", "-9223372036854775808"),
    *("true", '""', '"auto"', '"\\u0000"', '"a\\u0000b"', '"' + "x" * 5000 + '"', '"../../../etc"'),
    *("[]", "[[]]", "{}", "[1, [2]]", "{ a = { b = 1 } }", "1979-05-27T07:32:00Z", "07:32:00"),
    *('"400"', '"1 epoch"', '"99999999999 steps"', '"0.0001%"', '"1 B"', '"(a+)+$"', '"[" '),
    *("99999999", "0.0000001", '"64x64"', '"0x0"', '"none"', '"off"', "['a', 'b']", '"~nobody/x"'),
)


def hostile(text: str, rng: random.Random) -> str:
    """One value of one line exchanged for a hostile one."""
    lines = text.split("\n")
    chosen = rng.choice([n for n, line in enumerate(lines) if "=" in line])
    key, _, _ = lines[chosen].partition("=")
    lines[chosen] = f"{key}= {rng.choice(HOSTILE)}"
    return "\n".join(lines)


def test_the_recipe_is_good(tmp_path: Path) -> None:
    from tests.compiler.fuzzing import compile_one

    assert compile_one(project(tmp_path, FULL), [])


def test_mutated_recipes_compile_or_are_refused(tmp_path: Path) -> None:
    from tests.compiler.fuzzing import fuzz

    assert 0 < fuzz(tmp_path, 300, seed=1) < 300


@pytest.mark.slow
def test_many_mutated_recipes_compile_or_are_refused(tmp_path: Path) -> None:
    from tests.compiler.fuzzing import fuzz

    assert 0 < fuzz(tmp_path, 200, seed=2) < 200


def test_what_is_written_is_noticed(tmp_path: Path) -> None:
    from tests.compiler.fuzzing import nothing_written

    noted: list[str] = []
    with nothing_written(noted):
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").read_text()
        (tmp_path / "b").mkdir()
    assert len(noted) == 2
