"""The recipes that come with tuner."""

from __future__ import annotations

from pathlib import Path


def shelf() -> Path | None:
    """Their folder: in a wheel inside the package, in a checkout beside it."""
    package = Path(__file__).resolve().parent
    places = (package / "recipes", package.parent / "recipes")
    return next((place for place in places if place.is_dir()), None)


def presets() -> Path | None:
    """The folder of presets: what a recipe may extend, but no recipe by itself."""
    folder = shelf()
    return folder / "presets" if folder else None


def shipped_recipes() -> list[Path]:
    """All of them, by name."""
    folder = shelf()
    return sorted(folder.glob("*.toml")) if folder else []
