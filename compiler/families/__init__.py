"""The families there are: one fact card each, without importing any library."""

from __future__ import annotations

from compiler.families import flux, pixart, sana, sd, sd3, sdxl
from compiler.families.card import FamilyCard

FAMILIES: dict[str, FamilyCard] = {
    "sana": sana.CARD,
    "sd3": sd3.CARD,
    "sd": sd.CARD,
    "flux": flux.CARD,
    "sdxl": sdxl.CARD,
    "pixart": pixart.CARD,
}
