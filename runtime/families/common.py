"""What all families share: loading parts by their Diffusers names, and the stock pipeline."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from compiler.plan import Component, Model, Text
from runtime.batch import Batch
from runtime.families.single_file import stored_dtype, translated
from runtime.quantise.layers import hollow, quantise
from runtime.quantise.stream import stream

if TYPE_CHECKING:
    from runtime.families.base import Family, Framed, TextEmbedding

TILE, STRIDE = 512, 448  # pixels
SAMPLED = ("rescale_betas_zero_snr", "timestep_spacing")
"""What `compiler.noise.sampled_so` says anew of a scheduler."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def config_of(model: Model, name: str) -> dict[str, Any]:
    """A component's configuration. Raises KeyError if the plan holds none."""
    config: dict[str, Any] = json.loads(model.configs[name])
    return config


class Stock:
    """What most families do alike: Diffusers' own classes, in Diffusers' own folders."""

    card: FamilyCard

    def load(
        self, model: Model, name: str, dtype: torch.dtype, device: torch.device, *, seed: int = 0
    ) -> Any:
        """See `Family.load`."""
        return load_component(model, name, dtype, device, seed=seed)

    def empty(self, model: Model, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """See `Family.empty`."""
        return empty_component(model, name, dtype, device)

    def size_conditions(self, frames: Sequence[Framed]) -> dict[str, Tensor]:
        """See `Family.size_conditions`: nothing."""
        return {}


def load_component(
    model: Model, name: str, dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> Any:
    """One component with its weights, as `dtype` on `device`, ready for inference.

    Quantised if the model says so. The trained component and quantised ones are read one tensor at
    a time where the files hold exactly the component's own tensors; else the library that wrote
    them reads them on the host, and layers are quantised one after the other. Tokenizers and
    schedulers have neither type nor device. The trained component of a model with
    `init = "random"` is built from its configuration, its weights drawn from `seed` alone.
    """
    if model.init == "random" and name == model.trained_component:
        return random_component(model, name, dtype, device, seed)
    cls, library = component_class(model, name)
    place: dict[str, Any] = {"subfolder": name, "local_files_only": model.local}
    if model.revision:
        place["revision"] = model.revision
    if not issubclass(cls, nn.Module):
        return cls.from_pretrained(model.base, **place, **_restated(model, name))
    part = component_of(model, name)
    if part.quantize != "none" or name == model.trained_component:
        found = _streamed(model, part, dtype, device)
        if found is not None:
            return found
    place["dtype" if library == "transformers" else "torch_dtype"] = dtype
    if part.file is None:
        loaded = cls.from_pretrained(model.base, **place)
    else:
        card, config = FAMILIES[model.family], config_of(model, name)
        loaded = translated(card, name, cls, library, Path(part.file), config, dtype)
    if part.quantize != "none":
        quantise(loaded, part.quantize, device, on=_where(part, device))
    return in_tiles(loaded.to(device=device).eval(), part)


def in_tiles(component: Any, part: Component) -> Any:
    """A vae that works in tiles of 512 pixels, an eighth of which overlap, if the plan says so."""
    if part.tiling:
        component.enable_tiling()
        if hasattr(component, "tile_latent_min_size"):  # AutoencoderKL
            factor = 2 ** (len(component.config.block_out_channels) - 1)
            component.tile_sample_min_size = TILE
            component.tile_latent_min_size = TILE // factor
            component.tile_overlap_factor = 1 - STRIDE / TILE
        else:
            component.enable_tiling(TILE, TILE, STRIDE, STRIDE)
    return component


def _restated(model: Model, name: str) -> dict[str, Any]:
    """What the plan says of a scheduler and its folder perhaps otherwise: a model that is trained
    on other noise levels than the base is sampled on these."""
    config = config_of(model, name) if name == "scheduler" else {}
    return {key: config[key] for key in SAMPLED if key in config}


def _where(part: Component, device: torch.device) -> torch.device:
    """The device that quantises."""
    return device if part.quantize_on == "device" else torch.device("cpu")


def _streamed(
    model: Model, part: Component, dtype: torch.dtype, device: torch.device
) -> nn.Module | None:
    cls, library = component_class(model, part.name)
    if _exact(cls, dtype):
        return None
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    files = _weight_files(model, part.name, stem)
    if files is None:
        return None
    build = partial(_built, cls, library, config_of(model, part.name))
    return stream(build, files, dtype, device, part.quantize, on=_where(part, device))


def _weight_files(model: Model, name: str, stem: str) -> list[Path] | None:
    """A component's safetensors files, all of them; None if there are none of the usual names."""
    if (own := component_of(model, name).file) is not None:
        return [Path(own)]
    index = _file(model, f"{name}/{stem}.safetensors.index.json")
    if index is None:
        single = _file(model, f"{name}/{stem}.safetensors")
        return None if single is None else [single]
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    found = [_file(model, f"{name}/{shard}") for shard in sorted(shards)]
    return [file for file in found if file is not None]


def _file(model: Model, name: str) -> Path | None:
    """A file of the base, downloaded if need be; None if the base has none of that name."""
    if model.local:
        path = Path(model.base) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(model.base, name, revision=model.revision or None))
    except EntryNotFoundError:
        return None


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
    """One component from its configuration alone; weights are whatever memory holds. Quantised
    if the model says so."""
    cls, library = component_class(model, name)
    kind = component_of(model, name).quantize
    # Text encoders share weights and hold tables of positions, which `to_empty` would lose.
    start = torch.device("meta") if library == "diffusers" else device
    with start:
        component = _built(cls, library, config_of(model, name)).to(dtype=dtype)
    for part in _kept_exact(component, dtype):
        part.float()
    if start != device:
        component.to_empty(device=device)
    if kind != "none":
        hollow(component, kind, device)
    in_tiles(component, component_of(model, name))
    return component


def _exact(cls: Any, dtype: torch.dtype) -> frozenset[str]:
    """The layers of `cls`, by the last part of their names, that the libraries load in float32
    where the rest is float16, whose range is too small for them."""
    kept = getattr(cls, "_keep_in_fp32_modules", None) if dtype == torch.float16 else None
    return frozenset(kept or ())


def _kept_exact(component: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    names = _exact(type(component), dtype)
    return (part for name, part in component.named_modules() if name.split(".")[-1] in names)


def _built(cls: Any, library: str, config: dict[str, Any]) -> nn.Module:
    """A component as its configuration says, weights as its class starts them."""
    if library == "diffusers":
        component: nn.Module = cls.from_config(config)
        return component
    # ChatGLM would take memory on the host, whatever the device.
    takes = inspect.signature(cls.__init__).parameters
    options = {"empty_init": False} if "empty_init" in takes else {}
    encoder: nn.Module = cls(cls.config_class.from_dict(config), **options)
    return encoder


def component_of(model: Model, name: str) -> Component:
    """What the plan says of a component."""
    return next(part for part in model.components if part.name == name)


def component_class(model: Model, name: str) -> tuple[Any, str]:
    """A component's class, and the library it is of ("diffusers" or "transformers").

    A scheduler's class is the one that its folder states, since any flow-matching scheduler serves.
    """
    stated = component_of(model, name).class_name
    if name == "scheduler":
        stated = config_of(model, name).get("_class_name", stated)
    return class_called(stated, FAMILIES[model.family])


def class_called(stated: str, card: FamilyCard) -> tuple[Any, str]:
    """The class of this name, and whose it is: "diffusers" or "transformers". A pipeline may bring
    an encoder of its own, made as those of transformers are. Raises ValueError."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        if hasattr(library, stated):
            return getattr(library, stated), library.__name__
    own = import_module(getattr(diffusers, card.pipeline).__module__.rpartition(".")[0])
    if hasattr(own, stated):
        return getattr(own, stated), transformers.__name__
    raise ValueError(f"neither diffusers nor transformers has a class {stated} ({card.name})")


def import_classes(model: Model) -> None:
    """Import what a model's parts and its pipeline are made of, which is done when asked for.

    Before a process forks: else each of the two would do it.
    """
    import diffusers

    for part in model.components:
        with suppress(ValueError):  # a class that is nowhere is said where it is needed
            component_class(model, part.name)
    getattr(diffusers, FAMILIES[model.family].pipeline)


def stock_pipeline(card: FamilyCard, parts: Mapping[str, Any]) -> Any:
    """Diffusers' own pipeline around `parts`; what is not there is None."""
    import diffusers

    pipeline = getattr(diffusers, card.pipeline)(
        **{name: parts.get(name) for name in card.components}, **card.pipeline_options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode_prompts(
    family: Family,
    parts: Mapping[str, Any],
    prompts: Sequence[str],
    text: Text,
    *,
    negative: bool = False,
) -> list[TextEmbedding]:
    """Embeddings of `prompts` by all encoders of `parts`, one encoder after the other."""
    shares = {
        name: family.encode_with(name, parts, prompts, text, negative=negative)
        for name in family.card.text_encoders
    }
    return [
        family.join_text({name: of[index] for name, of in shares.items()})
        for index in range(len(prompts))
    ]


def sample(
    family: Family,
    parts: Mapping[str, Any],
    positive: TextEmbedding,
    negative: TextEmbedding,
    **options: Any,
) -> Image.Image:
    """A picture by the stock pipeline's own steps; `options` are those of `Family.denoise`."""
    return to_picture(family, parts, draw(family, parts, positive, negative, **options))


@torch.no_grad()
def draw(
    family: Family,
    parts: Mapping[str, Any],
    positive: TextEmbedding,
    negative: TextEmbedding,
    **options: Any,
) -> Tensor:
    """The pixels of `sample`, (1, 3, H, W): what the memory of validation is simulated with."""
    latents = family.denoise(parts, positive, negative, **options)
    return family.decode(parts, latents)


def to_picture(family: Family, parts: Mapping[str, Any], pixels: Tensor) -> Image.Image:
    """Pixels (1, 3, H, W) from the VAE as the stock pipeline turns them into a picture."""
    processor = stock_pipeline(family.card, parts).image_processor
    picture: Image.Image = processor.postprocess(pixels, output_type="pil")[0]
    return picture


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


def padded(
    embeddings: Sequence[TextEmbedding], states: str, mask: str, length: int = 0
) -> dict[str, Tensor]:
    """A batch's `states` (B, tokens, channels) with zeros behind, and their `mask` (B, tokens) of
    0 and 1: as long as the longest, and at least `length`."""
    each = [embedding[states] for embedding in embeddings]
    counts = [tokens.shape[0] for tokens in each]
    positions = torch.arange(max(length, *counts), device=each[0].device)
    ends = torch.tensor(counts, device=each[0].device)[:, None]
    return {
        states: pad_tokens(each, len(positions)),
        mask: (positions < ends).long(),
    }


def zeros(
    card: FamilyCard,
    model: Model,
    size: tuple[int, int],
    count: int,
    text: Mapping[str, Tensor],
    device: torch.device,
) -> Batch:
    """A batch of `count` samples of the right shapes for pictures of `size` (width, height)."""
    channels = config_of(model, card.trained_component)["in_channels"] // card.packed**2
    factor = card.vae_factor(config_of(model, "vae"))
    shape = (count, channels, size[1] // factor, size[0] // factor)
    return Batch(
        latents=torch.zeros(shape, device=device),
        noise=torch.zeros(shape, device=device),
        sigmas=torch.full((count,), 0.5, device=device),
        text=text,
    )


def zero_text(
    card: FamilyCard, model: Model, count: int, text: Text, device: torch.device
) -> dict[str, Tensor]:
    """Embeddings of `count` prompts of full length, as the card says their shapes; and the guidance
    of a model that is told one."""
    configs = {name: config_of(model, name) for name in model.configs}
    shapes = card.embedding_shapes(configs, text.max_length)
    told = {name: torch.zeros(count, *each, device=device) for name, each in shapes.items()}
    if card.told_guidance(configs[card.trained_component]):
        told["guidance"] = torch.ones(count, device=device)
    return told


def cpu_generator(seed: int) -> torch.Generator:
    """A generator on the CPU, as a person gives it to a pipeline."""
    return torch.Generator("cpu").manual_seed(seed)


def base_folder(model: Model, names: Sequence[str]) -> Path:
    """The folder with the base's components `names`, downloaded if it is not in the hub's cache:
    those that have no file of their own."""
    if model.local:
        return Path(model.base)
    from huggingface_hub import snapshot_download

    wanted = [name for name in names if component_of(model, name).file is None]
    patterns = ["model_index.json", *(f"{name}/*" for name in wanted)]
    return Path(
        snapshot_download(model.base, revision=model.revision or None, allow_patterns=patterns)
    )


def copy_component(model: Model, name: str, source: Path, folder: Path) -> bool:
    """Write a component that is not trained into `folder` as the base has it: from the base's
    folder `source`, or from its own file, in the number format that it has there. False if the base
    has none."""
    part = next((part for part in model.components if part.name == name), None)
    if part is not None and part.file is not None:
        cls, library = component_class(model, name)
        card, file = FAMILIES[model.family], Path(part.file)
        dtype, config = stored_dtype(card, name, file), config_of(model, name)
        loaded: Any = translated(card, name, cls, library, file, config, dtype)
        loaded.save_pretrained(folder / name)
        return True
    if not (source / name).is_dir():
        return False
    shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    if told := _restated(model, name):
        place = folder / name / "scheduler_config.json"
        config = json.loads(place.read_text(encoding="utf-8"))
        if config != config | told:
            place.write_text(json.dumps(config | told, indent=2) + "\n", encoding="utf-8")
    return True
