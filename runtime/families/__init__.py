"""The families there are, by the name of their card; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from runtime.families.base import Family

MODULES = {
    "flux": "runtime.families.flux",
    "flux2": "runtime.families.flux2",
    "flux2_dev": "runtime.families.flux2_dev",
    "kolors": "runtime.families.kolors",
    "lumina2": "runtime.families.lumina2",
    "pixart": "runtime.families.pixart",
    "qwen_image": "runtime.families.qwen_image",
    "sana": "runtime.families.sana",
    "sd": "runtime.families.sd",
    "sd3": "runtime.families.sd3",
    "sdxl": "runtime.families.sdxl",
    "sdxl_refiner": "runtime.families.sdxl_refiner",
    "z_image": "runtime.families.z_image",
}


def family_of(name: str) -> Family:
    """The family called `name` in its card. Raises KeyError if there is none."""
    family: Family = import_module(MODULES[name]).FAMILY
    return family
