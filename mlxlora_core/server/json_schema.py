"""JSON schemas as grammars: the part of the language that can be held letter by letter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from mlxlora_core.server.json_grammar import Grammar, Number, Quoted, Space, Text, Way
from mlxlora_core.server.json_values import has_values, kinds_of, listed, same, schema_fault, values_of

#: keywords that say nothing about which texts there are
_WORDS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_WORDS |= {"$schema", "$id", "$comment", "$defs", "definitions", "discriminator"}
#: keywords that are held, by the type that they belong to
_HELD = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
}
_SCALARS = ("string", "number", "integer", "boolean", "null")
_MOST_PARTS, _MOST_ITEMS, _MOST_LEVELS = 1000, 256, 32
_MOST_LETTERS = 2000
_MOST_OPEN = 64  # the time for a token grows with them, and others wait for it


@dataclass(frozen=True)
class _Part:
    """A part of a schema, read.

    Attributes:
        way: the texts of it.
        open: of how many alternatives it may be undecided at once which of them a text is.
    """

    way: Way
    open: int = 1


def grammar_of(schema: Any) -> tuple[Grammar, Way]:
    """A grammar, and the texts in it that hold to a schema.

    Objects have their properties in the order of the schema and, where any are named, no others.

    Raises:
        ProtocolError: a keyword that is not held, or one that makes no sense.
    """
    reader = _Reader(schema)
    whole = reader.read(schema, ())
    if whole.open > _MOST_OPEN:
        raise schema_fault(f"has {whole.open} alternatives that may begin alike, wanted up to {_MOST_OPEN}")
    return reader.grammar, whole.way


class _Reader:
    """Reads a schema, part by part."""

    def __init__(self, root: Any) -> None:
        self.grammar, self._root, self._parts = Grammar(), root, 0

    def read(self, schema: Any, path: tuple[str, ...]) -> _Part:
        """The texts of a part.

        Args:
            schema: the part.
            path: how it is reached; of a reference, what it names.
        """
        self._parts += 1
        if self._parts > _MOST_PARTS or len(path) > _MOST_LEVELS:
            raise schema_fault("has too many parts, or too many in each other")
        if schema is True or schema == {}:
            return _Part((self.grammar.any,))
        if not isinstance(schema, dict):
            raise schema_fault(f"has {json.dumps(schema)[:40]} where a schema is wanted")
        if "$ref" in schema:
            return self._referred(schema, path)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                self._check(schema, {name})
                parts = [self.read(each, (*path, name)) for each in listed(schema[name], name)]
                if name == "oneOf":
                    self._check_apart(schema[name])
                return self._one_of(parts)
        if has_values(schema):
            self._check(schema, {"enum", "const", "type"})
            return _Part((self.grammar.rule([(_text(value),) for value in values_of(schema)]),))
        return self._typed(schema, path)

    def _one_of(self, parts: Sequence[_Part]) -> _Part:
        """Texts of any of some parts."""
        return _Part((self.grammar.rule([part.way for part in parts]),), sum(part.open for part in parts))

    def _typed(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> _Part:
        self._check(schema, {"type"}.union(*_HELD.values()))
        kinds = schema.get("type", next((kind for kind, held in _HELD.items() if held & schema.keys()), None))
        if kinds is None:
            return _Part((self.grammar.any,))
        parts: list[_Part] = []
        for kind in [kinds] if isinstance(kinds, str) else listed(kinds, "type"):
            if kind == "object":
                parts.append(self._object(schema, path))
            elif kind == "array":
                parts.append(self._array(schema, path))
            elif kind in _SCALARS:
                parts += map(_Part, _scalars(kind))
            else:
                raise schema_fault(f"has the type {json.dumps(kind)[:40]}")
        return parts[0] if len(parts) == 1 else self._one_of(parts)

    def _object(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> _Part:
        known, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if (
            not isinstance(known, dict)
            or not isinstance(required, list)
            or not isinstance(others, bool | dict)
        ):
            raise schema_fault("has properties, required or additionalProperties of a wrong kind")
        lost = next((name for name in required if not isinstance(name, str) or name not in known), None)
        if lost is not None:
            raise schema_fault(f"requires {json.dumps(lost)[:40]}, which is not among its properties")
        if known:
            return self._properties(known, set(required), path)
        if others is False:
            return _Part((Text("{"), Space(), Text("}")))
        item = self.read(others, (*path, "others"))
        return _Part(self.grammar.several("{}", (Text('"'), Quoted(), *_COLON, *item.way)), item.open)

    def _properties(self, known: dict[str, Any], required: set[str], path: tuple[str, ...]) -> _Part:
        """Properties in their order, of which those that are not required may be left out."""
        # From the last one to the first: what is behind it where none came before, and where one did.
        first = later = self.grammar.rule([(Text("}"),)])
        parts = {name: self.read(part, (*path, name)) for name, part in known.items()}
        for name, part in reversed(parts.items()):
            item: Way = (_text(name), *_COLON, *part.way, Space(), later)
            left_out: tuple[list[Way], list[Way]] = ([], []) if name in required else ([(first,)], [(later,)])
            first = self.grammar.rule([item, *left_out[0]])
            later = self.grammar.rule([(Text(","), Space(), *item), *left_out[1]])
        return _Part((Text("{"), Space(), first), max(part.open for part in parts.values()))

    def _array(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> _Part:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        numbers = [number for number in (least, most) if number is not None]
        if not all(type(number) is int and 0 <= number <= _MOST_ITEMS for number in numbers):
            raise schema_fault(f"has minItems or maxItems that are no numbers up to {_MOST_ITEMS}")
        if most is not None and most < least:
            raise schema_fault("has a maxItems below its minItems")
        part = self.read(schema.get("items", True), (*path, "items"))
        item = self.grammar.rule([part.way])
        if not numbers or (not least and most is None):
            return _Part(self.grammar.several("[]", (item,)), part.open)
        end: Way = (Text("]"),)
        following: Way = (Text(","), Space(), item, Space())
        more = self.grammar.rule()
        self.grammar.define(more, [end, (*following, more)] if most is None else [end])
        for number in range(least if most is None else most, 0, -1):
            way: Way = (*(following if number > 1 else (item, Space())), more)
            more = self.grammar.rule([way, end] if number > least else [way])
        return _Part((Text("["), Space(), more), part.open)

    def _referred(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> _Part:
        name = schema["$ref"]
        self._check(schema, {"$ref"})
        if name in path:
            raise schema_fault(f"has the part {name} in itself")
        part = self._named(schema)
        if part is None or not str(name).startswith("#/"):
            raise schema_fault(f"refers to {json.dumps(name)[:80]}, which is not in it")
        return self.read(part, (*path, name))

    def _named(self, schema: Any) -> Any:
        """What a reference names; what is none is itself."""
        if not isinstance(schema, dict) or "$ref" not in schema:
            return schema
        part = self._root
        for step in str(schema["$ref"]).removeprefix("#").strip("/").split("/"):
            part = part.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(part, dict) else None
        return part

    def _check_apart(self, alternatives: Sequence[Any]) -> None:
        """Refuse alternatives of which exactly one is to hold where a value may hold to two."""
        if len(alternatives) > _MOST_OPEN:
            raise schema_fault(f"has more than {_MOST_OPEN} alternatives in a oneOf")
        for (i, one), (j, other) in combinations(enumerate(alternatives, 1), 2):
            if not self._are_apart(one, other):
                raise schema_fault(
                    f"has a oneOf whose alternatives {i} and {j} may hold at once: anyOf takes them"
                )

    def _are_apart(self, one: Any, other: Any) -> bool:
        """Whether no value holds to both of two parts, as values, types and required properties tell."""
        one, other = self._resolved(one), self._resolved(other)
        if not isinstance(one, dict) or not isinstance(other, dict):
            return False
        for part, against in ((one, other), (other, one)):
            for name in ("anyOf", "oneOf"):
                if name in part:
                    return all(self._are_apart(each, against) for each in part[name])
        if kinds_of(one).isdisjoint(kinds_of(other)):
            return True
        values = [{same(value) for value in values_of(part)} for part in (one, other) if has_values(part)]
        if len(values) == 2:
            return values[0].isdisjoint(values[1])
        return kinds_of(one) & kinds_of(other) == {"object"} and not values and self._differ(one, other)

    def _differ(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether a property that objects of two parts must have is apart in them."""
        both = set(one.get("required", ())) & set(other.get("required", ()))
        return any(self._are_apart(one["properties"][name], other["properties"][name]) for name in both)

    def _resolved(self, part: Any) -> Any:
        """What a reference names that may name another one."""
        while isinstance(part, dict) and "$ref" in part:
            part = self._named(part)
        return part

    @staticmethod
    def _check(schema: Mapping[str, Any], held: set[str]) -> None:
        """Refuse keywords that are not held."""
        for name in schema:
            if name not in held | _WORDS:
                raise schema_fault(f"has the keyword {name[:40]!r} here, which is not served")


_COLON: Way = (Space(), Text(":"), Space())


def _text(value: Any) -> Text:
    """A value as it is written: in ASCII, since tokens may have parts of other letters."""
    try:
        found = json.dumps(value, allow_nan=False)
    except ValueError:
        raise schema_fault("has a number that is too large") from None
    if len(found) > _MOST_LETTERS:
        raise schema_fault(f"has a value or a name of more than {_MOST_LETTERS} letters")
    return Text(found)


def _scalars(kind: str) -> list[Way]:
    if kind == "string":
        return [(Text('"'), Quoted())]
    if kind == "boolean":
        return [(Text("true"),), (Text("false"),)]
    return [(Text("null"),)] if kind == "null" else [(Number("", kind == "integer"),)]
