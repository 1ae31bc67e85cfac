"""Writes a run's weights as another program wants them: `tuner export`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from runtime import files
from runtime.errors import RunFailed
from runtime.export import bfl, ldm_vae, lora_keys, mmdit
from runtime.export.base import STEM, base_tensors, component_tensors
from runtime.export.conventions import WITH_VAE, Config
from runtime.export.lazy import Tensors, held, write
from runtime.export.lora_keys import Layer
from runtime.export.metadata import described
from runtime.export.request import Request, config_of
from runtime.export.svd import resized
from runtime.export.weights import layers_of, merged, trained_weights
from runtime.families.common import DTYPES, base_folder
from runtime.families.sana_sprint import few_steps
from runtime.methods import adapter_files
from runtime.methods.kinds import NAME
from runtime.methods.lora import PEFT_FILES
from runtime.methods.student import OF_LOSS, settings_of

Kohya = Callable[[Mapping[str, Layer], Config], dict[str, Tensor]]
"""From the layers and the trained component's configuration. Raises KeyError for a module that the
layout does not have."""
KOHYA: Mapping[str, Kohya] = {
    "flux": lora_keys.kohya_flux,
    "sd": lora_keys.kohya_unet,
    "sd3": lambda layers, config: lora_keys.kohya_sd3(layers, int(config["num_layers"])),
    "sdxl": lora_keys.kohya_sgm,
}
COMFYUI: Mapping[str, Kohya] = {"sd": lora_keys.kohya_unet, "sdxl": lora_keys.kohya_sgm}
"""Where ComfyUI reads sd-scripts' keys, alpha included."""
SINGLE: Mapping[str, Callable[[Tensors, Config], Tensors]] = {
    "flux": bfl.laid_out,
    "sd3": lambda tensors, config: mmdit.laid_out(tensors, int(config["num_layers"])),
}


def export(request: Request) -> Path:
    """Write what `request` says, whole or not at all; returns where it is.

    Raises RunFailed if the base is not there, or the place can't be written.
    """
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        if request.weights.plan.adapter is not None and not request.merge:
            _lora(request)
        elif request.single_file:
            _single(request)
        else:
            _pipeline(request)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"`{request.out}` can't be written: {error}") from error
    return request.out


def _lora(request: Request) -> None:
    plan = request.weights.plan
    adapter, component = plan.adapter, plan.model.trained_component
    assert adapter is not None
    trained = trained_weights(request.weights)
    if request.format == "peft" or adapter.kind in ("lokr", "loha"):
        values = {name: lazy.read() for name, lazy in trained.items()}
        if request.size is not None:
            small = {m: resized(one, request.size) for m, one in layers_of(plan, trained).items()}
            values = in_training(small)
        _of_kind(request, values)
        return
    metadata = described(request)
    if adapter.kind == "dora":
        values = {name: lazy.to(_dtype(request)).read() for name, lazy in trained.items()}
        named = lora_keys.prefixed(adapter_files.laid_out(values, adapter), component)
        told = lora_keys.told(adapter_files.peft_settings(values, adapter), component)
        write(request.out, held(named), metadata | told)
        return
    layers = layers_of(plan, trained)
    if request.size is not None:
        layers = {module: resized(layer, request.size) for module, layer in layers.items()}
    foreign = {"kohya": KOHYA, "comfyui": COMFYUI}.get(request.format, {})
    if plan.model.family in foreign:
        tensors = _renamed(foreign[plan.model.family], layers, request)
    elif request.format == "comfyui":
        tensors = lora_keys.folded(layers, component)
    else:
        tensors = lora_keys.diffusers(layers, component)
        metadata |= lora_keys.settings(layers, component)
    dtype = _dtype(request)
    found = held(tensors)
    # Alpha is a number, not a weight: it keeps its digits.
    kept = {k: v if k.endswith(".alpha") else v.to(dtype) for k, v in found.items()}
    write(request.out, kept, metadata)


def _of_kind(request: Request, values: Mapping[str, Tensor]) -> None:
    """LyCORIS' file of `values`, or peft's folder."""
    adapter, dtype = request.weights.plan.adapter, _dtype(request)
    assert adapter is not None
    found = held(adapter_files.laid_out(values, adapter))
    kept = {k: v if k.endswith(".alpha") else v.to(dtype) for k, v in found.items()}
    if request.format == "comfyui":
        write(request.out, kept, described(request))
        return
    settings = {**adapter_files.peft_settings(values, adapter), "inference_mode": True}
    with files.partial_folder(request.out) as folder:
        named = lora_keys.prefixed(kept, adapter_files.PEFT_ROOT)
        write(folder / PEFT_FILES[0], named, described(request))
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (folder / PEFT_FILES[1]).write_text(text, encoding="utf-8")


def in_training(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The layers under the names that they have in training."""
    return {
        f"{module}.lora_{which}.{NAME}.weight": tensor
        for module, layer in layers.items()
        for which, tensor in (("A", layer.a), ("B", layer.b))
    }


def _renamed(write: Kohya, layers: Mapping[str, Layer], request: Request) -> dict[str, Tensor]:
    try:
        return write(layers, config_of(request.weights.plan))
    except KeyError as error:
        raise RunFailed(
            f"the {request.format} layout has no place for {error}",
            help="use `--format diffusers`",
        ) from error


def _single(request: Request) -> None:
    layout = SINGLE[request.weights.plan.model.family]
    tensors = {name: lazy.to(_dtype(request)) for name, lazy in _whole(request).items()}
    found = layout(tensors, config_of(request.weights.plan))
    if request.weights.plan.model.family in WITH_VAE:
        vae = component_tensors(request.weights.plan.model, "vae")
        found |= ldm_vae.laid_out({name: lazy.to(_dtype(request)) for name, lazy in vae.items()})
    write(request.out, found, described(request))


def _pipeline(request: Request) -> None:
    """A folder in the Diffusers layout: the base's, with the trained component's new weights."""
    model = request.weights.plan.model
    component = model.trained_component
    source = base_folder(model, [c.name for c in model.components])
    tensors = {name: lazy.to(_dtype(request)) for name, lazy in _whole(request).items()}
    with files.partial_folder(request.out) as folder:
        for part in model.components:
            if part.name != component and (source / part.name).is_dir():
                shutil.copytree(source / part.name, folder / part.name)
        shutil.copyfile(source / "model_index.json", folder / "model_index.json")
        (folder / component).mkdir()
        config, sprint = model.configs[component], request.weights.plan.sprint
        if sprint is not None:
            config = json.dumps(json.loads(config) | settings_of(sprint), indent=2) + "\n"
            few_steps(sprint, folder)
        (folder / component / "config.json").write_text(config, encoding="utf-8")
        write(folder / component / f"{STEM}.safetensors", tensors, described(request))


def _whole(request: Request) -> Tensors:
    """Every tensor of the trained component, with what was trained in its place."""
    plan = request.weights.plan
    trained = trained_weights(request.weights)
    if plan.sprint is not None:  # all of it, under names of its own
        return {name: each for name, each in trained.items() if not name.startswith(OF_LOSS)}
    base = base_tensors(plan.model, plan.seed)
    if plan.adapter is not None:
        return merged(base, trained, plan.adapter)
    strange = trained.keys() - base.keys()
    if strange:
        raise RunFailed(f"the base has no `{min(strange)}`: it is another one than was trained")
    return base | trained


def _dtype(request: Request) -> torch.dtype | None:
    return None if request.dtype is None else DTYPES[request.dtype]
