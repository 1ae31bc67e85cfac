"""What makes the memory of two plans alike in kind: what is measured of one corrects the other.

All that changes which tensors are made, or which kernels make them; not how large or how many they
are, which a plan tells well. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from compiler.adapters import result_name
from compiler.memory import Candidate
from compiler.plan import Adapter, Layout, Model, Optimizer, Plan, Precision, Sharing
from runtime.new_tokens import encoders_of


def kind_of_plan(plan: Plan) -> object:
    """Of a plan that was run."""
    there = plan.ema is not None and (plan.ema.device == "same" or plan.device == "cpu")
    return [
        *_of(plan.model, plan.adapter, plan.precision, plan.optimizer, plan.memory.layout),
        _shared(plan.steps.ranks, plan.sharing),
        plan.speed.attention,
        plan.speed.channels_last,
        plan.speed.tf32,
        plan.speed.fused_projections,
        plan.speed.compile != "off",
        [there, plan.ema is not None and not there],
        list(encoders_of(plan.text_training, plan.embeddings)),
        plan.sprint is not None,
    ]


def kind_of(candidate: Candidate) -> object:
    """The same of what is to be planned."""
    layout = candidate.layout
    given = (candidate.model, candidate.adapter, candidate.precision, candidate.optimizer, layout)
    return [
        *_of(*given),
        _shared(candidate.ranks, candidate.sharing),
        candidate.attention,
        candidate.channels_last,
        candidate.tf32,
        candidate.fused_projections,
        candidate.compiled,
        [candidate.ema_on_device, candidate.ema_on_host],
        list(encoders_of(candidate.text_training, candidate.embeddings)),
        candidate.sprint is not None,
    ]


def _of(
    model: Model,
    adapter: Adapter | None,
    precision: Precision,
    optimizer: Optimizer,
    layout: Layout,
) -> Sequence[object]:
    configs = {name: json.loads(each) for name, each in model.configs.items()}
    configs.pop("scheduler", None)  # noise levels take no memory
    return [
        model.family,
        configs,
        [[each.name, each.dtype, each.quantize, each.tiling] for each in model.components],
        result_name(adapter),
        [precision.compute, precision.weights, precision.trained],
        [optimizer.name, optimizer.fused],
        layout.activation_checkpointing > 0,
        layout.fused_backward,
        layout.offload_activations,
        layout.offload_blocks > 0,
    ]


def _shared(ranks: int, sharing: Sharing) -> object:
    if ranks == 1:
        return "one"
    return [sharing.strategy, sharing.reshard, sharing.stage, sharing.offload_optimizer]
