"""What all families share: loading parts by their Diffusers names, and the stock pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compiler.families.card import FamilyCard
from compiler.plan import Model

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def config_of(model: Model, name: str) -> dict[str, Any]:
    """A component's configuration. Raises KeyError if the plan holds none."""
    config: dict[str, Any] = json.loads(model.configs[name])
    return config


def load_component(
    model: Model, name: str, dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> Any:
    """One component with its weights, as `dtype` on `device`, ready for inference.

    Tokenizers and schedulers have neither type nor device. The trained component of a model with
    `init = "random"` is built from its configuration, its weights drawn from `seed` alone.
    """
    if model.init == "random" and name == model.trained_component:
        return random_component(model, name, dtype, device, seed)
    cls, library = component_class(model, name)
    place: dict[str, Any] = {"subfolder": name, "local_files_only": model.local}
    if model.revision:
        place["revision"] = model.revision
    if not issubclass(cls, nn.Module):
        return cls.from_pretrained(model.base, **place)
    place["dtype" if library == "transformers" else "torch_dtype"] = dtype
    return cls.from_pretrained(model.base, **place).to(device=device).eval()


def random_component(
    model: Model, name: str, dtype: torch.dtype, device: torch.device, seed: int
) -> Any:
    """One Diffusers component from its configuration, with fresh weights drawn from `seed`.

    Drawn on the CPU, so that all devices start alike; torch's own generator is left as it was.
    """
    cls, _ = component_class(model, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        component = cls.from_config(config_of(model, name))
    return component.to(device=device, dtype=dtype)


def empty_component(model: Model, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """One component from its configuration alone; weights are whatever memory holds."""
    cls, library = component_class(model, name)
    config = config_of(model, name)
    with torch.device("meta"):
        built = (
            cls(cls.config_class.from_dict(config))
            if library == "transformers"
            else cls.from_config(config)
        )
    component: nn.Module = built.to(dtype=dtype)
    return component if device.type == "meta" else component.to_empty(device=device)


def component_class(model: Model, name: str) -> tuple[Any, str]:
    """A component's class, and the library it is of ("diffusers" or "transformers").

    A scheduler's class is the one that its folder states, since any flow-matching scheduler serves.
    """
    import diffusers
    import transformers

    stated = next(c.class_name for c in model.components if c.name == name)
    if name == "scheduler":
        stated = config_of(model, name).get("_class_name", stated)
    for library in (diffusers, transformers):
        if hasattr(library, stated):
            return getattr(library, stated), library.__name__
    raise ValueError(f"neither diffusers nor transformers has a class {stated} (component {name})")


def stock_pipeline(card: FamilyCard, parts: Mapping[str, Any]) -> Any:
    """Diffusers' own pipeline around `parts`; what is not there is None."""
    import diffusers

    pipeline = getattr(diffusers, card.pipeline)(
        **{name: parts.get(name) for name in card.components}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inside, `model` neither drops out nor records gradients; afterwards it is as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def pad_tokens(tensors: Sequence[Tensor], length: int) -> Tensor:
    """(tokens, channels) each -> (B, length, channels), zeros behind."""
    return torch.stack([nn.functional.pad(t, (0, 0, 0, length - t.shape[0])) for t in tensors])


def cpu_generator(seed: int) -> torch.Generator:
    """A generator on the CPU, as a person gives it to a pipeline."""
    return torch.Generator("cpu").manual_seed(seed)


def base_folder(model: Model, names: Sequence[str]) -> Path:
    """The folder with the base's components `names`, downloaded if it is not in the hub's cache."""
    if model.local:
        return Path(model.base)
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", *(f"{name}/*" for name in names)]
    return Path(
        snapshot_download(model.base, revision=model.revision or None, allow_patterns=patterns)
    )
