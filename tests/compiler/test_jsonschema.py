"""JSON Schema from the classes, and that it agrees with the compiler."""

import json
from typing import Any, ClassVar, Literal

import pytest
from attrs import frozen

from compiler.jsonschema import field_docs, json_schema
from tests.compiler.example import Lokr, Lora, Recipe


def test_head() -> None:
    schema = json_schema(Recipe, "tuner recipe")
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert schema["title"] == "tuner recipe"
    assert schema["description"] == "A recipe."
    assert schema["required"] == ["schema", "model", "source"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["schema"] == {
        "const": 1,
        "description": "Version of the language.",
    }
    assert json.loads(json.dumps(schema)) == schema


def test_tagged_union_is_one_of_const() -> None:
    schema = json_schema(Recipe)
    assert schema["properties"]["adapter"] == {
        "oneOf": [{"$ref": "#/definitions/Lora"}, {"$ref": "#/definitions/Lokr"}]
    }
    lora = schema["definitions"]["Lora"]
    assert lora["required"] == ["kind", "rank"]
    assert lora["properties"] == {
        "kind": {"const": "lora", "description": "Low-rank."},
        "rank": {"type": "integer", "minimum": 1, "description": "Rank of the update."},
        "alpha": {
            "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "auto"}],
            "description": 'Scale; "auto" is the rank.',
            "default": "auto",
        },
        "targets": {
            "type": "array",
            "items": {"type": "string"},
            "description": "Module name patterns.",
            "default": [],
        },
    }


def test_the_rest() -> None:
    definitions = json_schema(Recipe)["definitions"]
    train = definitions["Train"]["properties"]
    assert train["steps"] == {"type": "integer", "minimum": 1}
    assert train["batch_size"] == {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {
                "type": "object",
                "additionalProperties": {"type": "integer", "minimum": 1},
                "propertyNames": {"pattern": "^-?(0|[1-9][0-9]*)$"},
            },
        ],
        "default": 1,
    }
    assert train["mode"] == {"enum": ["quick", "exact"], "default": "exact"}
    assert train["every"]["default"] == "1 epoch"
    assert train["budget"]["anyOf"][1] == {"enum": ["auto", "none"]}
    assert train["compile"]["anyOf"] == [{"type": "boolean"}, {"const": "auto"}]
    assert train["optimizer"] == {"$ref": "#/definitions/Optimizer"}
    assert definitions["Optimizer"] == {
        "anyOf": [{"enum": ["adamw", "lion"]}, {"$ref": "#/definitions/OptimizerTable"}]
    }
    source = definitions["DataSource"]["properties"]
    assert source["size"]["minItems"] == source["size"]["maxItems"] == 2
    assert source["size"]["default"] == [512, 512]
    assert list(definitions["Captions"]["properties"]) == ["from", "dropout"]
    assert json_schema(Recipe)["properties"]["source"]["minItems"] == 1


def test_documentation() -> None:
    assert field_docs(Lora)["rank"] == "Rank of the update."
    assert field_docs(Lokr) == {"factor": "Size of a block."}
    factor = json_schema(Lokr)["properties"]["factor"]
    assert factor == {
        "type": "integer",
        "description": "Size of a block. Unit: rows.",
        "default": 8,
    }


def test_description_beside_a_reference() -> None:
    @frozen(kw_only=True)
    class Root:
        one: Lora
        """An adapter."""

    assert json_schema(Root)["properties"]["one"] == {
        "allOf": [{"$ref": "#/definitions/Lora"}],
        "description": "An adapter.",
    }


def test_shorthand_of_a_tagged_union() -> None:
    @frozen(kw_only=True)
    class A:
        __shorthand__: ClassVar[str] = "name"
        name: Literal["a"]

    @frozen(kw_only=True)
    class B:
        __shorthand__: ClassVar[str] = "name"
        name: Literal["b"]

    @frozen(kw_only=True)
    class Root:
        o: A | B

    assert json_schema(Root)["properties"]["o"] == {
        "oneOf": [
            {"$ref": "#/definitions/ATable"},
            {"$ref": "#/definitions/BTable"},
            {"enum": ["a", "b"]},
        ]
    }


def references(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(references, value))
    if not isinstance(value, dict):
        return set()
    own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
    return own.union(*map(references, value.values()))


def test_every_reference_leads_somewhere() -> None:
    schema = json_schema(Recipe)
    names = {reference.removeprefix("#/definitions/") for reference in references(schema)}
    assert names <= schema["definitions"].keys()


def test_types_no_recipe_can_hold() -> None:
    @frozen(kw_only=True)
    class Root:
        x: complex

    with pytest.raises(TypeError):
        json_schema(Root)
