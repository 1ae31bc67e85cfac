"""`tuner schema`: the recipe language as JSON Schema, from which editors complete and check."""

from __future__ import annotations

import json
from pathlib import Path

from tuner.deliver import deliver

NAME = "recipe.schema.json"  # among the shipped recipes
DIRECTIVE = "#:schema"  # the comment on line 1 by which taplo and tombi find a schema


def write_schema(path: Path | None) -> int:
    """The schema to `path`, or to stdout."""
    return deliver(text(), path)


def text() -> str:
    """The schema of the recipe language of this version.

    It requires no key, because a recipe may extend another one; the compiler tells what is missing.
    """
    from compiler.jsonschema import json_schema
    from compiler.schema import Recipe

    return json.dumps(json_schema(Recipe, "tuner recipe", partial=True), indent=2) + "\n"
