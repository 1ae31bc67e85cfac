"""JSON Schema (draft-07) of what `tuner plan --json` prints; `docs/plan.schema.json` is its output.

Made from the plan's own classes, so that it can't fall behind; only what the JSON adds to them is
said here. Fields may be added later, so a reader must not refuse unknown ones.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import attrs

from compiler import plan
from compiler.costs import Duration, Hidden, Skipped
from compiler.jsonschema import field_docs
from tuner.plan_json import LISTED

Schema = dict[str, Any]
INT: Schema = {"type": "integer"}
TEXT: Schema = {"type": "string"}
MAYBE_INT: Schema = {"type": ["integer", "null"]}
MAYBE_NUMBER: Schema = {"type": ["number", "null"]}
PLAIN: Mapping[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


def plan_schema() -> Schema:
    """The schema, with a definition for every class of the plan."""
    definitions: dict[str, Schema] = {}
    properties = _head() | _from_plan(definitions) | _costs(definitions)
    always = ("format_version", "valid", "diagnostics", "warnings")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "What `tuner plan --json` prints",
        "description": "Bytes are bytes, a step is one optimizer update. Without a plan (`valid` "
        "is false) only the first four keys are there.",
        "type": "object",
        "properties": properties,
        "required": list(always),
        "if": {"properties": {"valid": {"const": True}}},
        "then": {"required": sorted(properties)},
        "definitions": dict(sorted(definitions.items())),
    }


def _head() -> dict[str, Schema]:
    fault = {"$ref": "#/definitions/Diagnostic"}
    return {
        "format_version": {"const": 1},
        "valid": {"type": "boolean", "description": "Whether there is a plan."},
        "diagnostics": {"type": "array", "items": fault},
        "warnings": {
            "type": "array",
            "items": fault,
            "description": "Those of the diagnostics that are warnings.",
        },
    }


def _from_plan(definitions: dict[str, Schema]) -> dict[str, Schema]:
    hints = typing.get_type_hints(plan.Plan)
    names = (
        "name seed run_folder cache_folder device model adapter text_training embeddings precision "
        "speed text sources buckets sharing "
        "optimizer objective sprint max_grad_norm ema guard decisions track track_project publish "
        "steps "
        "schedule checkpoints validation evaluation memory vae_batch"
    )
    found = {name: _of(hints[name], definitions) for name in names.split()}
    _add(definitions, "Model", parameters=_object(total=MAYBE_INT, trainable=MAYBE_INT))
    point = _object(step=INT, lr={"type": "number"})
    _add(definitions, "Schedule", points={"type": "array", "items": point})
    for name in ("Checkpoints", "Validation", "Evaluation"):
        at = {"type": "array", "items": INT}
        at["description"] = f"Steps after which it happens, the first {LISTED:,}."
        _add(definitions, name, at=at, times=INT)
    phase: Schema = {"type": ["string", "null"]}
    _add(definitions, "Memory", peak_bytes=MAYBE_INT, peak_phase=phase)
    _add(definitions, "Memory", activation_checkpointing=INT)
    definitions["Diagnostic"] = _diagnostic()
    digest = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
    return found | {"digest": digest, "result": TEXT | {"description": "Folder of the result."}}


def _costs(definitions: dict[str, Schema]) -> dict[str, Schema]:
    disk = dict.fromkeys(
        [
            "checkpoint_bytes",
            "result_bytes",
            "free_bytes",
            "cache_free_bytes",
            "one_checkpoint_bytes",
        ],
        MAYBE_INT,
    )
    disk |= dict.fromkeys(
        ["cache_bytes", "latents_bytes", "texts_bytes", "pictures_bytes", "checkpoints"], INT
    )
    counted = _object(total=INT, cached=INT, missing=INT, unknown=INT)
    change = _object(key=TEXT, old=TEXT, new=TEXT)
    resume = _object(
        step=INT,
        of=INT,
        finished={"type": "boolean"},
        differs={"type": "array", "items": change},
        problem=TEXT,
    )
    skipped = {"type": "array", "items": _of(Skipped, definitions)}
    return {
        "skipped": skipped | {"description": "Images that are left out, and why."},
        "hidden": {"type": "array", "items": _of(Hidden, definitions)},
        "disk": _nullable(_object(**disk), "All that a run writes, from nothing; what is free."),
        "duration": _nullable(_duration(definitions), "What is left of a begun run stands apart."),
        "cached": _nullable(_object(texts=counted, latents=counted), "What is there already."),
        "resume": _nullable(resume, "What a run would go on from; null where none has begun."),
    }


def _diagnostic() -> Schema:
    place = _object(line=INT, character=INT)
    where = (
        "As in the Language Server Protocol: `line` and `character` count from 0, `character` in "
        "UTF-16 code units; null where no file is to blame."
    )
    return _object(
        code=TEXT,
        severity={"enum": ["error", "warning", "note"]},
        message=TEXT,
        help=TEXT,
        path=TEXT | {"description": "Dotted key to blame."},
        file={"type": ["string", "null"], "description": "As given; --set for an override."},
        start=_nullable(place, where),
        end=_nullable(place, "Behind the last character. " + where),
    )


def _duration(definitions: dict[str, Schema]) -> Schema:
    """With a null in place of every figure, `why` says why there is none."""
    hints = typing.get_type_hints(Duration)
    known = {name: _of(hint, definitions) for name, hint in hints.items()}
    known["basis"] = {"enum": [*known["basis"]["enum"], None]}
    extra = {"total_seconds": MAYBE_NUMBER, "left_seconds": MAYBE_NUMBER}
    return {
        "type": "object",
        "properties": known | extra,
        "required": ["basis", "left_seconds", "total_seconds", "why"],
    }


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": sorted(properties)}


def _nullable(schema: Schema, description: str) -> Schema:
    return {"oneOf": [schema, {"type": "null"}], "description": description}


def _add(definitions: dict[str, Schema], name: str, **properties: Schema) -> None:
    """Further required properties of a definition."""
    definition = definitions[name]
    definition["properties"] |= properties
    definition["required"] = sorted({*definition["required"], *properties})


def _of(hint: Any, definitions: dict[str, Schema]) -> Schema:
    """The schema of a type hint of the plan's classes."""
    if hint is Any:
        return {}
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if attrs.has(hint):
        return _reference(hint, definitions)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is tuple:
        return _array(inner, definitions)
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(inner[1], definitions)}
    assert origin in (types.UnionType, typing.Union), hint
    parts = [{"type": "null"} if part is type(None) else _of(part, definitions) for part in inner]
    return {"oneOf": parts}


def _array(inner: tuple[Any, ...], definitions: dict[str, Schema]) -> Schema:
    found: Schema = {"type": "array", "items": _of(inner[0], definitions)}
    if inner[-1] is not Ellipsis:
        found |= {"minItems": len(inner), "maxItems": len(inner)}
    return found


def _reference(cls: Any, definitions: dict[str, Schema]) -> Schema:
    name = cls.__name__
    if name not in definitions:
        hints, docs = typing.get_type_hints(cls), field_docs(cls)
        properties = {}
        for field in attrs.fields(cls):
            note = {"description": docs[field.name]} if docs.get(field.name) else {}
            properties[field.name] = _of(hints[field.name], definitions) | note
        required = sorted(f.name for f in attrs.fields(cls))
        definitions[name] = {
            "type": "object",
            "description": " ".join((cls.__doc__ or "").split()),
            "properties": properties,
            "required": required,
        }
    return {"$ref": f"#/definitions/{name}"}
