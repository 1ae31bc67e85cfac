"""Writes a run's weights as another program wants them: `tuner export`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from compiler.adapters import INVERSION, scale_of
from compiler.families import FAMILIES
from compiler.plan import Adapter, Plan
from runtime import files
from runtime.errors import RunFailed
from runtime.export import dora, encoders, lora_keys
from runtime.export.base import STEM, base_tensors
from runtime.export.conventions import FUSED, Config, Format, unread
from runtime.export.foreign import PLACES
from runtime.export.lazy import Lazy, Tensors, held, write
from runtime.export.lora_keys import Layer
from runtime.export.metadata import described
from runtime.export.mmdit import Place, in_rows
from runtime.export.request import Request, config_of
from runtime.export.size import Size
from runtime.export.svd import cut, resized
from runtime.export.weights import adapter_of, layers_of, merged, trained_weights
from runtime.export.whole import laid_out
from runtime.families.common import DTYPES, base_folder, copy_component
from runtime.families.sana_sprint import few_steps
from runtime.methods import adapter_files, embedding_files, text_files
from runtime.methods.decomposed import PART
from runtime.methods.kinds import NAME, parts_of
from runtime.methods.lora import PEFT_FILES
from runtime.methods.student import OF_LOSS, settings_of
from runtime.methods.updates import product
from runtime.new_tokens import FOLDER, is_rows
from runtime.samplers import as_trained

NOTHING = Layer(a=torch.zeros(1, 1), b=torch.zeros(1, 1), scale=1.0)
"""To ask by for the names of a layer."""
Kohya = Callable[[Mapping[str, Layer], Config], dict[str, Tensor]]
"""From the layers and the trained component's configuration. Raises KeyError for a module that the
layout does not have."""
KOHYA: Mapping[str, Kohya] = {
    "flux": lora_keys.kohya_flux,
    "flux2": lora_keys.kohya_flux2,
    "flux2_dev": lora_keys.kohya_flux2,
    "kolors": lora_keys.kohya_kolors,
    "lumina2": lora_keys.kohya_lumina2,
    "qwen_image": lora_keys.kohya_own,
    "sd": lora_keys.kohya_own,
    "sd3": lambda layers, config: lora_keys.kohya_sd3(layers, int(config["num_layers"])),
    "sdxl": lora_keys.kohya_sgm,
    "sdxl_refiner": lora_keys.kohya_sgm,
    "z_image": lora_keys.kohya_own,
}
COMFYUI: Mapping[str, Kohya] = {
    "flux2": lora_keys.generic_flux2,
    "flux2_dev": lora_keys.generic_flux2,
    "kolors": lora_keys.kohya_kolors,
    "lumina2": lora_keys.generic_lumina2,
    "sd": lora_keys.kohya_own,
    "sdxl": lora_keys.kohya_sgm,
    "sdxl_refiner": lora_keys.kohya_sgm,
}
"""Where ComfyUI reads other keys than Diffusers' own: those of sd-scripts, alpha included, or its
own for any model under its published names."""


def has_place(format: Format, family: str, module: str, config: Config) -> bool:
    """Whether the keys of `format` have a name for the module called `module`."""
    write = {"kohya": KOHYA, "comfyui": COMFYUI}.get(format, {}).get(family)
    try:
        if write is not None:
            write({module: NOTHING}, config)
    except KeyError:
        return False
    return True


def export(request: Request) -> Path:
    """Write what `request` says, whole or not at all; returns where it is.

    Raises RunFailed if the base is not there, or the place can't be written.
    """
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        adapter = request.weights.plan.adapter
        if adapter is not None and adapter.kind == INVERSION:
            _embeddings(request, request.out)
        elif adapter is not None and not request.merge:
            _lora(request)
            if request.weights.plan.embeddings is not None:
                stem = request.out.name.removesuffix(".safetensors")
                _embeddings(request, request.out.with_name(f"{stem}-{FOLDER}"))
        elif request.single_file:
            _single(request)
        else:
            _pipeline(request)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"`{request.out}` can't be written: {error}") from error
    return request.out


def _embeddings(request: Request, place: Path) -> None:
    """The vectors of new tokens, in a folder of their own."""
    plan = request.weights.plan
    assert plan.embeddings is not None
    rows = {n: lazy.read() for n, lazy in trained_weights(request.weights).items() if is_rows(n)}
    card = FAMILIES[plan.model.family]
    with files.partial_folder(place) as folder:
        embedding_files.write(rows, plan.embeddings, card, folder, _dtype(request))


def _bundled(request: Request, trained: Tensors) -> dict[str, Tensor]:
    """The vectors of new tokens under the keys that a LoRA's file has for them."""
    plan = request.weights.plan
    assert plan.embeddings is not None
    rows = {name: lazy.read() for name, lazy in trained.items() if is_rows(name)}
    return embedding_files.bundled(rows, plan.embeddings, FAMILIES[plan.model.family])


def _lora(request: Request) -> None:
    plan = request.weights.plan
    adapter, component = plan.adapter, plan.model.trained_component
    assert adapter is not None
    every_tensor = trained_weights(request.weights)
    trained = {name: lazy for name, lazy in every_tensor.items() if not is_rows(name)}
    if request.format == "peft" or adapter_files.is_lycoris(adapter):
        values = {name: lazy.read() for name, lazy in trained.items()}
        if request.size is not None:
            values = in_training(_smaller(plan, layers_of(plan, trained), request.size), adapter)
        _of_kind(request, values)
        return
    metadata = described(request)
    text = plan.text_training
    words = _bundled(request, every_tensor) if request.bundle else {}
    if adapter.kind == "dora" and request.format != "diffusers":
        found = held(_dora(request, trained))
        if request.format == "comfyui":
            metadata |= {adapter_files.COMFYUI_LENGTHS: "true"}
        found = {**found, **held(words)}
        dtype = _dtype(request)
        kept = {k: v if k.endswith(".alpha") else v.to(dtype) for k, v in found.items()}
        write(request.out, kept, metadata)
        return
    if adapter.kind == "dora":
        values = {name: lazy.to(_dtype(request)).read() for name, lazy in trained.items()}
        own = text_files.of_model(values)
        named = lora_keys.prefixed(adapter_files.laid_out(own, adapter), component)
        told = [lora_keys.told(adapter_files.peft_settings(own, adapter), component)]
        for encoder, (tensors, settings) in text_files.of_encoders(values, text).items():
            named |= lora_keys.prefixed(tensors, encoder)
            told.append(lora_keys.told(settings, encoder))
        write(request.out, held(named), metadata | encoders.joined(told))
        return
    every = layers_of(plan, trained)
    if request.size is not None:
        every = _smaller(plan, every, request.size)
    layers = text_files.of_model(every)
    foreign = {"kohya": KOHYA, "comfyui": COMFYUI}.get(request.format, {})
    if plan.model.family in foreign:
        tensors = _renamed(foreign[plan.model.family], layers, request)
        tensors |= encoders.kohya(plan.model.family, every, text.encoders) if text else {}
    elif request.format == "comfyui":
        tensors = lora_keys.folded(layers, component)
        tensors |= encoders.diffusers(every, text.encoders, folded=True)[0] if text else {}
    else:
        names = text.encoders if text else ()
        more, told = encoders.diffusers(every, names, folded=False)
        tensors = lora_keys.diffusers(layers, component) | more
        metadata |= encoders.joined([lora_keys.settings(layers, component), *told])
    dtype = _dtype(request)
    found = held(tensors)
    # Alpha is a number, not a weight: it keeps its digits.
    found = {**found, **held(words)}
    kept = {k: v if k.endswith(".alpha") else v.to(dtype) for k, v in found.items()}
    write(request.out, kept, metadata)


def _smaller(plan: Plan, layers: Mapping[str, Layer], size: Size) -> dict[str, Layer]:
    """The LoRA of `size`: of DyLoRA the first ranks, else what is nearest to all of them."""
    if plan.adapter is None or plan.adapter.kind != "dylora":
        return {module: resized(layer, size) for module, layer in layers.items()}
    return {m: cut(layer, size, adapter_of(plan, m), m) for m, layer in layers.items()}


def _dora(request: Request, trained: Tensors) -> dict[str, Tensor]:
    """A DoRA under the keys of sd-scripts or ComfyUI."""
    plan, component = request.weights.plan, request.weights.plan.model.trained_component
    layers = layers_of(plan, trained)
    magnitude = {m: parts["lora_magnitude_vector"] for m, parts in parts_of(list(trained)).items()}
    lengths = {module: trained[name].read() for module, name in magnitude.items()}
    foreign = {"kohya": KOHYA, "comfyui": COMFYUI}[request.format]
    family = plan.model.family
    if request.format == "comfyui":
        updates = {module: layer.update() for module, layer in layers.items()}
        lengths = dora.of_the_base(updates, lengths, base_tensors(plan.model, plan.seed))
    if family in foreign:
        return dora.with_lengths(
            layers, lengths, lambda one: _renamed(foreign[family], one, request)
        )
    return dora.with_lengths(layers, lengths, lambda one: lora_keys.folded(one, component))


def _of_kind(request: Request, values: Mapping[str, Tensor]) -> None:
    """LyCORIS' file of `values`, or peft's folder."""
    plan, adapter, dtype = request.weights.plan, request.weights.plan.adapter, _dtype(request)
    assert adapter is not None
    metadata = described(request)
    if request.format == "comfyui":
        check_read(plan.model.family, values)
    if adapter.weight_decompose and request.format == "comfyui":
        values = _for_comfyui(plan, adapter, values)
        metadata |= {adapter_files.COMFYUI_LENGTHS: "true"}
    found = held(adapter_files.laid_out(values, adapter))
    kept = {k: v if k.endswith(".alpha") else v.to(dtype) for k, v in found.items()}
    if request.format == "kohya":
        kept = in_kohya(plan.model.family, kept, list(parts_of(list(values))), config_of(plan))
    if request.format != "peft":
        write(request.out, kept, metadata)
        return
    settings = adapter_files.peft_settings(values, adapter)
    write_peft(request.out, kept, settings, described(request))


def write_peft(
    place: Path, tensors: Tensors, settings: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """A folder that peft loads, of tensors by their names in the trained component."""
    with files.partial_folder(place) as folder:
        theirs = lora_keys.prefixed(tensors, adapter_files.PEFT_ROOT)
        write(folder / PEFT_FILES[0], theirs, dict(metadata))
        text = json.dumps({**settings, "inference_mode": True}, indent=2, sort_keys=True) + "\n"
        (folder / PEFT_FILES[1]).write_text(text, encoding="utf-8")


def check_read(family: str, values: Mapping[str, Tensor]) -> None:
    """Raise RunFailed for a layer of a LyCORIS' kind that ComfyUI would pass over."""
    if missing := unread(family, parts_of(list(values))):
        raise RunFailed(
            f"the comfyui layout has no place for '{missing[0]}'",
            help="use `--format lycoris`, or `--merge` for a whole model",
        )


def _for_comfyui(plan: Plan, adapter: Adapter, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the lengths of rows that ComfyUI multiplies by."""
    updates, lengths, found = {}, {}, dict(values)
    for module, parts in parts_of(list(values)).items():
        if PART in parts:
            held_parts = {part: values[name].float() for part, name in parts.items()}
            updates[module] = scale_of(adapter, module) * product(held_parts)
            lengths[module] = values[parts[PART]]
    base = base_tensors(plan.model, plan.seed)
    for module, own in dora.of_the_base(updates, lengths, base).items():
        found[f"{module}.{PART}.{NAME}"] = own
    return found


def in_kohya(
    family: str, tensors: Tensors, modules: Sequence[str], config: Config
) -> dict[str, Lazy]:
    """LyCORIS' file under sd-scripts' names; where they have several `modules` in one layer, their
    rows one upon the other, and zeros for modules that are no targets. Raises RunFailed for a
    module that they don't have."""
    try:
        places = {module: _place(family, module, config) for module in modules}
    except KeyError as error:
        raise RunFailed(
            f"the kohya layout has no place for {error}", help="use `--format lycoris`"
        ) from error
    starts = {adapter_files.LYCORIS_PREFIX + m.replace(".", "_"): m for m in modules}
    shared: dict[tuple[str, str], list[tuple[Place, Lazy]]] = {}
    for key, lazy in tensors.items():
        start, _, part = key.partition(".")
        there = places[starts[start]]
        name = "lora_unet_" + there.module.replace(".", "_")
        shared.setdefault((name, part), []).append((there, lazy))
    return {f"{name}.{part}": in_rows(found) for (name, part), found in shared.items()}


def _place(family: str, module: str, config: Config) -> Place:
    """Raises KeyError."""
    if family in FUSED["kohya"]:
        return PLACES[family](module, config)
    key = next(iter(KOHYA[family]({module: NOTHING}, config)))
    return Place(key.partition(".")[0].removeprefix("lora_unet_"))


def in_training(layers: Mapping[str, Layer], adapter: Adapter) -> dict[str, Tensor]:
    """The layers under the names that they have in training, at the scale that `adapter` gives a
    layer; B takes up the rest."""
    found = {}
    for module, layer in layers.items():
        share = layer.scale / scale_of(adapter, module)
        b = layer.b if share == 1 else (layer.b.float() * share).to(layer.b.dtype)
        for which, tensor in (("A", layer.a), ("B", b)):
            found[f"{module}.lora_{which}.{NAME}.weight"] = tensor
    return found


def _renamed(write: Kohya, layers: Mapping[str, Layer], request: Request) -> dict[str, Tensor]:
    try:
        return write(layers, config_of(request.weights.plan))
    except KeyError as error:
        raise RunFailed(
            f"the {request.format} layout has no place for {error}",
            help="use `--format diffusers`",
        ) from error


def _single(request: Request) -> None:
    model, dtype = as_trained(request.weights.plan), _dtype(request)
    tensors = {name: lazy.to(dtype) for name, lazy in _whole(request).items()}
    try:
        found = laid_out(
            model,
            tensors,
            everything=request.everything,
            dtype=dtype,
            encoders=encoders_of(request),
        )
    except KeyError as error:
        raise RunFailed(
            f"the published layout has no place for {error}", help="leave out `--single-file`"
        ) from error
    write(request.out, found, described(request))


def _pipeline(request: Request) -> None:
    """A folder in the Diffusers layout: the base's, with the trained component's new weights."""
    model = as_trained(request.weights.plan)
    component = model.trained_component
    source = base_folder(model, [c.name for c in model.components])
    tensors = {name: lazy.to(_dtype(request)) for name, lazy in _whole(request).items()}
    with files.partial_folder(request.out) as folder:
        for part in model.components:
            if part.name != component:
                copy_component(model, part.name, source, folder)
        shutil.copyfile(source / "model_index.json", folder / "model_index.json")
        for encoder, own in encoders_of(request).items():
            place = folder / encoder
            for old in place.glob("*.safetensors*"):
                old.unlink()
            write(place / "model.safetensors", own, described(request))
        if request.weights.plan.embeddings is not None:
            _embeddings(request, folder / FOLDER)
        (folder / component).mkdir()
        config, sprint = model.configs[component], request.weights.plan.sprint
        if sprint is not None:
            config = json.dumps(json.loads(config) | settings_of(sprint), indent=2) + "\n"
            few_steps(sprint, folder)
        (folder / component / "config.json").write_text(config, encoding="utf-8")
        write(folder / component / f"{STEM}.safetensors", tensors, described(request))


def encoders_of(request: Request) -> dict[str, Tensors]:
    """Every tensor of the text encoders that were trained, see `whole_encoders`."""
    plan, dtype = request.weights.plan, _dtype(request)
    found = encoders.whole_encoders(plan, trained_weights(request.weights))
    return {e: {n: lazy.to(dtype) for n, lazy in own.items()} for e, own in found.items()}


def _whole(request: Request) -> Tensors:
    """Every tensor of the trained component, with what was trained in its place."""
    plan = request.weights.plan
    trained = text_files.of_model(trained_weights(request.weights))
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
