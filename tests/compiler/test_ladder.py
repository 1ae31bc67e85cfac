"""The ladder of settings: what is on it, what is chosen, and what is said."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from compiler.compile import Compiled
from compiler.families import FAMILIES
from compiler.lock import changes
from compiler.machine import Machine
from compiler.memory import Candidate, Simulation, gib
from compiler.passes import ladder, suggest
from compiler.passes.memory import peak
from compiler.plan import Device, Phase, Plan, alters_trajectory
from tests.compiler.recipes import GPU, RECIPE, compiled, project

MIB = 2**20
ADAPTER = '[adapter]\nkind = "lora"\nrank = 8\n'
OPEN = ADAPTER + '[model.transformer]\nquantize = "auto"\n'


class Formula:
    """Memory by a formula in which every rung saves something, and time with it."""

    def __init__(self, text: int = 50, latents: int = 60) -> None:
        self.asked: list[Candidate] = []
        self.text, self.latents = text, latents  # MiB of these phases

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        self.asked.append(candidate)
        layout, size = candidate.layout, max(b for *_, b in candidate.shapes)
        blocks = {"none": 920, "int8": 420, "nf4": 180}[candidate.model.components[-2].quantize]
        waiting = blocks * layout.offload_blocks // 28
        weights = 80 + blocks - waiting
        states = 20 if "8bit" in candidate.optimizer.name else 80
        interval = layout.activation_checkpointing
        share = 1.0 if not interval else 1 - 0.9 / interval
        acts = round(100 * (candidate.micro_batch or size) * share)
        host = 0
        if layout.offload_activations:
            host, acts = acts // 2, acts - acts // 2
        if candidate.adapter is not None and candidate.adapter.rank < 8:
            states //= 2
        pixels = candidate.shapes[0][0] * candidate.shapes[0][1] / (64 * 64)
        parts = {"weights": weights * MIB, "optimizer": states * MIB, "activations": acts * MIB}
        parts["activations"] = round(parts["activations"] * pixels)
        train = Phase(
            name="train", device_bytes=sum(parts.values()), host_bytes=host * MIB, parts=parts
        )
        encoder = next(c for c in candidate.model.components if c.name == "text_encoder")
        text = self.text // {"none": 1, "int8": 2, "nf4": 4}[encoder.quantize]
        phases = (
            _phase("text_encoder", text),
            _phase("latents", round(self.latents * pixels)),
            train,
        )
        return Simulation(
            phases=phases,
            parameters=10**9,
            trainable=10**6,
            adapted_modules=10,
            flops=round(10**15 * (1 + (1 / interval / 3 if interval else 0))),
            blocks_waiting=waiting * MIB,
            activations_waiting=host * MIB,
            seconds=0.0,
        )


def _phase(name: str, mib: int) -> Phase:
    return Phase(name=name, device_bytes=mib * MIB, host_bytes=0, parts={"weights": mib * MIB})


def on_gpu(
    folder: Path,
    budget: int,
    recipe: str,
    *overrides: str,
    text: int = 50,
    latents: int = 60,
    machine: Machine = GPU,
) -> tuple[Compiled, Formula]:
    model = Formula(text, latents)
    found = compiled(
        project(folder, recipe.replace("batch_size = 2", "batch_size = 4")),
        f'memory.budget="{budget} MiB"',
        *overrides,
        machine=machine,
        memory_model=model,
    )
    return found, model


def chosen(plan: Plan) -> dict[str, str]:
    return next(rung.settings for rung in plan.memory.ladder if rung.chosen)


def shown(found: Compiled) -> list[str]:
    return [f"{fault.code}: {fault.message} ({fault.help})" for fault in found.diagnostics]


BUDGETS = (2000, 1400, 1300, 1190, 1150, 1100, 1000, 700, 600, 500, 420, 360, 290, 200, 120)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_first_rung_that_fits_is_chosen(tmp_path: Path, budget: int) -> None:
    found, model = on_gpu(tmp_path, budget, RECIPE + OPEN)
    assert found.plan is not None, shown(found)
    rungs = found.plan.memory.ladder
    place = next(number for number, rung in enumerate(rungs) if rung.chosen)
    assert rungs[place].peak_bytes <= budget * MIB
    assert all(rung.peak_bytes > budget * MIB for rung in rungs[:place])
    assert rungs[0].relative_time == 1.0
    assert len(model.asked) <= 9  # bisected: of about twenty rungs, with the neighbours


def test_no_single_saving_that_fits_is_quicker(tmp_path: Path) -> None:
    """Of the first rung's weights; by the formula: 1080 MiB and 400 of activations."""
    waits = (1080 + 200) * MIB
    found, model = on_gpu(tmp_path, 1300, RECIPE + OPEN)
    rungs = _plan(found).memory.ladder
    place = next(number for number, rung in enumerate(rungs) if rung.chosen)
    settings = rungs[place].settings
    assert settings["memory.offload.activations"] == "true" and not rungs[place].alters
    assert settings["memory.activation_checkpointing"] == "off"
    # 200 MiB cross twice in 33 ms, while seconds are computed: nothing is waited for.
    assert rungs[place].relative_time == 1.0
    assert rungs[place].peak_bytes == waits
    # What is below it is no quicker, and needs less.
    below = rungs[place + 1 :]
    assert below and all(r.relative_time >= 1 and r.peak_bytes < waits for r in below)
    assert len(model.asked) <= 9


@pytest.mark.parametrize(("host", "waits"), [(0, True), (300, True), (280, False)])
def test_what_waits_needs_room_on_the_host(tmp_path: Path, host: int, waits: bool) -> None:
    """By the formula 200 MiB; what the host has may not be known."""
    machine = evolve(GPU, host_total_bytes=host * MIB)
    plan = _plan(on_gpu(tmp_path, 1300, RECIPE + OPEN, machine=machine)[0])
    assert plan.memory.layout.offload_activations is waits


def test_a_batch_in_parts_instead_of_recomputed_blocks(tmp_path: Path) -> None:
    """Where nothing may wait on the host: reading weights twice is quicker than a third pass."""
    plan = _plan(on_gpu(tmp_path, 1300, RECIPE + OPEN, 'memory.offload="none"')[0])
    assert plan.steps.micro_batch == 2 and plan.memory.layout.activation_checkpointing == 0
    (rung,) = [rung for rung in plan.memory.ladder if rung.chosen]
    assert rung.peak_bytes == (1080 + 200) * MIB and 1 <= rung.relative_time < 1.03
    fixed = 'memory.activation_checkpointing="off"'
    held = _plan(on_gpu(tmp_path / "b", 1300, RECIPE + OPEN, fixed, "memory.micro_batch=4")[0])
    assert held.steps.micro_batch == 0 and held.memory.layout.activation_checkpointing == 0


@pytest.mark.parametrize(
    ("family", "blocks", "counts"),
    [("sana", 28, {7, 9, 14, 28}), ("sdxl", 87, {22, 29, 43, 65, 87})],
)
def test_blocks_that_wait(family: str, blocks: int, counts: set[int]) -> None:
    """Every 4th, 3rd, 2nd, each; of a UNet three quarters as well."""
    config = FAMILIES[family].known[0].configs[FAMILIES[family].trained_component]
    assert FAMILIES[family].depth(config) == blocks
    assert ladder.waiting(FAMILIES[family], config) == sorted(counts)


def test_every_rung_in_its_order(tmp_path: Path) -> None:
    tight = [chosen(_plan(on_gpu(tmp_path / str(b), b, RECIPE + OPEN)[0])) for b in BUDGETS]
    flat = [tuple(settings.values()) for settings in tight]
    assert flat[0][:3] == ("off", "false", "adamw")
    for above, below in itertools.pairwise(tight):
        # What a rung has saved, those below it save as well.
        assert int(below["memory.offload.blocks"]) >= int(above["memory.offload.blocks"])
        order = ("none", "int8", "nf4")
        key = "model.transformer.quantize"
        assert order.index(below[key]) >= order.index(above[key])
    assert tight[-1]["train.optimizer.name"] == "adamw-8bit"
    assert int(tight[-1]["memory.offload.blocks"]) > 0


def _plan(found: Compiled) -> Plan:
    assert found.plan is not None, shown(found)
    return found.plan


def test_only_what_is_left_open_may_change(tmp_path: Path) -> None:
    fixed = (
        "memory.activation_checkpointing=2",
        "memory.offload=none",
        "memory.micro_batch=4",
        "train.optimizer.name=adamw",
        "memory.fused_backward=false",
    )
    found, model = on_gpu(tmp_path, 700, RECIPE + ADAPTER, *fixed)
    assert found.plan is None
    first = model.asked[0]
    assert first.layout.activation_checkpointing == 2 and first.optimizer.name == "adamw"
    (fault,) = [f for f in found.diagnostics if f.severity == "error"]
    assert fault.code == "does-not-fit"
    assert fault.help == "offload = { blocks = 28 } would fit: 380 MiB"


def test_a_plan_takes_over_what_was_chosen(tmp_path: Path) -> None:
    plan = _plan(on_gpu(tmp_path, 300, RECIPE + OPEN, 'memory.offload="none"')[0])
    settings = chosen(plan)
    transformer = next(c for c in plan.model.components if c.name == "transformer")
    assert transformer.quantize == settings["model.transformer.quantize"] != "none"
    assert plan.optimizer.name == settings["train.optimizer.name"] == "adamw-8bit"
    reasons = {decision.key: decision for decision in plan.decisions}
    for key, value in settings.items():
        assert reasons[key].value in (value, "whole batches"), key
    assert "alters the result" in reasons["train.optimizer.name"].why
    assert reasons["memory.activation_checkpointing"].why == "the fastest tried that fits 300 MiB"


def test_batches_in_parts_keep_the_steps(tmp_path: Path) -> None:
    roomy = _plan(on_gpu(tmp_path / "a", 5000, RECIPE + ADAPTER)[0])
    parted = _plan(on_gpu(tmp_path / "b", 5000, RECIPE + ADAPTER, "memory.micro_batch=1")[0])
    assert parted.steps == evolve(roomy.steps, micro_batch=1)
    assert parted.buckets == roomy.buckets and parted.digest != roomy.digest


def test_layout_alone_leaves_the_digest(tmp_path: Path) -> None:
    plain = _plan(on_gpu(tmp_path / "a", 5000, RECIPE + ADAPTER)[0])
    moved = _plan(on_gpu(tmp_path / "b", 5000, RECIPE + ADAPTER, "memory.offload={blocks = 3}")[0])
    assert moved.memory.layout.offload_blocks == 3
    assert not [c for c in changes(plain, moved) if alters_trajectory(c[0]) and "tmp" not in str(c)]


def test_a_text_encoder_that_does_not_fit(tmp_path: Path) -> None:
    found, _ = on_gpu(tmp_path / "a", 290, RECIPE + OPEN, text=300)
    (fault,) = [f for f in found.diagnostics if f.severity == "error"]
    assert "phase text_encoder needs 300 MiB of device memory, 10 MiB more" in fault.message
    assert fault.help == 'quantize = "int8" in [model.text_encoder] would fit: 260 MiB'
    recipe = RECIPE + OPEN + '[model.text_encoder]\nquantize = "auto"\n'
    plan = _plan(on_gpu(tmp_path / "b", 290, recipe, text=300)[0])
    encoder = next(c for c in plan.model.components if c.name == "text_encoder")
    assert encoder.quantize == "int8"
    assert len(plan.memory.ladder) > 2


@pytest.mark.parametrize(
    ("text", "kind", "help"),
    [
        (600, "int8", "offload = { blocks = 28 } would fit: 300 MiB"),
        (2400, "nf4", "with every change that was tried together it still needs 600 MiB: a larger"),
    ],
)
def test_open_text_encoders_where_training_does_not_fit(
    tmp_path: Path, text: int, kind: str, help: str
) -> None:
    """They are not blamed for what fewer bits of them do not need."""
    recipe = RECIPE + ADAPTER + '[model.text_encoder]\nquantize = "auto"\n'
    found, model = on_gpu(tmp_path, 400, recipe, 'memory.offload="none"', text=text)
    (fault,) = [f for f in found.diagnostics if f.severity == "error"]
    assert "phase train needs 1.0 GiB" in fault.message and fault.help.startswith(help)
    (encoder,) = [c for c in model.asked[-1].model.components if c.name == "text_encoder"]
    assert encoder.quantize == kind


def test_what_nothing_makes_fit_is_told_at_once(tmp_path: Path) -> None:
    """Of some hundred rungs and dozens of changes: one with nothing saved, one or two with all,
    and every change on top."""
    found, model = on_gpu(tmp_path, 20, RECIPE + OPEN)
    (fault,) = [f for f in found.diagnostics if f.severity == "error"]
    asked = list(model.asked)
    assert len({repr(each) for each in asked}) <= 4
    least = min(peak(model.simulate(each)).device_bytes for each in asked)
    assert fault.help == (
        f"with every change that was tried together it still needs {gib(least)}: a larger device, "
        "or a smaller base"
    )


def test_fewer_bits_than_are_stated(tmp_path: Path) -> None:
    """Of the base by the formula 80 + 180 MiB of weights, 80 of state, 5 of activations."""
    given = 'model.text_encoder.quantize="int8"'
    found, _ = on_gpu(tmp_path / "a", 290, RECIPE + OPEN, given, text=600)
    (fault,) = [f for f in found.diagnostics if f.severity == "error"]
    assert fault.help == 'quantize = "nf4" in [model.text_encoder] would fit: 260 MiB'
    no_blocks = evolve(GPU, device="xpu", device_name="another", capability="")
    stated = ('model.transformer.quantize="int8"', "memory.offload={activations=true}")
    adamw = "train.optimizer.name=adamw"
    found, _ = on_gpu(tmp_path / "b", 400, RECIPE + ADAPTER, *stated, adamw, machine=no_blocks)
    (fault,) = [f for f in found.diagnostics if f.severity == "error"]
    assert fault.help == 'quantize = "nf4" in [model.transformer] would fit: 345 MiB'


@pytest.mark.parametrize(("init", "offered"), [("gaussian", True), ("pissa", False)])
def test_a_base_that_gives_its_weights_keeps_its_bits(
    tmp_path: Path, init: str, offered: bool
) -> None:
    """See `_judge_base` in `passes.adapter`."""
    _, model = on_gpu(tmp_path, 1, RECIPE + ADAPTER, f'adapter.init="{init}"')
    assert any(c.model.components[-2].quantize != "none" for c in model.asked) is offered


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        (("adapter.rank=32",), {32, 16, 8}),
        (("adapter.rank=32", "adapter.min_rank=8"), {32, 16}),
        (("adapter.rank=36", 'adapter.init="orthogonal"'), {36, 18, 4}),
        (('adapter.kind="dylora"', "adapter.rank=64", "adapter.block_size=16"), {64, 32}),
        (('adapter.kind="dylora"', "adapter.rank=12"), {12, 6}),
    ],
)
def test_ranks_that_the_adapter_can_have(
    tmp_path: Path, given: tuple[str, ...], ranks: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suggest, "_least", lambda *_: 0)  # or only the last would be looked at
    found, model = on_gpu(tmp_path, 1, RECIPE + ADAPTER, *given)
    assert {c.adapter.rank for c in model.asked if c.adapter} == ranks
    (before,) = [f for f in found.diagnostics if f.severity == "error"]
    for rank in ranks:
        said = compiled(tmp_path / "recipe.toml", *given, f"adapter.rank={rank}", machine=GPU)
        assert before.code == "does-not-fit" and said.plan is not None, shown(said)
        assert "no-effect" not in [f.code for f in said.diagnostics]
    blocks = {(c.adapter.rank, c.adapter.block_size) for c in model.asked if c.adapter}
    assert ranks != {12, 6} or blocks == {(12, 4), (6, 2)}


def test_an_update_in_the_backward_pass_takes_no_parts(tmp_path: Path) -> None:
    given = ("memory.fused_backward=true", "train.max_grad_norm=0", "train.optimizer.name=adamw")
    found, model = on_gpu(tmp_path, 1, RECIPE, *given)
    (fault,) = [f for f in found.diagnostics if f.severity == "error"]
    assert fault.code == "does-not-fit"
    assert all(c.layout.fused_backward and not c.micro_batch for c in model.asked)


def test_a_distillation_s_optimizers_are_one(tmp_path: Path) -> None:
    given = ("sprint.discriminator_lr=3e-6", "train.optimizer.name=adamw")
    found, model = on_gpu(tmp_path, 1100, RECIPE + "[sprint]\n", *given)
    (fault,) = [f for f in found.diagnostics if f.severity == "error"]
    assert fault.help == 'optimizer name = "adamw-8bit" would fit: 1.0 GiB'
    eight = "train.optimizer.name=adamw-8bit"
    plan = _plan(compiled(tmp_path / "recipe.toml", given[0], eight, machine=GPU))
    tried = model.asked[-1]
    assert (tried.optimizer, tried.sprint) == (plan.optimizer, plan.sprint)
    _, model = on_gpu(tmp_path / "b", 1, RECIPE + "[sprint]\n")
    assert not any(c.layout.offload_activations for c in model.asked)


def test_pictures_that_do_not_fit(tmp_path: Path) -> None:
    """Latents are encoded before training: no rung helps, only a smaller resolution."""
    found, _ = on_gpu(tmp_path, 500, RECIPE + OPEN, latents=600)
    (fault,) = [f for f in found.diagnostics if f.severity == "error"]
    assert "phase latents needs 600 MiB" in fault.message
    assert fault.help == "a resolution of 75% of it would fit: 338 MiB"


@pytest.mark.parametrize(
    ("given", "change"),
    [
        ("train.accumulate=2", 'trained = "bf16" in [precision] would fit: 580 MiB'),
        ("train.max_grad_norm=1", "max_grad_norm = 0 and fused_backward = true would fit: 680 MiB"),
        ("memory.fused_backward=false", "fused_backward = true would fit: 680 MiB"),
    ],
)
def test_what_lightens_a_full_fine_tune(tmp_path: Path, given: str, change: str) -> None:
    class Whole:
        """Weights of 400 MiB in float32, gradients as large, 80 of state; 100 a sample."""

        def simulate(self, candidate: Candidate) -> Simulation:
            share = 1 if candidate.precision.trained == "float32" else 2
            gradients = 0 if candidate.layout.fused_backward else 400
            assert not (gradients == 0 and (candidate.max_grad_norm or candidate.micro_batch))
            if share == 2 and "bf16" not in change:
                raise ValueError("not what is asked here")
            needed = (400 + gradients) // share + 80 + 100 * (candidate.micro_batch or 2)
            parts = {"weights": needed * MIB}
            return Simulation(
                phases=(Phase(name="train", device_bytes=needed * MIB, host_bytes=0, parts=parts),),
                parameters=10**9,
                trainable=10**9,
                adapted_modules=0,
                flops=10**15,
                seconds=0.0,
            )

    found = compiled(
        project(tmp_path),
        'memory.budget="800 MiB"',
        "train.optimizer.name=adamw",
        given,
        *(["train.max_grad_norm=0"] if "fused" in given else []),
        machine=GPU,
        memory_model=Whole(),
    )
    (fault,) = [f for f in found.diagnostics if f.severity == "error"]
    assert fault.code == "does-not-fit" and fault.help == change


def test_several_changes_together(tmp_path: Path) -> None:
    found, _ = on_gpu(tmp_path, 108, RECIPE + ADAPTER, 'memory.offload="none"')
    (fault,) = [f for f in found.diagnostics if f.severity == "error"]
    assert fault.help.startswith("no single change fits; these would together: ")
    assert "[model.transformer]" in fault.help or "blocks = 28" in fault.help


@pytest.mark.parametrize(
    ("recipe", "override", "code", "words"),
    [
        (RECIPE, "memory.offload={blocks = 2}", "conflict", "can't wait on the host"),
        (RECIPE + ADAPTER, "memory.offload={blocks = 200}", "out-of-range", "200 is out of range"),
        (RECIPE, "memory.activation_checkpointing=99", "out-of-range", "99 is out of range"),
        (RECIPE + ADAPTER, "memory.micro_batch=9", "no-effect", "no batch has 9 samples"),
    ],
)
def test_what_can_not_be(tmp_path: Path, recipe: str, override: str, code: str, words: str) -> None:
    found, _ = on_gpu(tmp_path, 5000, recipe, override)
    assert any(f.code == code and words in f.message for f in found.diagnostics), shown(found)


@pytest.mark.parametrize(("budget", "warned"), [("25 GiB", True), ("24 GiB", False)])
def test_a_budget_above_the_device_s_memory(tmp_path: Path, budget: str, warned: bool) -> None:
    """Only of the device that is here."""
    asked = f'memory.budget="{budget}"'
    found = compiled(project(tmp_path), asked, machine=GPU, memory_model=Formula())
    said = [f for f in found.diagnostics if f.code == "budget-too-large"]
    assert found.plan is not None and bool(said) is warned
    words = "more than the 24.0 GiB of a card; this plan needs"
    assert all(words in f.message and f.severity == "warning" for f in said)
    small = evolve(GPU, device_total_bytes=3 * MIB)
    (fault,) = [
        f
        for f in compiled(
            tmp_path / "recipe.toml", asked, machine=small, memory_model=Formula()
        ).diagnostics
        if f.code == "budget-too-large"
    ]
    assert "and a card has 3 MiB: the run would end for want of memory" in fault.message
    away = compiled(tmp_path / "recipe.toml", asked, 'launch.device="cuda"')
    assert "budget-too-large" not in [f.code for f in away.diagnostics]


def test_offloading_where_the_processor_trains(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + ADAPTER)
    asked = "memory.offload={activations=true, blocks=2}"
    said = compiled(path, asked).diagnostics
    assert [(f.code, f.severity, f.path) for f in said] == [
        ("no-effect", "warning", f"memory.offload.{key}") for key in ("activations", "blocks")
    ]
    for other in ("memory.offload={activations=false, blocks=0}", 'memory.offload="auto"'):
        assert compiled(path, other).diagnostics == ()
    assert "no-effect" not in [f.code for f in compiled(path, asked, machine=GPU).diagnostics]


@pytest.mark.parametrize(
    ("device", "blocks", "expected"),
    [
        ("mps", 0, [("no-effect", "warning", "memory.offload.activations")]),
        (
            "mps",
            2,
            [
                ("conflict", "error", "memory.offload.blocks"),
                ("no-effect", "warning", "memory.offload.activations"),
            ],
        ),
        ("xpu", 0, []),
        ("xpu", 2, [("conflict", "error", "memory.offload.blocks")]),
    ],
)
def test_offloading_where_other_accelerators_train(
    tmp_path: Path, device: Device, blocks: int, expected: list[tuple[str, str, str]]
) -> None:
    """Blocks wait by what CUDA alone has; Apple's devices share the host's memory."""
    machine = evolve(GPU, device=device, device_name="another", capability="")
    asked = f"memory.offload={{activations=true, blocks={blocks}}}"
    found = compiled(project(tmp_path, RECIPE + ADAPTER), asked, machine=machine)
    assert sorted((f.code, f.severity, f.path) for f in found.diagnostics) == expected
    assert (found.plan is None) is (blocks > 0)


@pytest.mark.parametrize("device", ["mps", "xpu", "cuda"])
def test_no_advice_is_refused_by_the_compiler(tmp_path: Path, device: Device) -> None:
    machine = evolve(GPU, device=device, device_name="another", capability="")
    path = project(tmp_path, RECIPE + ADAPTER)
    asked = ['memory.budget="400 MiB"', "memory.offload=none", "model.transformer.quantize=none"]
    (fault,) = compiled(path, *asked, machine=machine, memory_model=Formula()).diagnostics
    assert fault.code == "does-not-fit"
    advised = [f"memory.{part}" for part in (fault.help or "").split(" would")[0].split(" and ")]
    found = compiled(path, asked[0], asked[2], *advised, machine=machine, memory_model=Formula())
    assert not {f.code for f in found.diagnostics} & {"conflict", "no-effect"}, advised
    assert ("offload" in advised[0]) is (device == "cuda")


def test_a_device_that_does_not_tell_its_memory(tmp_path: Path) -> None:
    machine = evolve(GPU, device_name="GB10", device_total_bytes=0, device_free_bytes=0)
    plan = _plan(compiled(project(tmp_path), machine=machine))
    (told,) = (each for each in plan.decisions if each.key == "memory.budget")
    assert (told.value, told.why) == ("none", "GB10 does not tell how much memory it has")
    assert plan.memory.budget_bytes == 0
    stated = compiled(tmp_path / "recipe.toml", 'memory.budget="80 GiB"', machine=machine)
    assert stated.diagnostics == ()  # nothing is known of it to warn of


def test_without_a_budget_nothing_is_saved(tmp_path: Path) -> None:
    found, model = on_gpu(tmp_path, 1, RECIPE + OPEN, 'memory.budget="none"')
    plan = _plan(found)
    assert plan.memory.ladder == () and len(model.asked) == 1
    assert plan.memory.layout.activation_checkpointing == 0


def test_the_processor_is_not_offered_what_accelerators_need(tmp_path: Path) -> None:
    model: Any = Formula()
    found = compiled(
        project(tmp_path, RECIPE + ADAPTER), 'memory.budget="1100 MiB"', memory_model=model
    )
    assert all(not c.layout.offload_blocks and "8bit" not in c.optimizer.name for c in model.asked)
    assert found.plan is not None or "does-not-fit" in [f.code for f in found.diagnostics]
