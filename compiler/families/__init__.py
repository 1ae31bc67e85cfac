"""The families there are: one fact card each, without importing any library."""

from __future__ import annotations

from compiler.families import (
    flux,
    flux2,
    flux2_dev,
    kolors,
    lumina2,
    pixart,
    qwen_image,
    sana,
    sd,
    sd3,
    sdxl,
    sdxl_refiner,
    z_image,
)
from compiler.families.card import FamilyCard

FAMILIES: dict[str, FamilyCard] = {
    "sana": sana.CARD,
    "sd3": sd3.CARD,
    "sd": sd.CARD,
    "flux": flux.CARD,
    "flux2": flux2.CARD,
    "flux2_dev": flux2_dev.CARD,
    "sdxl": sdxl.CARD,
    "pixart": pixart.CARD,
    "lumina2": lumina2.CARD,
    "z_image": z_image.CARD,
    "qwen_image": qwen_image.CARD,
    "kolors": kolors.CARD,
    "sdxl_refiner": sdxl_refiner.CARD,
}
