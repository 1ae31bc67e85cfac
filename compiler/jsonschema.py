"""JSON Schema (draft-07) of the recipe, from its classes, for editors.

Draft-07 with `oneOf` and `const` is what taplo and tombi complete from. The compiler stays the
judge: a schema cannot say all it checks. Nothing here is imported by `plan` or `run`.
"""

import ast
import enum
import functools
import inspect
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import attrs

from compiler.kinds import (
    Field,
    Length,
    Range,
    fields_of,
    is_union,
    leaf_of,
    members,
    origin_of,
    shapes_of,
    tag_of,
)

_DRAFT = "http://json-schema.org/draft-07/schema#"
_PLAIN: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
_INT_KEY = "^-?(0|[1-9][0-9]*)$"
Schema = dict[str, Any]


def json_schema(cls: type, title: str = "", *, partial: bool = False) -> Schema:
    """JSON Schema of the tables that `cls` describes.

    `partial`: no key is required, as in a recipe that holds only differences from another one.

    Each class is a definition of its own name. Descriptions are the string literals under the
    fields. Raises TypeError for a type that a recipe cannot hold.
    """
    definitions: dict[str, Schema] = {}
    root = _table(cls, definitions)
    head: Schema = {"$schema": _DRAFT, "title": title or cls.__name__}
    whole = head | root | {"definitions": dict(sorted(definitions.items()))}
    return _partial(whole) if partial else whole


def _partial(schema: Any) -> Any:
    """A schema without required keys; kinds that only a required tag tells apart may then both fit,
    so `oneOf` becomes `anyOf`."""
    if isinstance(schema, dict):
        names = {"oneOf": "anyOf"}
        kept = {key: value for key, value in schema.items() if not _is_required(key, value)}
        return {names.get(key, key): _partial(value) for key, value in kept.items()}
    return [_partial(one) for one in schema] if isinstance(schema, list) else schema


def _is_required(key: str, value: Any) -> bool:
    return key == "required" and isinstance(value, list)  # a table: a property of that name


@functools.cache
def field_docs(cls: type) -> Mapping[str, str]:
    """The documentation of each field: `metadata["doc"]`, or the string literal under it."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if attrs.has(base):
            docs |= _literals_under_fields(base)
    given = {item.name: str(item.metadata.get("doc", "")) for item in attrs.fields(cls)}
    return docs | {name: doc for name, doc in given.items() if doc}


def _literals_under_fields(cls: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for line, below in zip(tree.body, tree.body[1:], strict=False):
        match line, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = inspect.cleandoc(text)
    return docs


def _table(cls: type, definitions: dict[str, Schema]) -> Schema:
    docs = field_docs(cls)
    fields = fields_of(cls)
    schema: Schema = {"type": "object", "additionalProperties": False}
    about = _class_doc(cls)
    if about:
        schema["description"] = about
    schema["properties"] = {
        field.key: _property(field, docs.get(field.name, ""), definitions) for field in fields
    }
    required = [field.key for field in fields if field.required]
    return schema | ({"required": required} if required else {})


def _class_doc(cls: type) -> str:
    """The docstring of a class; attrs puts none of its own."""
    return inspect.cleandoc(cls.__doc__ or "")


def _property(field: Field, doc: str, definitions: dict[str, Schema]) -> Schema:
    schema = _schema(field.type, definitions)
    unit = field.metadata.get("unit", "")
    about = f"{doc} Unit: {unit}.".strip() if unit else doc
    extra: Schema = {"description": about} if about else {}
    default = _default(field.default)
    if default is not None:
        extra["default"] = default
    if "$ref" in schema and extra:  # draft-07 ignores what stands beside $ref
        return {"allOf": [schema], **extra}
    return schema | extra


def _default(value: Any) -> Any:
    """A default as TOML would hold it; None where there is none to show."""
    if value is attrs.NOTHING or value is None:
        return None
    if leaf_of(type(value)) is not None:
        return str(value)
    if attrs.has(type(value)):
        return None
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _default(item) for key, item in value.items()}
    if isinstance(value, tuple | list | frozenset):
        items = [_default(item) for item in value]
        return None if None in items else items
    return value


def _schema(kind: Any, definitions: dict[str, Schema]) -> Schema:
    origin, args = origin_of(kind), get_args(kind)
    leaf = leaf_of(kind)
    if origin is Annotated:
        return _limited(_schema(args[0], definitions), args[0], args[1:])
    if is_union(kind):
        return _union(kind, definitions)
    if origin is Literal:
        return _choice(args)
    if leaf is not None:
        examples = {"examples": list(leaf.examples)} if leaf.examples else {}
        return {"type": "string", **examples}
    if attrs.has(kind):
        return _reference(kind, definitions)
    if origin in (tuple, list, frozenset):
        return _array(origin, args, definitions)
    if origin is dict:
        return _free_table(args, definitions)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _choice(tuple(item.value for item in kind))
    if kind is Any:
        return {}
    if kind not in _PLAIN:
        raise TypeError(f"a recipe cannot hold {kind!r}")
    return {"type": _PLAIN[kind]}


def _choice(values: tuple[Any, ...]) -> Schema:
    return {"const": values[0]} if len(values) == 1 else {"enum": list(values)}


def _limited(schema: Schema, kind: Any, limits: tuple[Any, ...]) -> Schema:
    for limit in limits:
        if isinstance(limit, Range):
            schema = _narrowed(schema, _bounds(limit), ("integer", "number"))
        elif isinstance(limit, Length):
            suffix = {"array": "Items", "table": "Properties"}.get(
                next(iter(shapes_of(kind)), ""), "Length"
            )
            bounds = {f"min{suffix}": limit.ge or None, f"max{suffix}": limit.le}
            schema = schema | {key: bound for key, bound in bounds.items() if bound is not None}
    return schema


def _narrowed(schema: Schema, bounds: Schema, names: tuple[str, ...]) -> Schema:
    """Bounds on the numbers of a schema, also within a union."""
    if "anyOf" in schema:
        return schema | {"anyOf": [_narrowed(one, bounds, names) for one in schema["anyOf"]]}
    return schema | bounds if schema.get("type") in names else schema


def _bounds(limit: Range) -> Schema:
    names = {
        "minimum": limit.ge,
        "exclusiveMinimum": limit.gt,
        "maximum": limit.le,
        "exclusiveMaximum": limit.lt,
    }
    return {name: bound for name, bound in names.items() if bound is not None}


def _union(kind: Any, definitions: dict[str, Schema]) -> Schema:
    options = members(kind)
    classes = [item for item in options if attrs.has(item) and leaf_of(item) is None]
    words = tuple(word for item in options if origin_of(item) is Literal for word in get_args(item))
    rest = [item for item in options if origin_of(item) is not Literal and item not in classes]
    schemas = [_schema(item, definitions) for item in rest]
    schemas += [_choice(words)] if words else []
    if len(classes) > 1:
        schemas += [_tagged(classes, definitions)]
    schemas += [_schema(item, definitions) for item in classes] if len(classes) == 1 else []
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _tagged(classes: list[type], definitions: dict[str, Schema]) -> Schema:
    """Tables told apart by their tag, which each of them then requires."""
    tag = tag_of(classes)
    schemas: list[Schema] = []
    for cls in classes:
        name = _reference(cls, definitions)["$ref"].rpartition("/")[2]
        if "anyOf" in definitions[name]:
            name = f"{name}Table"
        table = definitions[name]
        table["required"] = list(dict.fromkeys([str(tag), *table.get("required", ())]))
        schemas.append({"$ref": f"#/definitions/{name}"})
    shorts = [cls for cls in classes if getattr(cls, "__shorthand__", None) == tag]
    if not shorts:
        return {"oneOf": schemas}
    field_types = [field.type for cls in shorts for field in fields_of(cls) if field.key == tag]
    return {"oneOf": [*schemas, _choice(tuple(v for kind in field_types for v in get_args(kind)))]}


def _reference(cls: type, definitions: dict[str, Schema]) -> Schema:
    """A reference to a class's definition, made on first use."""
    name = cls.__name__
    if name not in definitions:
        definitions[name] = {}  # stops a class that holds itself
        table = _table(cls, definitions)
        short = next((f for f in fields_of(cls) if f.key == _shorthand(cls)), None)
        if short is None:
            definitions[name] = table
        else:
            definitions[f"{name}Table"] = table
            plain = _scalars(_schema(short.type, definitions))
            definitions[name] = {"anyOf": [plain, {"$ref": f"#/definitions/{name}Table"}]}
    return {"$ref": f"#/definitions/{name}"}


def _shorthand(cls: type) -> str:
    return str(getattr(cls, "__shorthand__", ""))


def _scalars(schema: Schema) -> Schema:
    """The part of a schema that is not a table or array."""
    if "anyOf" not in schema:
        return schema
    kept = [one for one in schema["anyOf"] if one.get("type") not in ("array", "object")]
    return {"anyOf": [one for one in kept if "$ref" not in one and "oneOf" not in one]}


def _array(origin: Any, args: tuple[Any, ...], definitions: dict[str, Schema]) -> Schema:
    if origin is tuple and args[-1:] != (...,):
        items = [_schema(item, definitions) for item in args]
        return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}
    unique = {"uniqueItems": True} if origin is frozenset else {}
    return {"type": "array", "items": _schema(args[0], definitions), **unique}


def _free_table(args: tuple[Any, ...], definitions: dict[str, Schema]) -> Schema:
    """A table with keys of the user's own."""
    key, value = args
    schema: Schema = {"type": "object", "additionalProperties": _schema(value, definitions)}
    base = get_args(key)[0] if origin_of(key) is Annotated else key
    if base is int:
        schema["propertyNames"] = {"pattern": _INT_KEY}
    elif origin_of(base) is Literal:
        schema["propertyNames"] = {"enum": list(get_args(base))}
    return schema
