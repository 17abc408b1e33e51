"""The formats of files, and a validator for the part of JSON Schema that they use."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

TYPES = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip
KEYWORDS = {
    "$schema", "$id", "$defs", "$ref", "title", "description", "type", "enum", "const", "pattern", "required",
    "properties", "additionalProperties", "items", "anyOf", "minimum",
}  # fmt: skip


@functools.cache
def load(name: str) -> dict[str, Any]:
    """A schema of `oracle/schema`, by file name."""
    return json.loads(resources.files("oracle").joinpath("schema", name).read_text())


def errors(value: Any, name: str, definition: str) -> Iterator[str]:
    """What is wrong with a value by a definition of a schema: "field: expected .., got .."; nothing if all is right."""
    root = load(name)
    yield from errors_at(value, root["$defs"][definition], root, "")


def errors_at(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str) -> Iterator[str]:
    if unknown := set(schema) - KEYWORDS:
        raise NotImplementedError(f"schema: keywords {sorted(unknown)} are not known to this validator")
    if "$ref" in schema:
        yield from errors_at(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, at)
        return
    where, got = at or "value", json.dumps(value, default=str)[:80]
    if "anyOf" in schema:
        if not any(not list(errors_at(value, option, root, at)) for option in schema["anyOf"]):
            yield f"{where}: expected one of {len(schema['anyOf'])} forms, got {got}"
        return
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        fits = any(
            isinstance(value, TYPES[k]) and not (k != "boolean" and isinstance(value, bool)) for k in kinds
        )
        if not fits:
            yield f"{where}: expected {' or '.join(kinds)}, got {got}"
            return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: expected one of {schema['enum']}, got {got}"
    if "const" in schema and value != schema["const"]:
        yield f"{where}: expected {schema['const']!r}, got {got}"
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        yield f"{where}: expected text like {schema['pattern']}, got {got}"
    if (
        "minimum" in schema
        and not isinstance(value, bool)
        and isinstance(value, int | float)
        and value < schema["minimum"]
    ):
        yield f"{where}: expected at least {schema['minimum']}, got {got}"
    if isinstance(value, dict):
        for field in schema.get("required", ()):
            if field not in value:
                yield f"{(at + '.') if at else ''}{field}: missing"
        known, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
        for field, part in value.items():
            inner = f"{at}.{field}" if at else field
            if field in known:
                yield from errors_at(part, known[field], root, inner)
            elif extra is False:
                yield f"{inner}: unknown field"
            elif isinstance(extra, dict):
                yield from errors_at(part, extra, root, inner)
    if isinstance(value, list) and "items" in schema:
        for number, part in enumerate(value):
            yield from errors_at(part, schema["items"], root, f"{at}[{number}]")
