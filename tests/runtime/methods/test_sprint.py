"""Distillation of tiny teachers: updates against a plain reference, traps, whole runs."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from compiler.costs import heads_parameters
from compiler.plan import Layout, Optimizer, Plan, Precision, Sprint
from runtime import checkpoints, loop, rng
from runtime.batch import Batch
from runtime.build import build
from runtime.context import result_folder
from runtime.errors import OutOfMemory
from runtime.execute import execute
from runtime.export.draw import draw
from runtime.export.export import export
from runtime.export.pictures import Drawing, Wanted
from runtime.export.request import Request, chosen
from runtime.families import family_of
from runtime.methods import sprint_draws
from runtime.methods.base import Built
from runtime.methods.heads import Heads
from runtime.methods.sprint import Distillation, is_students
from tests.runtime.plans import PICTURES, draw_data, source_of, tiny_plan
from tests.runtime.run_plan import Interrupting
from tests.runtime.tiny import make_tiny, tiny_model
from tests.runtime.without_float64 import Without

CPU = torch.device("cpu")
FP32 = Precision(compute="float32", weights="float32", trained="float32", cache="float32")
MIXED = Precision(compute="bfloat16", weights="bfloat16", trained="float32", cache="float32")
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
FACTS = Sprint(
    teacher_time=1.0,
    sigma_data=0.5,
    guidance=(4.0, 4.5, 5.0),
    guidance_embeds_scale=0.1,
    mean=0.2,
    std=1.6,
    discriminator_mean=-0.6,
    discriminator_std=1.0,
    tangent_warmup=4,
    consistency_weight=1.0,
    adversarial_weight=0.5,
    heads=(0, 2),
    largest_angle=1.5708,
    largest_share=0.5,
    misaligned_pairs=True,
    discriminator=Optimizer(name="adamw", lr=1e-3, arguments=ADAM, fused=True),
)
NEVER = ("", 0, signal.SIGTERM)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher that takes times up to 1."""
    folder = tmp_path_factory.mktemp("sprint") / "base"
    return make_tiny("sana", folder, timestep_scale=0.001, qk_norm="rms_norm_across_heads")


def made(base: Path, facts: Sprint = FACTS, precision: Precision = FP32) -> tuple[Built, Any]:
    built = build(
        tiny_model("sana", base),
        None,
        precision,
        Layout(),
        family_of("sana"),
        CPU,
        empty=False,
        seed=3,
        sprint=facts,
    )
    assert isinstance(built.method, Distillation)
    return built, built.method


def batch_of(facts: Sprint, step: int, count: int = 4, first: int = 0) -> Batch:
    slots = range(first, first + count)

    def normal(purpose: str) -> Tensor:
        return rng.normals((4, 4, 4), 7, purpose, step, slots)

    states = 0.5 * rng.normals((6, 16), 7, "states", 0, slots)
    mask = torch.ones(count, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    empty = 0.5 * rng.normal((1, 1, 16), 7, "empty").expand(count, 1, 16)
    return Batch(
        latents=normal("latents"),
        noise=normal("noise"),
        sigmas=torch.zeros(count),
        text={
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
            "negative_encoder_hidden_states": empty,
            "negative_encoder_attention_mask": torch.ones(count, 1, dtype=torch.int64),
        },
        draws=sprint_draws.draws(facts, 7, step, slots, normal),
    )


class Reference:
    """The method once more, plainly: one sample's formulas, straight from the papers."""

    def __init__(self, method: Distillation) -> None:
        self.m, self.facts = method, method.facts

    def field(self, net: Any, x: Tensor, t: Tensor, text: Any, cfg: Tensor | None) -> Tensor:
        """F at x = x_t / s."""
        tau = torch.sin(t) / (torch.sin(t) + torch.cos(t))
        b = tau[:, None, None, None]
        scale = (b**2 + (1 - b) ** 2) ** 0.5
        states, mask = text
        v = net(
            hidden_states=x * scale,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=tau,
            guidance=cfg,
        ).sample
        out: Tensor = ((1 - 2 * b) * x * scale + (1 - 2 * b + 2 * b * b) * v) / scale
        return out

    def texts(self, batch: Batch) -> tuple[Any, Any]:
        kinds = ("", "negative_")
        names = ("encoder_hidden_states", "encoder_attention_mask")
        a, b = (tuple(batch.text[k + n] for n in names) for k in kinds)
        return a, b

    def logits(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
        kept: list[Tensor] = []
        blocks = [self.m.teacher.transformer_blocks[k] for k in self.facts.heads]  # type: ignore
        hooks = [b.register_forward_hook(lambda m, i, o: kept.append(o)) for b in blocks]
        self.field(self.m.teacher, x, t, text, None)
        for hook in hooks:
            hook.remove()
        assert self.m.heads is not None
        found: Tensor = self.m.heads(kept)
        return found

    def student(self, batch: Batch, step: int) -> Tensor:
        s, d, net = 0.5, batch.draws, self.m.student
        text, empty = self.texts(batch)
        cfg, t = d["guidance"], d["angles"]
        c, n = torch.cos(t)[:, None, None, None], torch.sin(t)[:, None, None, None]
        x = c * s * batch.latents + n * s * batch.noise
        with torch.no_grad():
            fu = self.field(self.m.teacher, x / s, t, empty, None)
            fc = self.field(self.m.teacher, x / s, t, text, None)
            dx = s * (fu + cfg[:, None, None, None] * (fc - fu))
            with sdpa_kernel(SDPBackend.MATH):
                _, jac = torch.func.jvp(
                    lambda a, b: self.field(net, a, b, text, cfg * 0.1),
                    (x / s, t),
                    (c * n * dx / s, torch.cos(t) * torch.sin(t)),
                )
        f = self.field(net, x / s, t, text, cfg * 0.1)
        stop = f.detach()
        r = min(1.0, step / 4)
        g = -(c**2) * (s * stop - dx) - r * (c * n * x + s * jac)
        g = g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 0.1)
        tau = torch.sin(t) / (torch.sin(t) + torch.cos(t))
        _, e = net.time_embed(tau, guidance=cfg * 0.1, hidden_dtype=torch.float32)  # type: ignore
        lv = net.logvar_linear(e)[:, :, None, None]  # type: ignore
        w = 1 / (torch.tan(t) * s)[:, None, None, None]
        scm = (w * torch.exp(-lv) * (f - stop - g) ** 2 + lv).mean()
        t2 = d["judged_angles"]
        c, n = torch.cos(t2)[:, None, None, None], torch.sin(t2)[:, None, None, None]
        x = c * s * batch.latents + n * s * d["judged_noise"]
        clean = c * x - n * s * self.field(net, x / s, t2, text, cfg * 0.1)
        td = d["fake_angles"]
        c, n = torch.cos(td)[:, None, None, None], torch.sin(td)[:, None, None, None]
        judged = self.logits((c * clean + n * s * d["fake_noise"]) / s, td, text)
        return scm + 0.5 * -judged.mean()

    def discriminator(self, batch: Batch) -> Tensor:
        s, d = 0.5, batch.draws
        text, _ = self.texts(batch)

        def arc(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
            return torch.cos(t)[:, None, None, None] * x0 + torch.sin(t)[:, None, None, None] * z

        t = d["angles"]
        x0 = s * batch.latents
        x = arc(x0, s * batch.noise, t)
        with torch.no_grad():
            f = self.field(self.m.student, x / s, t, text, d["guidance"] * 0.1)
        n, c = torch.sin(t)[:, None, None, None], torch.cos(t)[:, None, None, None]
        clean = c * x - n * s * f
        td, tm = d["fake_angles"], d["misaligned_angles"]
        fake = self.logits(arc(clean, s * d["fake_noise"], td) / s, td, text)
        real = self.logits(arc(x0, s * d["real_noise"], td) / s, td, text)
        rolled = torch.cat([x0[-1:], x0[:-1]])
        other = self.logits(arc(rolled, s * d["misaligned_noise"], tm) / s, tm, text)
        fakes = torch.cat([fake, other])
        return (F.relu(1 - real).mean() + F.relu(1 + fakes).mean()) / 2


def gradients(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    for parameter in named.values():
        parameter.grad = None
    return found


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    most = max(each.abs().max().item() for each in expected.values())
    for name, each in found.items():
        torch.testing.assert_close(each, expected[name], rtol=2e-4, atol=1e-5 * most, msg=name)


def shaken(built: Built) -> None:
    """Away from the start, where the guidance embedding is zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in built.trainable.values():
            parameter.add_(0.02 * torch.randn_like(parameter))


def test_the_student_s_update_is_the_reference_s(base: Path) -> None:
    built, method = made(base)
    shaken(built)
    batch = batch_of(FACTS, 2)
    method.begin(2)
    found = method.losses(batch, 2)
    found["loss"].mean().backward()
    mine = gradients(built.trainable)
    expected = Reference(method).student(batch, 2)
    expected.backward()
    torch.testing.assert_close(found["loss"].mean(), expected, rtol=1e-5, atol=1e-6)
    assert_close(mine, gradients(built.trainable))


def test_the_discriminator_s_update_is_the_reference_s(base: Path) -> None:
    built, method = made(base)
    assert built.rival is not None
    shaken(built)
    batch = batch_of(FACTS, 3)
    method.begin(3)
    found = method.losses(batch, 3)
    found["loss"].mean().backward()
    mine = gradients(built.rival.trainable)
    expected = Reference(method).discriminator(batch)
    expected.backward()
    torch.testing.assert_close(found["loss"].mean(), expected, rtol=1e-5, atol=1e-6)
    assert_close(mine, gradients(built.rival.trainable))


def test_the_student_starts_as_its_teacher(base: Path) -> None:
    """The same function, bit for bit: linear attention stays linear in both."""
    _, method = made(base)
    batch = batch_of(FACTS, 0)
    given = (batch.noise, batch.draws["angles"])
    with torch.no_grad():
        student = method._student(batch)(*given)
        teacher = method._teacher(batch, batch.text)(*given)
    assert torch.equal(student, teacher)


def test_the_student_learns_guidance(base: Path) -> None:
    """Its embedding of the scale is not zero throughout, so that two updates reach all of it."""
    built, method = made(base)
    optimizer = torch.optim.AdamW(built.trainable.values(), lr=1e-2)
    for step in (0, 2):
        method.begin(step)
        method.losses(batch_of(FACTS, step), step)["loss"].mean().backward()
        optimizer.step()
        if step == 0:
            optimizer.zero_grad()
    for layer in ("linear_1", "linear_2"):
        gradient = built.trainable[f"time_embed.guidance_embedder.{layer}.weight"].grad
        assert gradient is not None and gradient.abs().max() > 0
    batch = batch_of(FACTS, 2)
    other = evolve(batch, draws={**batch.draws, "guidance": batch.draws["guidance"] + 1})
    with torch.no_grad():
        found = [method._student(b)(b.noise, b.draws["angles"]) for b in (batch, other)]
    assert (found[0] - found[1]).abs().max() > 1e-5


def test_an_update_leaves_no_gradient_in_the_other_network(base: Path) -> None:
    built, method = made(base)
    assert built.rival is not None
    for step, other in ((0, built.rival.trainable), (1, built.trainable)):
        method.begin(step)
        method.losses(batch_of(FACTS, step), step)["loss"].mean().backward()
        assert all(parameter.grad is None for parameter in other.values())
        assert all(parameter.grad is None for parameter in method.teacher.parameters())
        gradients(built.trainable | built.rival.trainable)


def test_small_learning_rates_move_every_weight(base: Path) -> None:
    """Under bfloat16 too: masters are float32. And losses are float32 whatever is computed in."""
    built, method = made(base, precision=MIXED)
    before = {name: p.detach().clone() for name, p in built.trainable.items()}
    optimizer = torch.optim.AdamW(built.trainable.values(), lr=1e-6, weight_decay=0.0)
    for step in (0, 2, 4, 6):
        method.begin(step)
        losses = method.losses(batch_of(FACTS, step), step)
        assert {each.dtype for each in losses.values()} == {torch.float32}
        losses["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    still = sum(int((p == before[n]).sum()) for n, p in built.trainable.items())
    count = sum(p.numel() for p in built.trainable.values())
    assert still / count < 0.1  # biases of keys, which softmax can't feel, and the like


def test_a_window_is_its_batches_together(base: Path) -> None:
    """Accumulated gradients are those of one large batch, divided once."""
    facts = evolve(FACTS, heads=(), adversarial_weight=0.0)
    built, method = made(base, facts)
    whole = batch_of(facts, 2, 4)
    method.losses(whole, 2)["loss"].mean().backward()
    expected = gradients(built.trainable)
    for part in whole.parts(2):
        (method.losses(part, 2)["loss"].sum() / 4).backward()
    assert_close(gradients(built.trainable), expected)


def test_the_discriminator_meets_the_largest_angle() -> None:
    """The angle itself, with the plan's probability; the student's consistency never does."""
    found = [
        batch_of(FACTS, 1, 200).draws["angles"],
        batch_of(FACTS, 0, 200).draws["judged_angles"],
    ]
    for angles in found:
        share = (angles == torch.tensor(1.5708)).float().mean().item()
        assert share == pytest.approx(0.5, abs=0.1)
    own = batch_of(FACTS, 0, 200).draws["angles"]
    assert not (own == torch.tensor(1.5708)).any()
    median = batch_of(evolve(FACTS, largest_share=0.0), 1, 2000).draws["angles"].median().item()
    assert median == pytest.approx(1.18, abs=0.03)


def test_draws_don_t_depend_on_how_a_step_is_cut() -> None:
    whole = batch_of(FACTS, 1, 4).draws
    halves = [batch_of(FACTS, 1, 2, first).draws for first in (0, 2)]
    for name, each in whole.items():
        assert torch.equal(each, torch.cat([half[name] for half in halves])), name


def test_times_are_fitted_where_the_teacher_counts_to_a_thousand(tmp_path: Path) -> None:
    """The published Sana checkpoints' embedding is smooth enough; here a smooth one is made."""
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    from runtime.methods.student import fit_times

    torch.manual_seed(0)
    sinusoids = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    embedder = TimestepEmbedding(256, 64).requires_grad_(False)
    embedder.linear_1.weight[:, :90] = 0.0  # what turns fast within a thousand
    embedder.linear_1.weight[:, 128:218] = 0.0
    times = torch.linspace(0, 1, 333)
    before = embedder(sinusoids(1000 * times))
    with embedder.register_forward_hook(lambda *given: given[-1].as_subclass(Without)):
        lost = fit_times(embedder, sinusoids, 1000.0)  # on devices without float64, too
    after = embedder(sinusoids(times))
    share = (after - before).norm() / (before - before.mean(0)).norm()
    assert share == pytest.approx(lost, rel=0.2)
    assert share < 0.1


@pytest.fixture(scope="module")
def place(base: Path) -> Path:
    """Data and a cache shared by all runs."""
    draw_data(base.parent / "dog", ((70, 70),) * 5)
    return base.parent


def plan_of(place: Path, folder: Path, **changes: Any) -> tuple[Plan, Any]:
    settings: dict[str, Any] = {
        "adapter": None,
        "steps": 7,
        "every": 2,
        "accumulate": 2,
        "sprint": FACTS,
        "max_grad_norm": 0.1,
        "cache_folder": str(place / "cache"),
        **changes,
    }
    source = source_of(place / "dog", dropout=0.2)
    return tiny_plan("sana", place / "base", (source,), folder, **settings)


def left(plan: Plan) -> dict[str, Tensor]:
    """All tensors of the last checkpoint and of the result."""
    saved = checkpoints.latest(Path(plan.run_folder) / "checkpoints")
    assert saved is not None
    snapshot = checkpoints.load(saved)
    assert snapshot.rival is not None and snapshot.rival_optimizer is not None
    tensors = {f"weights.{k}": v for k, v in snapshot.weights.items()}
    tensors |= {f"rival.{k}": v for k, v in snapshot.rival.items()}
    tensors |= {f"ema.{k}": v for k, v in (snapshot.ema or {}).items()}
    for side, states in (("own", snapshot.optimizer), ("rival", snapshot.rival_optimizer)):
        for index, state in states["state"].items():
            tensors |= {f"{side}.{index}.{k}": v for k, v in state.items()}
    file = result_folder(plan) / "transformer" / "diffusion_pytorch_model.safetensors"
    return tensors | {f"result.{k}": v for k, v in load_file(file).items()}


def run_in_fork(plan: Plan, manifest: Any, events: Interrupting) -> int:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            execute(plan, manifest, events)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own")
@pytest.mark.parametrize("number", [4, 5])
def test_killed_and_gone_on_is_as_never_stopped(place: Path, tmp_path: Path, number: int) -> None:
    """Both networks, both optimizers, the singular vectors and the average, bit for bit."""
    whole, manifest = plan_of(place, tmp_path / "whole")
    execute(whole, manifest, Interrupting(*NEVER))
    torn, manifest = plan_of(place, tmp_path / "torn")
    assert run_in_fork(torn, manifest, Interrupting("step", number, signal.SIGKILL)) < 0
    outcome = execute(torn, manifest, Interrupting(*NEVER))
    assert outcome.status == "finished"
    expected, found = left(whole), left(torn)
    assert expected.keys() == found.keys()
    assert [k for k, v in expected.items() if not torch.equal(v, found[k])] == []


def test_out_of_memory_in_the_discriminator_s_passes_moves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its singular vectors have moved by then: the step is done again from where they were."""
    whole, manifest = plan_of(place, tmp_path / "whole", steps=4, every=0)
    execute(whole, manifest, Interrupting(*NEVER))
    plan, manifest = plan_of(place, tmp_path / "run", steps=4, every=0)
    real = loop.method_step

    def method_step(method: Any, batch: Batch, step: int, samples: float) -> dict[str, Tensor]:
        if step == 3:
            raise torch.OutOfMemoryError("in the passes")
        return real(method, batch, step, samples)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "method_step", method_step)
        with pytest.raises(OutOfMemory, match="in the passes"):
            execute(plan, manifest, Interrupting(*NEVER))
    assert not is_students(FACTS, 3)
    saved = checkpoints.latest(Path(plan.run_folder) / "checkpoints")
    assert saved is not None and checkpoints.step_of(saved) == 3
    execute(plan, manifest, Interrupting(*NEVER))
    expected, found = left(whole), left(plan)
    assert [k for k, v in expected.items() if not torch.equal(v, found[k])] == []


def test_a_checkpoint_holds_the_student(place: Path, tmp_path: Path) -> None:
    """Not the teacher: every one of them has moved on from the one before."""
    plan, manifest = plan_of(place, tmp_path / "run", ema=None)
    execute(plan, manifest, Interrupting(*NEVER))
    teacher = load_file(place / "base/transformer/diffusion_pytorch_model.safetensors")
    saved = checkpoints.complete(Path(plan.run_folder) / "checkpoints")
    weights = [checkpoints.load(each).weights for each in saved]
    name = "transformer_blocks.0.attn1.to_q.weight"
    series = [teacher[name], *(each[name] for each in weights)]
    assert len(series) == 5
    for before, after in itertools.pairwise(series):
        assert not torch.equal(before, after)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_plain_diffusers_draws_the_same_pictures(place: Path, tmp_path: Path, steps: int) -> None:
    """The result is a whole pipeline of its own class, and its pictures are the validation's."""
    from diffusers import DiffusionPipeline, SanaSprintPipeline, SCMScheduler

    pictures = evolve(PICTURES, steps=steps, guidance=4.5, every=0)
    plan, manifest = plan_of(place, tmp_path / "run", validation=pictures, steps=2, every=0)
    execute(plan, manifest, Interrupting(*NEVER))
    pipeline = DiffusionPipeline.from_pretrained(result_folder(plan))
    assert type(pipeline) is SanaSprintPipeline
    assert type(pipeline.scheduler) is SCMScheduler
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt="a photo of sks dog",
        height=64,
        width=64,
        guidance_scale=4.5,
        num_inference_steps=steps,
        intermediate_timesteps=1.3 if steps == 2 else None,
        use_resolution_binning=False,
        complex_human_instruction=list(plan.text.instruction),
        max_sequence_length=plan.text.max_length,
        generator=torch.Generator().manual_seed(42),
    ).images[0]
    with Image.open(Path(plan.run_folder) / "samples/step-000002/dog-64x64-42.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(image))
    if steps == 1:
        _check_commands(plan, image, tmp_path)


def _check_commands(plan: Plan, image: Image.Image, folder: Path) -> None:
    """`tuner sample` draws the same, and `tuner export` of a checkpoint is the same pipeline."""
    run = Path(plan.run_folder)
    drawing = Drawing("a photo of sks dog", 42, folder / "sampled.png")
    wanted = Wanted(
        drawings=(drawing,), width=64, height=64, guidance=4.5, steps=1, negative="", device=""
    )
    draw(chosen(run), wanted)
    with Image.open(drawing.path) as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(image))
    request = Request(
        weights=chosen(run, step=2),
        format="diffusers",
        merge=False,
        single_file=False,
        dtype=None,
        out=folder / "exported",
    )
    export(request)
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        one, other = (json.loads((at / name).read_text()) for at in (request.out, run / "model"))
        one.pop("_name_or_path", None)
        assert one.items() <= other.items()
    files = [
        load_file(at / "transformer/diffusion_pytorch_model.safetensors")
        for at in (request.out, run / "model")
    ]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(each, files[1][name]) for name, each in files[0].items())


def test_planned_heads_are_the_heads(place: Path, tmp_path: Path) -> None:
    """What the plan adds to a checkpoint for them."""
    plan, _ = plan_of(place, tmp_path / "run")
    count = sum(parameter.numel() for parameter in Heads(16, len(FACTS.heads)).parameters())
    assert heads_parameters(plan) == count
    assert heads_parameters(evolve(plan, sprint=None)) == 0
