"""Plans as the compiler makes them, built by hand: what a person sees is tested against these."""

from __future__ import annotations

import json
import math
from pathlib import Path

from attrs import evolve

from compiler.costs import Disk, Duration, Outlook, Skipped
from compiler.lock import dumps
from compiler.occasions import validation_steps
from compiler.plan import (
    PLAN_FORMAT,
    Adapter,
    Bucket,
    Captions,
    Checkpoints,
    Component,
    DataSource,
    Decision,
    Ema,
    Geometry,
    Layout,
    Memory,
    Model,
    Objective,
    Optimizer,
    Phase,
    Plan,
    Precision,
    Prompt,
    Schedule,
    Steps,
    Text,
    Validation,
    lock_path,
)
from compiler.schedules import multiplier
from compiler.site import Counted, Present, Resume

GIB = 2**30
MIB = 2**20
LORA_TARGETS = (r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",)


def _component(name: str, class_name: str, parameters: int, **rest: object) -> Component:
    facts = {"dtype": "bfloat16", "trained": False} | rest
    return Component(name=name, class_name=class_name, parameters=parameters, **facts)  # type: ignore[arg-type]


def sd35_large_lora() -> Plan:
    """The fantasy-art LoRA of the SD3.5 Large tutorial: 476 images, 5 repeats, batch 6."""
    recipe = "sd35-large-lora.toml"
    return Plan(
        format=PLAN_FORMAT,
        name="k4s4",
        seed=42,
        run_folder="/data/runs/k4s4",
        cache_folder="/home/me/.cache/tuner",
        device="cuda",
        model=Model(
            family="sd3",
            base="stabilityai/stable-diffusion-3.5-large",
            local=False,
            revision="main",
            init="pretrained",
            trained_component="transformer",
            components=(
                _component("transformer", "SD3Transformer2DModel", 8_056_627_520),
                _component("text_encoder", "CLIPTextModelWithProjection", 123_650_304),
                _component("text_encoder_2", "CLIPTextModelWithProjection", 694_659_840),
                _component("text_encoder_3", "T5EncoderModel", 4_762_310_656),
                _component("vae", "AutoencoderKL", 83_819_683, dtype="float32"),
                _component("scheduler", "FlowMatchEulerDiscreteScheduler", 0),
            ),
            configs={"transformer": "{}"},
        ),
        adapter=Adapter(
            kind="lora", rank=768, alpha=768.0, dropout=0.0, init="gaussian", targets=LORA_TARGETS
        ),
        precision=Precision(
            compute="bfloat16", weights="bfloat16", trained="float32", cache="bfloat16"
        ),
        text=Text(max_length=256, instruction=()),
        sources=(
            DataSource(
                id="k4s4",
                path="/data/datasets/k4s4",
                repeats="5",
                geometry=Geometry(
                    resolution=1024.0,
                    resolution_type="pixel_area",
                    aspect="square",
                    crop="center",
                    multiple=64,
                ),
                captions=Captions(
                    kind="textfile", prompt="", missing="error", multiline="join", dropout=0.1
                ),
                broken="error",
                images=476,
                skipped=3,
                texts=471,
            ),
        ),
        buckets=(
            Bucket(
                source="k4s4",
                width=1024,
                height=1024,
                images=476,
                samples=2380,
                batch_size=6,
                batches=397,
            ),
        ),
        manifest="5f1d" * 16,
        steps=Steps(
            total=11_910,
            per_epoch=397,
            epochs=30,
            batches_per_epoch=397,
            samples_per_epoch=2380,
            accumulate=1,
            ranks=1,
        ),
        optimizer=Optimizer(
            name="adamw",
            lr=1.5e-3,
            arguments={"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
            fused=True,
        ),
        schedule=Schedule(name="cosine", warmup=1191, length=11_910, end=0.0, power=1.0, cycles=1),
        objective=Objective(
            prediction="flow",
            sampling="logit-normal",
            logit_mean=0.0,
            logit_std=1.0,
            mode_scale=1.29,
            shift=3.0,
            loss="mse",
            weighting="none",
        ),
        max_grad_norm=1.0,
        ema=None,
        checkpoints=Checkpoints(every=397, keep=10),
        validation=Validation(
            every=397,
            at_start=True,
            prompts=(
                Prompt(name="portrait", text="k4s4, a waist up view of a woman in silver armour"),
                Prompt(name="castle", text="k4s4, a castle above the clouds at dawn"),
            ),
            negative="blurry, cropped",
            sizes=((1024, 1024), (1280, 768)),
            guidance=7.5,
            steps=30,
            seeds=(42,),
            score="",
        ),
        memory=Memory(
            budget_bytes=80 * GIB,
            layout=Layout(activation_checkpointing=1),
            phases=(
                _phase("text", 0, 9_900, weights=9_700, activations=200),
                _phase("latents", 0, 3_100, weights=320, activations=2_780),
                _phase(
                    "train",
                    2_048,
                    32_300,
                    weights=15_400,
                    adapter=2_166,
                    gradients=2_166,
                    optimizer=4_332,
                    activations=7_636,
                    context=600,
                ),
                _phase("validate", 2_048, 27_800, weights=17_600, activations=9_600, context=600),
            ),
            counts={
                "parameters": 8_056_627_520,
                "trainable": 567_803_904,
                "adapted": 152,
                "flops": 10**15,
            },
        ),
        track=("tensorboard",),
        workers=4,
        threads=1,
        decisions=(
            _given("model.base", "stabilityai/stable-diffusion-3.5-large", f"{recipe}:8"),
            _given("adapter.rank", "768", f"{recipe}:11"),
            Decision(
                key="adapter.alpha",
                value="768",
                source="pass model",
                why="alpha = rank, so the scale is 1",
            ),
            Decision(key="adapter.targets", value="attention", source="family sd3", why=""),
            Decision(
                key="text.max_length",
                value="256",
                source="family sd3",
                why="as the pipeline at inference",
            ),
            Decision(
                key="precision.compute",
                value="bf16",
                source="pass precision",
                why="NVIDIA H100 80GB multiplies it natively",
            ),
            Decision(
                key="memory.activation_checkpointing",
                value="1",
                source="pass memory",
                why="without it the training step needs 96.4 GiB of 80.0 GiB",
            ),
            _given("data.source[0].repeats", "5", f"{recipe}:19"),
            _given("train.batch_size", "6", f"{recipe}:23"),
            _given("train.optimizer.lr", "0.0015", f"{recipe}:24"),
            _given("train.schedule.name", "cosine", f"{recipe}:25"),
            _given("train.epochs", "30", "--set"),
            Decision(key="train.max_grad_norm", value="1", source="default", why=""),
        ),
    )


def quickstart() -> Plan:
    """A LoRA on the small Sana-shaped pipeline of the quickstart, on a processor."""
    recipe = "quickstart.toml"
    large = sd35_large_lora()
    source = evolve(
        large.sources[0],
        id="zorps",
        path="/app/recipes/quickstart/zorps",
        repeats="2",
        geometry=Geometry(
            resolution=64.0,
            resolution_type="pixel_area",
            aspect="preserve",
            crop="center",
            multiple=32,
        ),
        captions=evolve(large.sources[0].captions, dropout=0.0),
        images=30,
        skipped=0,
        texts=30,
    )
    return evolve(
        large,
        name="quickstart",
        seed=7,
        run_folder="/home/me/runs/quickstart",
        device="cpu",
        model=Model(
            family="sana",
            base="/app/recipes/quickstart/base",
            local=True,
            revision="",
            init="pretrained",
            trained_component="transformer",
            components=(
                _component("transformer", "SanaTransformer2DModel", 1_318_912, dtype="float32"),
                _component("text_encoder", "Gemma2Model", 214_400, dtype="float32"),
                _component("vae", "AutoencoderDC", 402_755, dtype="float32"),
                _component("scheduler", "FlowMatchEulerDiscreteScheduler", 0, dtype="float32"),
            ),
            configs={"transformer": "{}"},
        ),
        adapter=Adapter(
            kind="lora",
            rank=16,
            alpha=16.0,
            dropout=0.0,
            init="gaussian",
            targets=(r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",),
        ),
        precision=Precision(
            compute="float32", weights="float32", trained="float32", cache="float32"
        ),
        text=Text(max_length=32, instruction=()),
        sources=(source,),
        buckets=(
            Bucket(
                source="zorps", width=64, height=64, images=24, samples=48, batch_size=16, batches=3
            ),
            Bucket(
                source="zorps", width=96, height=64, images=6, samples=12, batch_size=16, batches=1
            ),
        ),
        steps=Steps(
            total=250,
            per_epoch=4,
            epochs=63,
            batches_per_epoch=4,
            samples_per_epoch=60,
            accumulate=1,
            ranks=1,
        ),
        optimizer=Optimizer(
            name="adamw",
            lr=1e-3,
            arguments={"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
            fused=False,
        ),
        schedule=Schedule(name="constant", warmup=10, length=250, end=0.0, power=1.0, cycles=1),
        ema=Ema(decay=0.99, device="same", every=1),
        checkpoints=Checkpoints(every=100, keep=2),
        validation=Validation(
            every=50,
            at_start=True,
            prompts=(
                Prompt(name="zorp", text="a red zorp"),
                Prompt(name="circle", text="a blue circle"),
            ),
            negative="",
            sizes=((64, 64),),
            guidance=3.0,
            steps=12,
            seeds=(42, 43),
            score="shapes",
        ),
        memory=Memory(
            budget_bytes=0,
            layout=Layout(),
            phases=(_phase("train", 0, 61, weights=8, optimizer=2, activations=51),),
            counts={"parameters": 1_318_912, "trainable": 98_304, "adapted": 32, "flops": 10**9},
        ),
        track=(),
        workers=2,
        threads=1,
        decisions=(
            _given("model.base", "/app/recipes/quickstart/base", f"{recipe}:6"),
            _given("train.optimizer.lr", "0.001", f"{recipe}:20"),
            Decision(
                key="launch.device", value="cpu", source="pass precision", why="no accelerator"
            ),
        ),
    )


def outlook() -> Outlook:
    """What `sd35_large_lora` costs on a made-up machine where some of it was done before."""
    return Outlook(
        skipped=(
            Skipped(source="k4s4", images=2, why="an edge below 512 pixels"),
            Skipped(source="k4s4", images=1, why="no caption"),
        ),
        disk=Disk(
            latents_bytes=476 * 16 * 128 * 128 * 2 * 2,
            texts_bytes=3 * 333 * 4096 * 2,
            checkpoints=11,
            one_checkpoint_bytes=12 * 567_803_904,
            result_bytes=4 * 567_803_904,
            pictures_bytes=124 * 1024 * 1024 * 3,
            free_bytes=500 * GIB,
            cache_free_bytes=80 * GIB,
        ),
        duration=Duration(
            train_seconds=49_150.0,
            validate_seconds=2_420.0,
            seconds_per_step=49_150.0 / 11_910,
            flops_per_second=3.5e14,
            basis="data-sheet",
            why="35% of 989 TFLOP/s (data sheet) assumed",
        ),
        unknown="",
        present=Present(
            texts=Counted(total=3, cached=3, unknown=0),
            latents=Counted(total=476, cached=300, unknown=20),
            resume=Resume(step=800, finished=False, changes=(), problem=""),
            run_bytes=0,
        ),
        steps=11_910,
    )


def _phase(name: str, host_mib: int, device_mib: int, **parts_mib: int) -> Phase:
    assert sum(parts_mib.values()) == device_mib, name
    return Phase(
        name=name,
        device_bytes=device_mib * MIB,
        host_bytes=host_mib * MIB,
        parts={part: mib * MIB for part, mib in parts_mib.items()},
    )


def _given(key: str, value: str, source: str) -> Decision:
    return Decision(key=key, value=value, source=source, why="")


def fake_run(folder: Path, plan: Plan | None = None, *, done: int | None = None) -> Path:
    """A run folder as a run leaves it, with made-up curves and drawn pictures."""
    plan = plan or quickstart()
    done = plan.steps.total if done is None else done
    folder.mkdir(parents=True, exist_ok=True)
    lock_path(folder).write_text(dumps(plan))
    (folder / "recipe.toml").write_text(f'schema = 1\nname = "{plan.name}"\n# <b>five & six</b>\n')
    rows = [json.dumps(_metrics(plan, step)) for step in range(1, done + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    memory = {
        phase.name: {"measured_bytes": int(phase.device_bytes * 0.985)}
        for phase in plan.memory.phases
    }
    seconds = {"text": 4.2, "latents": 31.0, "train": 0.23 * done, "validate": 12.5}
    measured = {"plan": plan.digest, "seconds": seconds, "memory": memory}
    (folder / "measured.json").write_text(json.dumps(measured))
    facts = {"versions": {"python": "3.11.7", "torch": "2.13.0+cpu"}, "disk": {"free_bytes": GIB}}
    (folder / "environment.json").write_text(json.dumps(facts))
    for step in [step for step in validation_steps(plan) if step <= done]:
        _fake_validation(folder / "samples" / f"step-{step:06d}", plan, step)
    return folder


def _metrics(plan: Plan, step: int) -> dict[str, float]:
    noise = math.sin(step * 12.9898) * 43758.5453 % 1.0
    progress = step / plan.steps.total
    loss = 0.08 + 0.75 * math.exp(-6 * progress)
    return {
        "step": step,
        "epoch": (step - 1) // plan.steps.per_epoch,
        "loss": loss * (0.7 + 0.6 * noise),
        "grad_norm": (0.3 + math.exp(-4 * progress)) * (0.6 + noise) * (9 if noise > 0.995 else 1),
        "lr": plan.optimizer.lr * multiplier(plan.schedule, step - 1),
        "samples": plan.buckets[0].batch_size,
        "seconds": 0.21 + 0.04 * noise,
    }


def _fake_validation(folder: Path, plan: Plan, step: int) -> None:
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    share = step / plan.steps.total
    for index, prompt in enumerate(plan.validation.prompts):
        for width, height in plan.validation.sizes:
            for seed in plan.validation.seeds:
                image = Image.new("RGB", (width, height), (246, 246, 246))
                edge = min(width, height)
                x, y = edge * (0.2 + 0.02 * (seed % 7)), edge * 0.25
                box = (x, y, x + edge * 0.5, y + edge * 0.5)
                colour = tuple(
                    int(150 + share * (value - 150))
                    for value in ((215, 38, 38), (38, 80, 215))[index % 2]
                )
                draw = ImageDraw.Draw(image)
                (draw.rectangle if share < 0.4 and index == 0 else draw.ellipse)(box, fill=colour)
                image.save(folder / f"{prompt.name}-{width}x{height}-{seed}.png")
    if plan.validation.score:
        prompts = {
            prompt.name: (min(1.0, 1.4 * share) if index == 0 else 1 - 0.1 * share)
            for index, prompt in enumerate(plan.validation.prompts)
        }
        scores = {
            "step": step,
            "measure": plan.validation.score,
            "mean": sum(prompts.values()) / len(prompts),
            "prompts": prompts,
        }
        (folder / "scores.json").write_text(json.dumps(scores))
