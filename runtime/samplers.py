"""Diffusers' scheduler that draws a plan's pictures."""

from __future__ import annotations

import json
from typing import Any

from attrs import evolve

from compiler.families import FAMILIES
from compiler.noise import sampled_so
from compiler.plan import Model, Plan
from compiler.samplers import SAMPLERS
from runtime.families.common import component_class, config_of


def as_trained(plan: Plan) -> Model:
    """The model with a scheduler that draws on the noise levels that were trained: what an adapter
    is merged into is sampled by its own."""
    config = sampled_so(config_of(plan.model, "scheduler"), plan.objective.table)
    configs = {**plan.model.configs, "scheduler": json.dumps(config, sort_keys=True)}
    return evolve(plan.model, configs=configs)


def sampler(model: Model, name: str = "") -> Any:
    """The base's own, or the one that `compiler.samplers` calls `name`, with the base's levels:
    its shift, or its table of betas and what is predicted."""
    import diffusers

    config = config_of(model, "scheduler")
    if not name:
        cls, _ = component_class(model, "scheduler")
        return cls.from_config(config)
    card, facts = FAMILIES[model.family], SAMPLERS[name]
    if card.prediction != "flow":
        # Latents leave [-1, 1]; the pipelines refuse a scheduler that clips there.
        return getattr(diffusers, facts.table).from_config(config, clip_sample=False)
    shift, _ = card.shift(config)
    if facts.flow.startswith("FlowMatch"):
        options: dict[str, Any] = {"shift": shift}
    else:
        options = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": shift,
        }
    return getattr(diffusers, facts.flow).from_config(config, **options)
