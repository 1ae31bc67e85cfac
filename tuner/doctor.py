"""`tuner doctor`: what this machine is, whether it can run anything, and which recipes fit it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.exits import DONE, REFUSED, UNFIT
from tuner.formats import size
from tuner.layout import columns, section
from tuner.screen import err, out
from tuner.shelf import shelf, shipped_recipes

FORMAT_VERSION = 1
NEEDED = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
SPILL = (
    "Windows moves device memory that does not fit to the host's without a word, and a step then "
    "takes tens of times longer: in NVIDIA's control panel set `CUDA - Sysmem Fallback Policy` to "
    "`Prefer No Sysmem Fallback`"
)


def show_machine(*, recipe: Path | None = None, as_json: bool = False, online: bool = False) -> int:
    """The machine's facts on stdout; 0 if it can run recipes (or `recipe`), else 3.

    A `recipe` that is wrong by itself gives 2. Nothing goes to the network unless `online`.
    """
    found = examined(online=online)
    code = DONE if found["fit"] else UNFIT
    if recipe is not None:
        code = _judge_one(recipe, found) or code
    elif found["fit"]:
        found["fits"] = _judge_shipped(found)
    if as_json:
        out(json.dumps({"format_version": FORMAT_VERSION} | found, indent=2))
    else:
        out(text(found))
    return code


def examined(*, online: bool) -> dict[str, Any]:
    """All facts, and what keeps this machine from running recipes."""
    from compiler.families import FAMILIES
    from compiler.home import default_cache
    from runtime import checkup
    from runtime.machine import compiler, facts
    from runtime.segments import spills

    found = facts(default_cache(), deep=True)
    found["families"] = sorted(FAMILIES)
    found["recipes"] = _recipe_names()
    found["features"] = checkup.features(found["machine"]["capability"])
    found["distributed"] = checkup.distributed()
    found["compiler"] = compiler()
    found["extras"] = checkup.extras()
    found["open_files"] = checkup.open_files()
    found["disk"] |= checkup.disk_speed(default_cache())
    found["hub"] = {"token": checkup.has_token()}
    if online:
        found["hub"]["problem"] = checkup.hub_answers()
    found["notes"] = notes(found, checkup.bad_versions(found["versions"]), spills())
    found["problems"] = problems(found)
    found["fit"] = not found["problems"]
    return found


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


def notes(found: Mapping[str, Any], bad: list[str], spills: bool) -> list[str]:
    """What is worth knowing and keeps nobody from running, a sentence each."""
    from runtime.checkup import FEW_FILES

    lines = list(bad)
    if not found["compiler"]:
        lines.append("no C++ compiler: torch.compile and low-bit optimizers will not work")
    limit = found["open_files"]
    if limit is not None and limit < FEW_FILES:
        lines.append(f"only {limit} files may be open at once: raise it with `ulimit -n 4096`")
    if "error" in found["disk"]:
        lines.append(f"the cache's disk can't be tried: {found['disk']['error']}")
    if spills and found["cuda"]:
        lines.append(SPILL)
    if found["hub"].get("problem"):
        lines.append(found["hub"]["problem"])
    return lines


def text(found: Mapping[str, Any]) -> str:
    """The facts as text of at most 80 columns."""
    versions, machine, disk = found["versions"], found["machine"], found["disk"]
    packages = ", ".join(f"{name} {v}" for name, v in versions.items() if name != "python")
    extras = ", ".join(name for name, v in found["extras"].items() if not v)
    rows = [
        ("python", f"{versions['python']} on {found['platform']}"),
        ("packages", packages or "none of those that training needs"),
        *([("lacking", f"{extras} (optional)")] if extras else []),
        ("device", _device(machine)),
        *(("cuda", _gpu(gpu)) for gpu in found["cuda"]),
        *([("offers", _flags(found["features"]))] if found["features"] else []),
        *([("allocator", found["allocator"])] if found["cuda"] and found["allocator"] else []),
        ("memory", _room(machine["host_free_bytes"], machine["host_total_bytes"])),
        ("disk", _disk(disk)),
        ("tools", _tools(found)),
        ("hub", _hub(found["hub"])),
        ("families", ", ".join(found["families"])),
    ]
    lines = [line for name, words in rows for line in section(name, words)]
    lines += _fits(found)
    lines += [line for note in found["notes"] for line in section("note", note)]
    verdict = [line for problem in found["problems"] for line in section("problem", problem)]
    return "\n".join([*lines, *(verdict or section("verdict", "fit to train"))])


def _fits(found: Mapping[str, Any]) -> list[str]:
    """The recipes, one a row."""
    if "fits" not in found:
        return section("recipes", ", ".join(found["recipes"]) or "none")
    marks = {True: "fits", False: "does not fit", None: "unknown"}
    rows = [(row["recipe"], marks[row["fits"]], row["words"]) for row in found["fits"]]
    return ["recipes", *columns(rows)]


def _judge_shipped(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    from attrs import asdict

    from tuner.doctor_recipes import judge_all

    return [asdict(row) for row in judge_all(shipped_recipes(), found["machine"]["device"])]


def _judge_one(recipe: Path, found: dict[str, Any]) -> int:
    """Judge `recipe`; what is wrong with it goes to stderr. 0 if nothing is."""
    from attrs import asdict

    from tuner.compiling import compile_here, exit_code, show_diagnostics
    from tuner.doctor_recipes import WHAT_IS_FREE, judged

    compiled = compile_here(recipe, [WHAT_IS_FREE])
    row = judged(recipe.name, compiled, found["machine"]["device"])
    found["fits"] = [asdict(row)]
    code = exit_code(compiled.diagnostics)
    if code != DONE:
        show_diagnostics(compiled.diagnostics, compiled, str(recipe))
    elif not row.fits:
        err(f"error: {recipe}: {row.words}")
    found["fit"] = found["fit"] and bool(row.fits)
    if not row.fits and code != REFUSED:
        found["problems"] = [*found["problems"], f"{recipe.name}: {row.words}"]
        return UNFIT
    return code


def _device(machine: Mapping[str, Any]) -> str:
    name = f"{machine['device']}: {machine['device_name']}"
    formats = "bf16 in hardware" if machine["bf16"] else "no bf16 in hardware"
    return f"{name}, {machine['cores']} processor cores, {formats}"


def _gpu(gpu: Mapping[str, Any]) -> str:
    room = _room(gpu["free_bytes"], gpu["total_bytes"])
    return f"{gpu['name']}, {room}, capability {gpu['capability']}, driver {gpu['driver']}"


def _flags(features: Mapping[str, bool]) -> str:
    return ", ".join(name if there else f"no {name}" for name, there in features.items())


def _disk(disk: Mapping[str, Any]) -> str:
    words = f"{_room(disk['free_bytes'], disk['total_bytes'])} at {disk['folder']}"
    if "write_bytes_per_second" in disk:
        write, read = disk["write_bytes_per_second"], disk["read_bytes_per_second"]
        words += f"; writes {size(write)}/s, reads {size(read)}/s"
    return words


def _tools(found: Mapping[str, Any]) -> str:
    ends = [name for name, there in found["distributed"].items() if there]
    files = found["open_files"]
    parts = [
        f"C++ compiler {found['compiler']}" if found["compiler"] else "no C++ compiler",
        f"back ends {', '.join(ends)}" if ends else "no back end for several devices",
        f"{files:,} open files" if files is not None else "no limit of open files",
    ]
    return "; ".join(parts)


def _hub(hub: Mapping[str, Any]) -> str:
    words = "a token is set" if hub["token"] else "no token is set"
    if "problem" not in hub:
        return f"{words}; not asked whether it answers (--online)"
    return f"{words}; {'it does not answer' if hub['problem'] else 'it answers'}"


def _room(free: int, total: int) -> str:
    return f"{size(free)} free of {size(total)}"


def _recipe_names() -> list[str]:
    folder = shelf()
    return [str(path.relative_to(folder)) for path in shipped_recipes()] if folder else []
