"""The trained weights of a run, as its result or a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from compiler.adapters import INVERSION, OF_THE_BASE, rank_of, scale_of
from compiler.families import FAMILIES
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Adapter, Layout, Plan
from runtime import checkpoints
from runtime.build import build, without_starts
from runtime.errors import RunFailed
from runtime.export.base import base_tensors
from runtime.export.lazy import Lazy, Tensors, held, in_files
from runtime.export.lora_keys import Layer
from runtime.export.request import Weights
from runtime.families import family_of
from runtime.families.common import DTYPES
from runtime.methods import embedding_files, text_files
from runtime.methods.adapter_files import Taken, given_back, read_result
from runtime.methods.kinds import parts_of, split
from runtime.methods.updates import adapted_bias, adapted_weight
from runtime.new_tokens import FOLDER
from runtime.optimizers import class_of, grouped, kept_weights, load_state, make_optimizer


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
        whole: Tensors = in_files(_files(folder))
        facts = weights.plan.text_training
        for encoder in facts.encoders if facts else ():
            theirs = in_files(_files(weights.result / encoder))
            whole = {**whole, **{f"{encoder}.{name}": lazy for name, lazy in theirs.items()}}
        return whole
    plan, names = weights.plan, _in_order(weights.plan)
    found = _embeddings(plan, weights.result, names)
    if weights.plan.adapter.kind == INVERSION:
        return held(found)
    (file,) = _files(weights.result)
    own, text = list(text_files.of_model(dict.fromkeys(names))), plan.text_training
    beside = text.encoders if text else ()
    found |= read_result(weights.plan.adapter, file, own, beside=beside)
    for encoder in beside:
        assert text is not None
        found |= text_files.read(text, file, names, encoder)
    return held(found)


def _embeddings(plan: Plan, result: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The vectors of new tokens in a result. Raises RunFailed."""
    if plan.embeddings is None:
        return {}
    alone = plan.adapter is not None and plan.adapter.kind == INVERSION
    folder = result if alone else result / FOLDER
    try:
        return embedding_files.read(plan.embeddings, FAMILIES[plan.model.family], folder, names)
    except (OSError, KeyError) as error:
        raise RunFailed(
            f"{folder} does not hold the vectors of the run's tokens: {error}",
            help="export a checkpoint: --checkpoint STEP",
        ) from error


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
    for module in parts_of(list(text_files.of_model(trained))):
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
    named = grouped(parameters.items(), plan)
    optimizer = make_optimizer(plan.optimizer, named, torch.device("cpu"))
    load_state(optimizer, dict(snapshot.optimizer))
    with kept_weights(optimizer, parameters.values()):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _in_order(plan: Plan) -> list[str]:
    """Names of what is trained, as the optimizer counts them: files don't keep the order."""
    family, nowhere = family_of(plan.model.family), torch.device("meta")
    plan = without_starts(plan)
    given = (plan.model, plan.adapter, plan.precision, Layout(), family, nowhere)
    built = build(
        *given,
        empty=True,
        seed=plan.seed,
        text_training=plan.text_training,
        embeddings=plan.embeddings,
    )
    return list(built.trainable)


def adapter_of(plan: Plan, module: str) -> Adapter:
    """The adapter of a module, by its name in training."""
    text, own = plan.text_training, plan.adapter
    if text is not None and module.partition(".")[0] in text.encoders:
        own = text.adapter
    assert own is not None
    return own


def layers_of(plan: Plan, trained: Tensors) -> dict[str, Layer]:
    """The adapter by module, in the model's order of names."""
    assert plan.adapter is not None
    return {
        module: Layer(
            a=trained[parts["lora_A"]].read(),
            b=trained[parts["lora_B"]].read(),
            scale=scale_of(adapter_of(plan, module), module),
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
        bias = f"{module}.bias"
        if (adapter.kind == "ia3" or "norm_b" in parts) and bias in base:
            read = partial(_scaled, base[bias], held_parts)
            found[bias] = Lazy(shape=base[bias].shape, dtype=base[bias].dtype, read=read)
    return found


def _scaled(lazy: Lazy, parts: Tensors) -> Tensor:
    held_parts = {part: tensor.read() for part, tensor in parts.items()}
    return adapted_bias(lazy.read(), held_parts).to(lazy.dtype)


def _adapted(lazy: Lazy, parts: Tensors, adapter: Adapter, module: str) -> Tensor:
    held_parts = {part: tensor.read() for part, tensor in parts.items()}
    return adapted_weight(lazy.read(), held_parts, adapter, module).to(lazy.dtype)
