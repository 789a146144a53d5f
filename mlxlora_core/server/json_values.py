"""What JSON schemas say of values: of which types they are, which are listed, which are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlxlora_core.server.faults import ProtocolError

KINDS = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_MOST_LISTED = 1000


def schema_fault(words: str) -> ProtocolError:
    """The error of a schema that cannot be held."""
    return ProtocolError(
        400, f"the schema of 'response_format' {words}", code="invalid_json_schema", param="response_format"
    )


def listed(value: Any, name: str) -> Sequence[Any]:
    """The list under a keyword.

    Raises:
        ProtocolError: it is none, or has nothing or too much in it.
    """
    if not isinstance(value, list) or not value or len(value) > _MOST_LISTED:
        raise schema_fault(f"has no list of 1 to {_MOST_LISTED} under {name}")
    return value


def has_values(schema: Mapping[str, Any]) -> bool:
    """Whether a schema lists its values."""
    return "const" in schema or "enum" in schema


def values_of(schema: Mapping[str, Any]) -> Sequence[Any]:
    """The values that a schema lists, those that hold to all that it says.

    Raises:
        ProtocolError: there is none.
    """
    found = [schema["const"]] if "const" in schema else listed(schema["enum"], "enum")
    if "const" in schema and "enum" in schema:
        among = {same(value) for value in listed(schema["enum"], "enum")}
        found = [value for value in found if same(value) in among]
    if "type" in schema:
        kinds = kinds_of({"type": schema["type"]})
        found = [value for value in found if _kind(value) in kinds]
    if not found:
        raise schema_fault("lists no value that holds to it")
    return found


def kinds_of(schema: Mapping[str, Any]) -> frozenset[str]:
    """The types that values of a schema may have; whole numbers are ``integer``, with ``number`` or without.

    Raises:
        ProtocolError: there is no such type.
    """
    if has_values(schema):
        return frozenset(map(_kind, values_of(schema)))
    if "type" not in schema:
        return KINDS
    kinds = schema["type"]
    found = [kinds] if isinstance(kinds, str) else listed(kinds, "type")
    odd = next((kind for kind in found if not isinstance(kind, str) or kind not in KINDS), None)
    if odd is not None:
        raise schema_fault(f"has the type {json.dumps(odd)[:40]}")
    return frozenset(found) | (frozenset({"integer"}) if "number" in found else frozenset())


def same(value: Any) -> str:
    """A text that is the same for values that JSON schemas take for the same: 1 and 1.0, but not true."""
    return json.dumps(_whole(value), sort_keys=True)


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _kind(value: Any) -> str:
    """The narrowest type of a value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"
