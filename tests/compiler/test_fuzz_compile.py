"""Mutated recipes through the whole compiler: a plan or diagnostics, no exception, no write."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from compiler.diagnostics import render, to_json
from compiler.lock import dumps, loads
from tests.compiler.recipes import FixedMemory, compiled, project
from tests.compiler.test_fuzz import mutate

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
crop = { style = "random", aspect = "square" }
captions = { dropout = 0.1, missing = "skip" }
min_size = 8
broken = "skip"
workers = 2
[[data.source]]
id = "one"
path = "pictures"
repeats = 1.5
captions = { from = "instance", prompt = "a photo of sks dog" }
[[data.source]]
path = "pictures"
resolution = 128
captions = { from = "filename", missing = "empty" }

[train]
steps = 20
batch_size = 2
accumulate = 2
max_grad_norm = 0.5
optimizer = { name = "adamw", lr = 1e-4, betas = [0.9, 0.99], eps = 1e-8, weight_decay = 0.1 }
schedule = { name = "cosine", warmup = "10%", end = 0.1, cycles = 0.5 }
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


def fuzz(path: Path, count: int, seed: int) -> int:
    """Compile `count` mutated recipes; the number that still gave a plan."""
    rng, plans = random.Random(seed), 0
    before = sorted(str(p) for p in path.parent.rglob("*"))
    for number in range(count):
        text = FULL
        for _ in range(rng.randrange(1, 4)):
            text = (hostile if rng.random() < 0.7 else mutate)(text, rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            plans += check(path)
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed}:\n{text}") from error
    assert sorted(str(p) for p in path.parent.rglob("*")) == before
    return plans


def check(path: Path) -> bool:
    result = compiled(path, memory_model=FixedMemory())
    errors = [fault for fault in result.diagnostics if fault.severity == "error"]
    assert (result.plan is None) == bool(errors)
    for fault in result.diagnostics:
        assert render(fault, result.texts)
        json.dumps(to_json(fault))
    if result.plan is not None:
        assert loads(dumps(result.plan)) == result.plan
    return result.plan is not None


def test_the_recipe_is_good(tmp_path: Path) -> None:
    assert check(project(tmp_path, FULL))


def test_mutated_recipes_compile_or_are_refused(tmp_path: Path) -> None:
    assert 0 < fuzz(project(tmp_path, FULL), 300, seed=1) < 300


@pytest.mark.slow
def test_many_mutated_recipes_compile_or_are_refused(tmp_path: Path) -> None:
    assert 0 < fuzz(project(tmp_path, FULL), 2_000, seed=2) < 2_000
