"""Plans for tiny models, built by hand: what the compiler's passes would make of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from attrs import evolve
from PIL import Image

from compiler.data.counts import bucket_rows
from compiler.data.geometry import place
from compiler.data.manifest import Folder, Manifest, Sample
from compiler.data.scan import scan
from compiler.data.variants import forms
from compiler.families import FAMILIES
from compiler.optimizers import OPTIMIZERS
from compiler.plan import (
    PLAN_FORMAT,
    Adapter,
    Captions,
    Checkpoints,
    DataSource,
    Ema,
    Geometry,
    Memory,
    Objective,
    Optimizer,
    Plan,
    Precision,
    Prompt,
    Schedule,
    Steps,
    Text,
    Validation,
)
from runtime.families.common import config_of
from tests.runtime.tiny import tiny_model

LORA = Adapter(
    kind="lora",
    rank=2,
    alpha=2.0,
    dropout=0.0,
    init="gaussian",
    targets=(r"transformer_blocks\.\d+\.attn\d?\.to_[qkv]",),
)
NO_MEMORY = Memory(budget_bytes=0, phases=())
NO_PICTURES = Validation(
    every=0,
    at_start=False,
    prompts=(),
    negative="",
    sizes=((64, 64),),
    guidance=3.0,
    steps=2,
    seeds=(42,),
    score="",
)
PICTURES = evolve(
    NO_PICTURES,
    every=4,
    at_start=True,
    prompts=(Prompt(name="dog", text="a photo of sks dog"),),
)


def draw_data(folder: Path, sizes: Sequence[tuple[int, int]] = ((70, 70),) * 5) -> Path:
    """A folder of pictures of `sizes`, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        ramp = Image.linear_gradient("L").resize((width, height)).rotate(37 * number)
        other = Image.new("L", (width, height), 40 * number % 256)
        Image.merge("RGB", (ramp, other, ramp.rotate(90))).save(folder / f"{number:02d}.png")
    return folder


def manifest_of(sources: Sequence[DataSource]) -> Manifest:
    """The samples of `sources`, all with their source's instance prompt."""
    samples = [
        Sample(
            source=number,
            key=picture.key,
            bytes=picture.bytes,
            width=picture.width,
            height=picture.height,
            placement=evolve(
                place(picture.width, picture.height, source.geometry, key=picture.key),
                mirrored=mirrored,
            ),
            captions=forms([source.captions.prompt], source.captions, seed=0, key=picture.key),
        )
        for number, source in enumerate(sources)
        for picture in scan(Path(source.path)).pictures
        for mirrored in (False, True)[: 1 + source.geometry.flip]
    ]
    return Manifest([Folder(id=s.id, path=s.path) for s in sources], samples)


def source_of(
    folder: Path,
    prompt: str = "a photo of sks dog",
    repeats: str = "1",
    size: int = 64,
    dropout: float = 0.0,
) -> DataSource:
    """One folder as a source of samples of about `size` x `size` pixels."""
    return DataSource(
        id=folder.name,
        path=str(folder),
        repeats=repeats,
        geometry=Geometry(
            resolution=float(size),
            resolution_type="pixel_area",
            aspect="preserve",
            crop="center",
            multiple=16,
        ),
        captions=Captions(
            kind="instance", prompt=prompt, missing="error", multiline="join", dropout=dropout
        ),
        broken="error",
        images=len(scan(folder).pictures),
        skipped=0,
    )


def tiny_plan(
    family: str,
    base_folder: Path,
    data_folder: Path | Sequence[DataSource],
    run_folder: Path,
    *,
    steps: int = 6,
    batch_size: int = 2,
    accumulate: int = 1,
    optimizer: str = "adamw",
    lr: float = 1e-3,
    every: int = 0,
    keep: int = 0,
    **changes: Any,
) -> tuple[Plan, Manifest]:
    """A plan that trains the tiny pipeline in `base_folder`; `changes` replace its fields."""
    given = data_folder
    sources = (source_of(given),) if isinstance(given, Path) else tuple(given)
    manifest = manifest_of(sources)
    facts = OPTIMIZERS[optimizer]
    card, model = FAMILIES[family], tiny_model(family, base_folder)
    buckets = bucket_rows(manifest, sources, [batch_size] * len(sources))
    batches = sum(bucket.batches for bucket in buckets)
    per_epoch = ceil(batches / accumulate)
    plan = Plan(
        format=PLAN_FORMAT,
        name=run_folder.name,
        seed=7,
        run_folder=str(run_folder),
        cache_folder=str(run_folder.parent / "cache"),
        device="cpu",
        model=model,
        adapter=LORA,
        precision=Precision(
            compute="float32", weights="float32", trained="float32", cache="float32"
        ),
        text=Text(max_length=32, instruction=card.instruction[:1]),
        sources=sources,
        buckets=buckets,
        manifest=manifest.digest,
        steps=Steps(
            total=steps,
            per_epoch=per_epoch,
            epochs=ceil(steps / per_epoch),
            batches_per_epoch=batches,
            samples_per_epoch=sum(bucket.samples for bucket in buckets),
            accumulate=accumulate,
            ranks=1,
        ),
        optimizer=Optimizer(
            name=optimizer,
            lr=lr,
            arguments=dict(facts.defaults),
            fused="cpu" in facts.fused,
        ),
        schedule=Schedule(name="cosine", warmup=2, length=steps, end=0.1, power=1.0, cycles=1),
        objective=Objective(
            prediction="flow",
            sampling="logit-normal",
            logit_mean=0.0,
            logit_std=1.0,
            mode_scale=1.29,
            shift=3.0,
            loss="mse",
            weighting="none",
            guidance=1.0 if card.told_guidance(config_of(model, card.trained_component)) else None,
        ),
        max_grad_norm=1.0,
        ema=Ema(decay=0.9, device="cpu", every=2),
        checkpoints=Checkpoints(every=every, keep=keep),
        validation=NO_PICTURES,
        memory=NO_MEMORY,
        track=(),
        workers=1,
        threads=1,
        decisions=(),
    )
    return evolve(plan, **changes), manifest
