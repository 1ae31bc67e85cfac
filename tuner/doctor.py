"""`tuner doctor`: what this machine is, and whether it can run anything at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.exits import DONE, UNFIT
from tuner.formats import size
from tuner.layout import section
from tuner.screen import out
from tuner.shelf import shelf, shipped_recipes

FORMAT_VERSION = 1
NEEDED = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


def show_machine(*, as_json: bool) -> int:
    """The machine's facts on stdout; 0 if it can run recipes, else 3."""
    from compiler.families import FAMILIES
    from runtime.machine import facts

    found = facts(Path.cwd(), deep=True)
    found["families"] = sorted(FAMILIES)
    found["recipes"] = _recipe_names()
    found["problems"] = problems(found)
    found["fit"] = not found["problems"]
    if as_json:
        out(json.dumps({"format_version": FORMAT_VERSION} | found, indent=2))
    else:
        out(text(found))
    return DONE if found["fit"] else UNFIT


def problems(found: Mapping[str, Any]) -> list[str]:
    """What keeps this machine from running any recipe, a sentence each."""
    missing = [name for name in NEEDED if name not in found["versions"]]
    lines = [f"{name} is not installed: `pip install {name}`" for name in missing]
    torch = found["torch"]
    if "error" in torch and "torch" not in missing:
        lines.append(torch["error"])
    if found["cuda"] and not torch.get("cuda") and "error" not in torch:
        names = ", ".join(gpu["name"] for gpu in found["cuda"])
        lines.append(f"{names} is there, but the installed torch {torch['version']} can't use it")
    return lines


def text(found: Mapping[str, Any]) -> str:
    """The facts as text of at most 80 columns."""
    versions, machine, disk = found["versions"], found["machine"], found["disk"]
    packages = ", ".join(f"{name} {v}" for name, v in versions.items() if name != "python")
    rows = [
        ("python", f"{versions['python']} on {found['platform']}"),
        ("packages", packages or "none of those that training needs"),
        ("device", _device(machine)),
        *(("cuda", _gpu(gpu)) for gpu in found["cuda"]),
        ("memory", _room(machine["host_free_bytes"], machine["host_total_bytes"])),
        ("disk", f"{_room(disk['free_bytes'], disk['total_bytes'])} at {disk['folder']}"),
        ("families", ", ".join(found["families"])),
        ("recipes", ", ".join(found["recipes"]) or "none"),
    ]
    lines = [line for name, words in rows for line in section(name, words)]
    verdict = [line for problem in found["problems"] for line in section("problem", problem)]
    return "\n".join([*lines, *(verdict or section("verdict", "fit to train"))])


def _device(machine: Mapping[str, Any]) -> str:
    name = f"{machine['device']}: {machine['device_name']}"
    formats = "bf16 in hardware" if machine["bf16"] else "no bf16 in hardware"
    return f"{name}, {machine['cores']} processor cores, {formats}"


def _gpu(gpu: Mapping[str, Any]) -> str:
    room = _room(gpu["free_bytes"], gpu["total_bytes"])
    return f"{gpu['name']}, {room}, capability {gpu['capability']}, driver {gpu['driver']}"


def _room(free: int, total: int) -> str:
    return f"{size(free)} free of {size(total)}"


def _recipe_names() -> list[str]:
    folder = shelf()
    return [str(path.relative_to(folder)) for path in shipped_recipes()] if folder else []
