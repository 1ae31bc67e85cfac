"""The components of the base as the plan states them: number format, quantisation, configuration."""

from __future__ import annotations

import json

from compiler import plan
from compiler.draft import Draft


def model_plan(draft: Draft) -> plan.Model:
    """The model as the plan states it."""
    assert draft.model is not None and draft.precision is not None
    facts, family = draft.model, draft.model.family
    trained = family.trained_component
    components = []
    for name, class_name in family.components.items():
        full = name == trained and draft.adapter is None
        dtype: plan.Dtype = draft.precision.trained if full else draft.precision.weights
        components.append(
            plan.Component(
                name=name,
                class_name=class_name,
                parameters=facts.parameters.get(name, 0),
                dtype="float32" if name == "vae" else dtype,
                trained=full,
            )
        )
    return plan.Model(
        family=family.name,
        base=facts.base,
        local=facts.local,
        revision=facts.revision,
        init=draft.recipe.model.transformer.init,
        trained_component=trained,
        components=tuple(components),
        configs={
            name: json.dumps(config, sort_keys=True) for name, config in facts.configs.items()
        },
    )
