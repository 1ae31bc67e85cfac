"""Small recipes and folders to compile, made without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from compiler.compile import Compiled, compile_file
from compiler.families import FAMILIES
from compiler.machine import Machine
from compiler.memory import Candidate, Simulation
from compiler.plan import Phase

GIB = 2**30

MACHINE = Machine(
    device="cpu",
    device_name="a processor",
    device_total_bytes=16 * GIB,
    device_free_bytes=12 * GIB,
    host_total_bytes=16 * GIB,
    host_free_bytes=12 * GIB,
    cores=4,
    bf16=False,
)

GPU = Machine(
    device="cuda",
    device_name="a card",
    device_total_bytes=24 * GIB,
    device_free_bytes=23 * GIB,
    host_total_bytes=64 * GIB,
    host_free_bytes=60 * GIB,
    cores=8,
    bf16=True,
    capability="8.9",
)

RECIPE = """\
name = "try"

[model]
family = "sana"
base = "base"

[data]
resolution = 64

[[data.source]]
path = "pictures"
captions = { from = "instance", prompt = "a photo of sks dog" }

[train]
epochs = 2
batch_size = 2
optimizer = { lr = 1e-4 }
"""


class FixedMemory:
    """A memory model by formula: 8 GiB, less for every recomputed block."""

    def __init__(self) -> None:
        self.asked: list[Candidate] = []

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        self.asked.append(candidate)
        interval = candidate.layout.activation_checkpointing
        size = 8 * GIB if interval == 0 else 4 * GIB + interval * GIB // 4
        parts = {"weights": 2 * GIB, "activations": size - 2 * GIB}
        return Simulation(
            phases=(Phase(name="train", device_bytes=size, host_bytes=0, parts=parts),),
            parameters=1000,
            trainable=10,
            adapted_modules=2,
            flops=10**9,
            seconds=0.1,
        )


def make_base(folder: Path, family: str = "sana") -> Path:
    """The configurations of a pipeline folder, small, without weights."""
    card = FAMILIES[family]
    known = card.known[0]
    index = {name: ["diffusers", cls] for name, cls in card.components.items()}
    _write(folder / "model_index.json", {"_class_name": card.pipeline, **index})
    for name in card.components:
        (folder / name).mkdir()
        if name.startswith("tokenizer"):
            continue
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        _write(folder / name / file, dict(known.configs.get(name, {})))
    vae = dict(known.configs["vae"])
    key = "encoder_block_out_channels" if family == "sana" else "block_out_channels"
    vae[key] = [8, 16, 16, 16]  # 8 pixels a latent
    _write(folder / "vae" / "config.json", vae)
    return folder


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def make_pictures(folder: Path, sizes: Sequence[tuple[int, int]], caption: str = "") -> Path:
    """One plain picture per size, with a caption file where `caption` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number % 256, 80, 120)).save(folder / f"{number:03}.png")
        if caption:
            (folder / f"{number:03}.txt").write_text(caption, encoding="utf-8")
    return folder


def held_file(path: Path, family: str, base: str, *parts: str) -> Path:
    """A safetensors file with the header, and nothing else, of a published model in one file: those
    tensors that tell its components `parts` (all by default) apart."""
    card = FAMILIES[family]
    assert card.whole_file is not None
    known = next(known for known in card.known if known.base == base)
    header = {
        layout.prefix + name: {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]}
        for part in parts or card.whole_file.parts
        for layout in card.whole_file.parts[part]
        for name, shape in layout.probes(known.configs[part]).items()
        if shape is not None
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def project(folder: Path, recipe: str = RECIPE, family: str = "sana") -> Path:
    """A folder with a base, five pictures and the recipe; returns the recipe's path."""
    make_base(folder / "base", family)
    make_pictures(folder / "pictures", [(64, 64)] * 5)
    path = folder / "recipe.toml"
    path.write_text(recipe, encoding="utf-8")
    return path


def compiled(path: Path, *overrides: str, machine: Machine = MACHINE, **rest: object) -> Compiled:
    """The recipe at `path` compiled on `machine`."""
    cache = path.parent / "cache"
    return compile_file(path, overrides=overrides, machine=machine, cache_default=cache, **rest)  # type: ignore[arg-type]


def codes(result: Compiled) -> list[str]:
    """The diagnostics' codes, in order."""
    return [fault.code for fault in result.diagnostics]
