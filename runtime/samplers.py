"""Diffusers' scheduler that draws a plan's pictures."""

from __future__ import annotations

from typing import Any

from compiler.families import FAMILIES
from compiler.plan import Model
from compiler.samplers import SAMPLERS
from runtime.families.common import component_class, config_of


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
