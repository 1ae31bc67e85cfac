"""A whole model in one file, as its publishers lay it out: the inverse of `single_file`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from compiler.families import FAMILIES, whole_file
from compiler.families.whole_file import MARKS, MODEL, Held
from compiler.plan import Model
from runtime.export import bfl, bfl2, clip_names, ldm_vae, mmdit, nextdit, sgm, z_image
from runtime.export.base import component_tensors
from runtime.export.conventions import Config
from runtime.export.lazy import Lazy, Tensors, held
from runtime.families.common import config_of

TRAINED: Mapping[str, Callable[[Tensors, Config], Tensors]] = {
    "flux": bfl.laid_out,
    "flux2": bfl2.laid_out,
    "flux2_dev": bfl2.laid_out,
    "lumina2": nextdit.laid_out,
    "qwen_image": lambda tensors, config: tensors,
    "sd": sgm.laid_out,
    "sd3": lambda tensors, config: mmdit.laid_out(tensors, int(config["num_layers"])),
    "sdxl": sgm.laid_out,
    "sdxl_refiner": sgm.laid_out,
    "z_image": z_image.laid_out,
}
"""Of the trained component's tensors, by its configuration: those names that begin no file's."""

T5_TWICE = "encoder.embed_tokens.weight"
"""The same as `shared.weight`: folders hold it once, and Diffusers asks a file for both."""


def laid_out(
    model: Model,
    trained: Tensors,
    *,
    everything: bool,
    dtype: torch.dtype | None,
    encoders: Mapping[str, Tensors] | None = None,
) -> Tensors:
    """The file's tensors: `trained` and those other components that published files hold; with
    `everything` all of the model's. `encoders` are text encoders that were trained too. Raises
    KeyError for a name that the layout does not have."""
    card, name = FAMILIES[model.family], model.trained_component
    assert card.whole_file is not None
    parts = card.whole_file.parts
    bare = TRAINED[model.family](trained, config_of(model, name))
    layouts = [layout.prefix for layout in parts[name]]
    # Published without a prefix, a model needs one where other components lie beside it.
    prefix = MODEL if everything or layouts == [MODEL] else layouts[0]
    found = {prefix + key: lazy for key, lazy in bare.items()}
    for other in parts:
        if other == name or not (everything or other in card.whole_file.usual):
            continue
        own = (encoders or {}).get(other) or component_tensors(model, other)
        tensors = {k: v.to(dtype) for k, v in own.items()}
        layout = _layout(parts[other], config_of(model, other))
        found |= {layout.prefix + key: v for key, v in _renamed(tensors, layout).items()}
    return found | _marks(model)


def _layout(layouts: tuple[Held, ...], config: Config) -> Held:
    """Several are there for CLIP: OpenCLIP's models have the exact GELU."""
    if len(layouts) > 1 and layouts[0].probes is whole_file.clip:
        return layouts["quick" not in str(config.get("hidden_act", "quick_gelu"))]
    return layouts[0]


def _renamed(tensors: Tensors, layout: Held) -> Tensors:
    if layout.probes is whole_file.vae:
        return ldm_vae.laid_out(tensors)
    if layout.probes is whole_file.open_clip:
        return clip_names.open_clip_names(tensors)
    if layout.probes is whole_file.clip:
        return clip_names.transformers_names(tensors)
    return {**tensors, T5_TWICE: tensors["shared.weight"]}


def _marks(model: Model) -> dict[str, Lazy]:
    """Stable Diffusion XL's files say by an empty tensor that they predict v; those of version 2
    are known by their weights."""
    scheduler = config_of(model, "scheduler")
    if not FAMILIES[model.family].size_conditions:
        return {}
    stated = {mark: scheduler.get(key) == wanted for mark, (_, key, wanted) in MARKS.items()}
    return held({mark: torch.zeros(0) for mark, said in stated.items() if said})
