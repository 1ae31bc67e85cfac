"""What a file says of itself: modelspec (https://github.com/Stability-AI/ModelSpec, 1.0.1) and the
`ss_` entries that readers of LoRA files show. Values are text."""

from __future__ import annotations

import time

from compiler.adapters import PLAIN
from compiler.data.geometry import edge_of
from compiler.plan import Plan
from runtime.export.conventions import ARCHITECTURES, NETWORK_MODULES, SINGLE_FILE
from runtime.export.lazy import UNKNOWN
from runtime.export.request import Request, config_of

PUBLISHED = {
    "flux": "https://github.com/black-forest-labs/flux",
    "flux2": "https://github.com/black-forest-labs/flux2",
    "flux2_dev": "https://github.com/black-forest-labs/flux2",
    "lumina2": "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
    "qwen_image": "https://github.com/QwenLM/Qwen-Image",
    "sd3": "https://github.com/Stability-AI/sd3-ref",
    "sd": "https://github.com/CompVis/latent-diffusion",
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "sdxl_refiner": "https://github.com/Stability-AI/generative-models",
    "z_image": "https://github.com/comfyanonymous/ComfyUI",
}
"""`modelspec.implementation` of weights under the names of the family's publishers; of others the
names are Diffusers' own in every layout."""
KEPT = frozenset({"kolors", "qwen_image", "sd", "z_image"})
"""Families in whose LoRA sd-scripts and musubi-tuner keep Diffusers' names."""


def described(request: Request) -> dict[str, str]:
    """All entries for the file that `request` makes."""
    plan = request.weights.plan
    lora = plan.adapter is not None and not request.merge
    return _modelspec(request, lora=lora) | _training(request) | (_network(plan) if lora else {})


def _modelspec(request: Request, *, lora: bool) -> dict[str, str]:
    weights, plan = request.weights, request.weights.plan
    family = plan.model.family
    foreign = request.single_file or (request.format == "kohya" and family not in KEPT)
    sources = [source for source in plan.sources if source.images]
    own = [source for source in sources if not source.regularisation] or sources
    edge = max(round(edge_of(source.geometry)) for source in own)
    triggers = dict.fromkeys(s.captions.trigger for s in plan.sources if s.captions.trigger)
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": ARCHITECTURES[family](config_of(plan)) + ("/lora" if lora else ""),
        "implementation": PUBLISHED.get(family, "diffusers") if foreign else "diffusers",
        "title": plan.name,
        "resolution": f"{edge}x{edge}",
        "description": f"{plan.model.shared_origin}, trained for {weights.step} steps",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hash_sha256": f"0x{UNKNOWN}",  # the writer fills it in
        "trigger_phrase": ", ".join(triggers),
        "merged_from": plan.model.shared_origin if request.merge else "",
    }
    return {f"modelspec.{key}": value for key, value in found.items() if value}


def _training(request: Request) -> dict[str, str]:
    weights, plan = request.weights, request.weights.plan
    found = {
        "output_name": plan.name,
        "sd_model_name": plan.model.shared_origin,
        "base_model_version": ARCHITECTURES[plan.model.family](config_of(plan)),
        "steps": weights.step,
        "max_train_steps": plan.steps.total,
        "learning_rate": plan.optimizer.lr,
        "optimizer": plan.optimizer.name,
        "lr_scheduler": plan.schedule.name,
        "lr_warmup_steps": plan.schedule.warmup,
        "seed": plan.seed,
        "num_train_images": sum(source.images for source in plan.sources),
        "gradient_accumulation_steps": plan.steps.accumulate,
        "mixed_precision": {"bfloat16": "bf16", "float16": "fp16"}.get(
            plan.precision.compute, "no"
        ),
        "ema": weights.averaged,
        "tuner_plan": plan.digest,
    }
    return {f"ss_{key}": str(value) for key, value in found.items()}


def _network(plan: Plan) -> dict[str, str]:
    assert plan.adapter is not None
    known = NETWORK_MODULES.get(plan.model.family) if plan.adapter.kind in PLAIN else None
    sizes = {
        "ss_network_dim": str(plan.adapter.rank),
        "ss_network_alpha": f"{plan.adapter.alpha:g}",
    }
    return {
        **(sizes if plan.adapter.rank else {}),
        "sshs_model_hash": UNKNOWN,
        **({"ss_network_module": known} if known else {}),
    }


assert SINGLE_FILE.keys() <= PUBLISHED.keys(), "one for each layout"
