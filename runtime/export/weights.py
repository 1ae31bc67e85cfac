"""The trained weights of a run, as its result or a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from compiler.families import FAMILIES
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Layout, Plan
from runtime import checkpoints
from runtime.build import build
from runtime.errors import RunFailed
from runtime.export.lazy import Lazy, Tensors, held, in_files
from runtime.export.lora_keys import Layer
from runtime.export.request import Weights
from runtime.families import family_of
from runtime.methods.lora import NAME, file_prefix
from runtime.optimizers import class_of, kept_weights, load_state, make_optimizer

LORA_FILE = "pytorch_lora_weights.safetensors"


def trained_weights(weights: Weights) -> Tensors:
    """What was trained, by the names of the model in training: those that are kept.

    With an average they are the average; of a schedule-free optimizer those it gives its name for,
    not those that it steps from. Raises RunFailed if files are missing.
    """
    if weights.checkpoint is not None:
        return held(_of_checkpoint(weights, weights.checkpoint))
    if weights.plan.adapter is None:
        folder = weights.result / weights.plan.model.trained_component
        return in_files(_files(folder))
    prefix = file_prefix(FAMILIES[weights.plan.model.family])
    found = in_files(_files(weights.result))
    return {_in_training(name.removeprefix(prefix)): lazy for name, lazy in found.items()}


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise RunFailed(f"{folder} holds no weights", help="export a checkpoint: --checkpoint STEP")
    return found


def _in_training(name: str) -> str:
    """`X.lora_A.weight`, as files have it, as peft calls it while it trains."""
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{NAME}.{leaf}"


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
    scale = plan.adapter.alpha / plan.adapter.rank
    a, b = f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"
    modules = [name.removesuffix(a) for name in trained if name.endswith(a)]
    return {
        module: Layer(a=trained[module + a].read(), b=trained[module + b].read(), scale=scale)
        for module in modules
    }


def merged(base: Tensors, layers: Mapping[str, Layer]) -> Tensors:
    """The base's tensors with the adapter added: in float32, rounded once to the base's type.

    Raises RunFailed if the base has no such module.
    """
    missing = [module for module in layers if f"{module}.weight" not in base]
    if missing:
        raise RunFailed(
            f"the base has no module `{missing[0]}`: it is another one than was trained"
        )
    return {
        name: _with(lazy, layers.get(name.removesuffix(".weight"))) for name, lazy in base.items()
    }


def _with(lazy: Lazy, layer: Layer | None) -> Lazy:
    if layer is None:
        return lazy
    return Lazy(shape=lazy.shape, dtype=lazy.dtype, read=lambda: _sum(lazy, layer))


def _sum(lazy: Lazy, layer: Layer) -> Tensor:
    total = lazy.read().float() + layer.update().view(lazy.shape)
    return total.to(lazy.dtype)
