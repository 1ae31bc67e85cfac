"""The trained weights of a run, as its result or a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from compiler.adapters import OF_THE_BASE, rank_of, scale_of
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Adapter, Layout, Plan
from runtime import checkpoints
from runtime.build import build
from runtime.errors import RunFailed
from runtime.export.base import base_tensors
from runtime.export.lazy import Lazy, Tensors, held, in_files
from runtime.export.lora_keys import Layer
from runtime.export.request import Weights
from runtime.families import family_of
from runtime.families.common import DTYPES
from runtime.methods.adapter_files import Taken, given_back, read_result
from runtime.methods.kinds import parts_of, split
from runtime.methods.updates import adapted_weight
from runtime.optimizers import class_of, kept_weights, load_state, make_optimizer


def trained_weights(weights: Weights) -> Tensors:
    """What was trained, by the names of the model in training: those that are kept.

    With an average they are the average; of a schedule-free optimizer those it gives its name for,
    not those that it steps from. Raises RunFailed if files are missing.
    """
    if weights.checkpoint is not None:
        found = _of_checkpoint(weights, weights.checkpoint)
        return held(given_back(found, _taken(weights.plan, found)))
    if weights.plan.adapter is None:
        folder = weights.result / weights.plan.model.trained_component
        return in_files(_files(folder))
    (file,) = _files(weights.result)
    return held(read_result(weights.plan.adapter, file, _in_order(weights.plan)))


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise RunFailed(f"{folder} holds no weights", help="export a checkpoint: --checkpoint STEP")
    return found


def _taken(plan: Plan, trained: Mapping[str, Tensor]) -> Taken:
    """What an adapter of this start has of the base: checkpoints hold only what is trained."""
    adapter = plan.adapter
    if adapter is None or adapter.init not in OF_THE_BASE:
        return {}
    base, dtype = base_tensors(plan.model, plan.seed), DTYPES[plan.precision.weights]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for module in parts_of(list(trained)):
        weight = base[f"{module}.weight"].read().to(dtype)
        rank, scale = rank_of(adapter, module), scale_of(adapter, module)
        found[module] = split(weight, rank, scale, adapter.init, plan.seed, module)
    return found


def _of_checkpoint(weights: Weights, folder: Path) -> Mapping[str, Tensor]:
    snapshot = checkpoints.load(folder)
    if weights.averaged and snapshot.ema is not None:
        return snapshot.ema
    return _kept(weights.plan, snapshot)


def _kept(plan: Plan, snapshot: checkpoints.Snapshot) -> Mapping[str, Tensor]:
    """The weights that the plan's optimizer wants kept, which need not be those it steps from."""
    if not hasattr(class_of(OPTIMIZERS[plan.optimizer.name]), "eval"):
        return snapshot.weights
    parameters = {name: nn.Parameter(snapshot.weights[name]) for name in _in_order(plan)}
    optimizer = make_optimizer(plan.optimizer, parameters.items(), torch.device("cpu"))
    load_state(optimizer, dict(snapshot.optimizer))
    with kept_weights(optimizer, parameters.values()):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _in_order(plan: Plan) -> list[str]:
    """Names of what is trained, as the optimizer counts them: files don't keep the order."""
    family, nowhere = family_of(plan.model.family), torch.device("meta")
    given = (plan.model, plan.adapter, plan.precision, Layout(), family, nowhere)
    return list(build(*given, empty=True, seed=plan.seed).trainable)


def layers_of(plan: Plan, trained: Tensors) -> dict[str, Layer]:
    """The adapter by module, in the model's order of names."""
    assert plan.adapter is not None
    return {
        module: Layer(
            a=trained[parts["lora_A"]].read(),
            b=trained[parts["lora_B"]].read(),
            scale=scale_of(plan.adapter, module),
        )
        for module, parts in parts_of(list(trained)).items()
    }


def merged(base: Tensors, trained: Tensors, adapter: Adapter) -> Tensors:
    """The base's tensors with the adapter in them: in float32, rounded once to the base's type.

    Raises RunFailed if the base has no such module.
    """
    modules = parts_of(list(trained))
    missing = [module for module in modules if f"{module}.weight" not in base]
    if missing:
        raise RunFailed(
            f"the base has no module `{missing[0]}`: it is another one than was trained"
        )
    found = dict(base)
    for module, parts in modules.items():
        name = f"{module}.weight"
        held_parts = {part: trained[full] for part, full in parts.items()}
        read = partial(_adapted, base[name], held_parts, adapter, module)
        found[name] = Lazy(shape=base[name].shape, dtype=base[name].dtype, read=read)
    return found


def _adapted(lazy: Lazy, parts: Tensors, adapter: Adapter, module: str) -> Tensor:
    held_parts = {part: tensor.read() for part, tensor in parts.items()}
    return adapted_weight(lazy.read(), held_parts, adapter, module).to(lazy.dtype)
