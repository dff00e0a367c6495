"""The smallest JSON that a JSON schema allows: what the emulated model writes when its output is constrained."""

from __future__ import annotations

from typing import Any


class SchemaError(Exception):
    """The schema asks for something that cannot be written; the message names it."""


_TYPES = {"object", "array", "string", "integer", "number", "boolean", "null"}


def minimal(schema: Any, root: Any = None) -> Any:
    """A value that `schema` accepts, with every property that it names. Raises SchemaError for an unknown type."""
    root = schema if root is None else root
    if not isinstance(schema, dict):
        return {}
    if "$ref" in schema:
        return minimal(_resolve(schema["$ref"], root), root)
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return minimal(schema[key][0], root)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = kind[0]
    if kind not in _TYPES:
        raise SchemaError(str(kind))
    match kind:
        case "object":
            return {name: minimal(part, root) for name, part in schema.get("properties", {}).items()}
        case "array":
            return [minimal(schema.get("items", {}), root) for _ in range(schema.get("minItems", 0))]
        case "string":
            return "Paris".ljust(schema.get("minLength", 0), "s")[: schema.get("maxLength")]
        case "integer" | "number":
            return schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
        case "boolean":
            return True
    return None


def _resolve(reference: str, root: Any) -> Any:
    for part in reference.removeprefix("#").strip("/").split("/"):
        root = root.get(part, {}) if part and isinstance(root, dict) else root
    return root
