"""What the plan says of optimizers and schedules: names, arguments, conflicts."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from compiler.diagnostics import Diagnostic
from compiler.draft import Draft
from compiler.optimizers import OPTIMIZERS, called_here, packages
from compiler.overrides import parse_overrides
from compiler.passes import PASSES
from compiler.passes.fused import fused_backward_possible
from compiler.passes.optimizer import planned, resolve_optimizer, suits
from compiler.plan import Plan
from compiler.schema import Recipe
from compiler.source import merge, read_source
from compiler.structure import structure, tagged_paths
from compiler.synonyms import SYNONYMS
from tests.compiler.recipes import GPU, MACHINE, FixedMemory, compiled, project

ELSEWHERE = """
adamw_bf16 ao-adamw8bit ao-adamw4bit ao-adamfp8 ao-adamwfp8 adamw_schedulefree
adamw_schedulefree+aggressive adamw_schedulefree+no_kahan optimi-stableadamw optimi-adamw
optimi-lion optimi-radam optimi-ranger optimi-adan optimi-adam optimi-sgd soap
bnb-adagrad bnb-adagrad8bit bnb-adam
bnb-adam8bit bnb-adamw bnb-adamw8bit bnb-adamw-paged bnb-adamw8bit-paged bnb-lion bnb-lion8bit
bnb-lion-paged bnb-lion8bit-paged bnb-ademamix bnb-ademamix8bit bnb-ademamix-paged
bnb-ademamix8bit-paged prodigy AdamW8bit PagedAdamW8bit Lion8bit ADAMW_8BIT AdamW
"""


def faults(path: Path, *overrides: str, machine=MACHINE) -> tuple[Diagnostic, ...]:
    return compiled(path, *overrides, machine=machine).diagnostics


def only(path: Path, *overrides: str, machine=MACHINE) -> Diagnostic:
    (fault,) = faults(path, *overrides, machine=machine)
    return fault


def plan_of(path: Path, *overrides: str, machine=MACHINE) -> Plan:
    result = compiled(path, *overrides, machine=machine)
    assert result.plan is not None, result.diagnostics
    return result.plan


def draft_of(path: Path, *overrides: str) -> Draft:
    """The draft as the memory pass finds it."""
    source, _ = read_source(path, path.name)
    layers, _ = parse_overrides(overrides)
    assert source is not None
    located, _ = merge([source, *layers], tagged_paths(Recipe))
    recipe, _ = structure(located.data, Recipe, located, SYNONYMS)
    assert recipe is not None
    draft = Draft(
        recipe=recipe,
        located=located,
        folder=path.parent,
        cache_default=path.parent / "cache",
        machine=MACHINE,
        memory_model=FixedMemory(),
        index=None,
    )
    for draft.running, resolve in PASSES:
        if draft.running == "memory":
            break
        resolve(draft)
    return draft


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return project(tmp_path)


@pytest.mark.parametrize("name", ELSEWHERE.split())
def test_names_of_other_trainers_lead_somewhere(path: Path, name: str) -> None:
    if name in OPTIMIZERS:
        return
    here = called_here(name, OPTIMIZERS)
    fault = only(path, f"train.optimizer.name={name}")
    assert fault.code == "unknown-value" and fault.help == f"it is called `{here}` here"
    assert here in OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_row_plans_on_a_device_of_its_own(path: Path, name: str) -> None:
    facts = OPTIMIZERS[name]
    machine = MACHINE if "cpu" in facts.devices else GPU
    rate = "1.0" if name == "prodigy" else "1e-4"
    overrides = [f"train.optimizer.name={name}", f"train.optimizer.lr={rate}"]
    if "float32" not in facts.weights:
        overrides.append("precision.trained=bf16")
    plan = plan_of(path, *overrides, machine=machine)
    assert plan.optimizer.name == name and plan.optimizer.lr == float(rate)
    assert plan.optimizer.arguments.keys() == facts.defaults.keys()
    assert all(
        not isinstance(v, tuple) and v is not None for v in plan.optimizer.arguments.values()
    )


def test_auto_is_adamw_and_says_so(path: Path) -> None:
    for overrides in ((), ("train.optimizer.name=auto",)):
        plan = plan_of(path, *overrides)
        assert plan.optimizer.name == "adamw"
        (decision,) = [d for d in plan.decisions if d.key == "train.optimizer.name"]
        assert (decision.value, decision.source) == ("adamw", "pass training") and decision.why


def test_arguments_are_the_recipes_then_the_tables(path: Path) -> None:
    plan = plan_of(path, "train.optimizer.name=adan", "train.optimizer.betas=[0.9, 0.8, 0.7]")
    assert plan.optimizer.arguments == {"betas": [0.9, 0.8, 0.7], "eps": 1e-6, "weight_decay": 0.02}
    plan = plan_of(path, "train.optimizer.name=ademamix", "train.optimizer.t_alpha_beta3=500")
    assert plan.optimizer.arguments["t_alpha_beta3"] == 500


@pytest.mark.parametrize(
    ("overrides", "code", "words", "advice"),
    [
        (("name=lion", "eps=1e-8"), "no-effect", "takes no `eps`", "`betas`, `weight_decay`"),
        (("name=adan", "betas=[0.9,0.99]"), "out-of-range", "has 3 betas, not 2", "0.98"),
        (("betas=[0.9,0.99,0.999]",), "out-of-range", "has 2 betas, not 3", "0.999"),
        (("betas=[0.9,1.0]",), "out-of-range", "1.0 is out of range", ""),
        (("name=ranger", "alpha=1.5"), "out-of-range", "out of range for `ranger`", ""),
        (
            ("name=adamw-schedulefree", "betas=[0.0,0.999]"),
            "out-of-range",
            "0 is out of range for `adamw-schedulefree`",
            "",
        ),
        (("name=adamw", "growth_rate=2"), "no-effect", "takes no `growth_rate`", "`betas`"),
        (("name=bnb-adamw-8bit",), "optimizer-device", "does not run on cpu", "adamw-8bit"),
        (("name=adamw-bf16",), "optimizer-precision", "trains `bfloat16` weights", "bf16"),
        (("name=prodigy", "lr=0.01"), "unusual-lr", "finds its own step size", "lr = 1.0"),
        (("name=prodigy", "lr=50"), "unusual-lr", "beyond what `prodigy`", "lr = 1.0"),
        (("lr=0.5",), "unusual-lr", "beyond what `adamw` is used with", "1e-4"),
        (("name=lion", "lr=0.05"), "unusual-lr", "beyond what `lion`", "0.01"),
    ],
)
def test_what_an_optimizer_can_not_take(
    path: Path, overrides: tuple[str, ...], code: str, words: str, advice: str
) -> None:
    fault = only(path, *(f"train.optimizer.{text}" for text in overrides))
    assert fault.code == code and words in fault.message and advice in fault.help
    assert fault.severity == ("warning" if code == "unusual-lr" else "error")
    assert fault.path.startswith("train.optimizer.")


def test_bf16_weights_are_fine_where_small_updates_are_kept(path: Path) -> None:
    assert only(path, "precision.trained=bf16").code == "bf16-trained"
    for name in ("adamw-bf16", "adamw-8bit", "stableadamw"):
        assert not faults(path, "precision.trained=bf16", f"train.optimizer.name={name}")


def test_sgd_may_have_a_large_rate(path: Path) -> None:
    assert not faults(path, "train.optimizer.name=sgd", "train.optimizer.lr=1.0")


def test_a_missing_package_is_a_warning_with_the_command(path: Path) -> None:
    machine = evolve(MACHINE, missing=("torch-optimi", "schedulefree"))
    fault = only(path, "train.optimizer.name=lion", machine=machine)
    assert (fault.code, fault.severity) == ("missing-package", "warning")
    assert fault.help == "pip install torch-optimi"
    assert not faults(path, "train.optimizer.name=came", machine=machine)
    machine = evolve(MACHINE, missing=("c++",))
    fault = only(path, "train.optimizer.name=adamw-4bit", machine=machine)
    assert fault.code == "missing-package" and "no C++ compiler" in fault.message
    machine = evolve(GPU, missing=("triton",))
    fault = only(path, "train.optimizer.name=adamw-4bit", machine=machine)
    assert fault.code == "missing-package" and fault.help == "pip install triton"
    assert "torch-optimi" in packages() and "" not in packages()


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "cosine-with-restarts"])
def test_schedule_free_takes_no_schedule(path: Path, name: str) -> None:
    free = "train.optimizer.name=radam-schedulefree"
    fault = only(path, free, f"train.schedule.name={name}")
    assert fault.code == "conflict" and "is schedule-free" in fault.message
    assert fault.path == "train.schedule.name" and 'name = "constant"' in fault.help
    assert not faults(path, free, "train.schedule.warmup=10%")
    average = only(path, free, "train.ema.decay=0.9")
    assert average.code == "conflict" and average.path == "train.ema"


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (("name=cosine", "warmup=100%"), "long-warmup", "takes the whole run"),
        (("name=constant", "warmup=9000 steps"), "schedule-too-long", "a warm-up of 9000 steps"),
        (("name=cosine-with-restarts", "cycles=500"), "schedule-too-long", "500 cycles in"),
        (("name=cosine", "cycles=2"), "no-effect", "cosine-with-restarts schedule"),
        (("name=linear", "power=2.0"), "no-effect", "polynomial schedule"),
        (("name=constant", "end=0.5"), "no-effect", "ends where it begins"),
    ],
)
def test_schedules_that_are_not_what_they_seem(
    path: Path, overrides: tuple[str, ...], code: str, words: str
) -> None:
    fault = only(path, *(f"train.schedule.{text}" for text in overrides))
    assert fault.code == code and words in fault.message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.max_grad_norm=1.0",), "`max_grad_norm` clips by the norm of all gradients"),
        (("train.accumulate=2",), "`accumulate` adds up"),
        (("memory.micro_batch=1",), "`micro_batch` adds up"),
        (("train.optimizer.name=prodigy", "train.optimizer.lr=1.0"), "all gradients together"),
        (("train.optimizer.name=adamw-offload",), "in host memory"),
        (
            ("train.optimizer.name=adamw-bf16", "precision.trained=bf16"),
            "random roundings in another order",
        ),
        ((), ""),
        (("memory.micro_batch=2",), ""),  # as large as the batch: nothing is split
        (("train.optimizer.name=adamw-8bit",), ""),
        (("train.optimizer.name=stableadamw",), ""),
    ],
)
def test_fused_backward_is_refused_with_its_reason(
    path: Path, overrides: tuple[str, ...], words: str
) -> None:
    first = () if "train.max_grad_norm=1.0" in overrides else ("train.max_grad_norm=0.0",)
    reason = fused_backward_possible(draft_of(path, *first, *overrides))
    assert words in reason if words and reason else reason is None and not words
    demanded = faults(path, *first, *overrides, "memory.fused_backward=true")
    found = [fault for fault in demanded if fault.code == "fused-backward"]
    assert [words in fault.message and bool(fault.help) for fault in found] == [True] * bool(words)


def test_another_optimizer_can_be_chosen_later(path: Path) -> None:
    """As a ladder does that looks for one with less state."""
    draft = draft_of(path, "train.optimizer.weight_decay=0.2", "train.optimizer.lr=0.5")
    assert suits(draft, "adamw-8bit") and not suits(draft, "bnb-adamw-8bit")
    quiet = planned(draft, "adamw-8bit")
    made = resolve_optimizer(draft, "adamw-8bit", why="the states fit")
    assert made == quiet and made.arguments["weight_decay"] == 0.2
    keys = [d.key for d in draft.decisions]
    assert len(keys) == len(set(keys))
    (decision,) = [d for d in draft.decisions if d.key == "train.optimizer.name"]
    assert (decision.value, decision.why) == ("adamw-8bit", "the states fit")
    warnings = [f.message for f in draft.diagnostics if f.code == "unusual-lr"]
    assert warnings == ["a learning rate of 0.5 is beyond what `adamw-8bit` is used with"]
    assert not suits(draft_of(path, "train.optimizer.momentum=0.9"), "adamw-8bit")
