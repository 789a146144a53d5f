"""Values of a request, taken out of its JSON and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from mlxlora_core.errors import short
from mlxlora_core.server.faults import ProtocolError, bad_value


def parse_json(body: bytes) -> Mapping[str, Any]:
    """The object that a request's body holds.

    Raises:
        ProtocolError: it is no JSON, or no object.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError as fault:
        raise ProtocolError(400, "the body has lists and objects in each other too deep") from fault
    except ValueError as fault:  # UTF-8 and JSON alike
        raise ProtocolError(400, f"the body is no JSON: {fault}", code="invalid_json") from fault
    if not isinstance(found, dict):
        raise ProtocolError(400, f"the body is {_kind(found)}, wanted a JSON object", code="invalid_json")
    return found


class Values:
    """The fields of one request; null is as good as absent.

    Args:
        body: as :func:`parse_json` gives it.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def get(self, name: str) -> Any:
        """The value as it came, or None."""
        return self._body.get(name)

    def text(self, name: str) -> str | None:
        """A text."""
        found: str | None = self._of(name, str, "text")
        return found

    def flag(self, name: str) -> bool:
        """True or false; false where it is absent."""
        return bool(self._of(name, bool, "true or false"))

    def table(self, name: str) -> Mapping[str, Any] | None:
        """An object."""
        found: Mapping[str, Any] | None = self._of(name, dict, "an object")
        return found

    def whole(self, name: str, least: int, most: int | None = None) -> int | None:
        """A whole number in a range."""
        value = self._body.get(name)
        if value is None:
            return None
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int:
            raise bad_value(name, f"is {_kind(value)}, wanted a whole number")
        return int(self._within(name, value, least, most))

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number in a range."""
        value = self._body.get(name)
        if value is None:
            return None
        if type(value) not in (int, float) or value != value:
            raise bad_value(name, f"is {_kind(value)}, wanted a number")
        return float(self._within(name, value, least, most))

    def _of(self, name: str, kind: type, wanted: str) -> Any:
        value = self._body.get(name)
        if value is not None and not isinstance(value, kind):
            raise bad_value(name, f"is {_kind(value)}, wanted {wanted}")
        return value

    @staticmethod
    def _within(name: str, value: float, least: float, most: float | None) -> float:
        if value < least or (most is not None and value > most):
            upto = "" if most is None else f" to {most}"
            raise bad_value(name, f"is {short(value, 24)}, wanted {least}{upto or ' or more'}")
        return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _kind(value: Any) -> str:
    """What a value is, in words."""
    words = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else words.get(type(value), "an object")
