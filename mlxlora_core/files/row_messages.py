"""Messages of a row, whatever their keys are called: role, content, and calls of tools.

Which roles may follow each other is not asked here: that is for the form of
conversations of the model that is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlxlora_core.errors import MlxloraError, listing
from mlxlora_core.files.documents import parse_json
from mlxlora_core.files.jsonl import short

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "ipython"), "tool"),
}
#: texts that a message may have beside its content: of whom
_BESIDE = {
    "reasoning_content": "assistant",
    "reasoning": "assistant",
    "thinking": "assistant",
    "name": "tool",
    "tool_call_id": "tool",
}
_CALLS, _OLD_CALL = "tool_calls", "function_call"
_KEYS_TOLD = 6


class RowFault(ValueError):
    """Why something is no row.

    Attributes:
        fix: what to do about it, where that is known.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.fix = fix


class Reader:
    """Reads the messages of one row.

    Args:
        columns: which keys are read as role and content, where others are.

    Attributes:
        unread: what its messages hold that is not read.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = columns
        self.unread: set[str] = set()

    def said(self, name: str, messages: object) -> list[dict[str, Any]]:
        """The messages of a list.

        Raises:
            RowFault: they are none.
        """
        if not isinstance(messages, list) or not messages:
            raise RowFault(f"{name} is {kind(messages)}, wanted a list of at least one {{role, content}}")
        return [self._message(f"message {place}", each) for place, each in enumerate(messages, 1)]

    def _message(self, place: str, message: object) -> dict[str, Any]:
        """One message, whatever its keys are called."""
        if not isinstance(message, Mapping):
            raise RowFault(f"{place} is {kind(message)}, wanted {{role, content}}")
        old = message.get("from") is not None and message.get("role") is None
        role_key = self._columns.get("role", "from" if old else "role")
        content_key = self._columns.get("content", "value" if old else "content")
        if message.get(_OLD_CALL):
            raise RowFault(f"{place} has {_OLD_CALL}, wanted {_CALLS}: a list of {{type, function}}")
        calls = message.get(_CALLS)
        for key in (role_key, content_key):
            if key not in message and not (key == content_key and calls):
                raise RowFault(f"{place} has no {short(key)}; it has {keys(message)}")
        role = _role(place, message[role_key])
        content = message.get(content_key)
        read = {"role": role}
        if content is not None or not calls:
            read["content"] = _content(f"content of {place}", content)
        read |= _calls(place, role, calls) if calls else {}
        read |= {
            key: text(f"{key} of {place}", message[key])
            for key, whose in _BESIDE.items()
            if role == whose and message.get(key)
        }
        more = [key for key in message if key not in (role_key, content_key, *read) and holds(message[key])]
        self.unread |= {f"{short(str(key))} of messages" for key in more}
        return read


def _role(place: str, role: object) -> str:
    known = _ROLES.get(text(f"role of {place}", role).lower())
    if known is None:
        raise RowFault(f"role of {place} is {short(str(role))!r}, wanted system, user, assistant or tool")
    return known


def _calls(place: str, role: str, calls: object) -> dict[str, Any]:
    """The calls of tools in a message, as they are."""
    if role != "assistant":
        raise RowFault(f"{place} has {_CALLS} and is of {role}, wanted them of assistant")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowFault(f"{_CALLS} of {place} is {kind(calls)}, wanted a list of {{type, function}}")
    return {_CALLS: _as_json(f"{_CALLS} of {place}", calls)}


def tools(value: object) -> list[Any]:
    """The tools of a row: a list of JSON schemas, or JSON that says one; none where there is nothing.

    Raises:
        RowFault: it is something else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(text("tools", value).encode(), "tools")
        except MlxloraError as fault:
            raise RowFault(f"tools is a string that {fault.what}, wanted a list of schemas") from None
    if not holds(value):
        return []
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowFault(f"tools is {kind(value)}, wanted a list of schemas")
    return list(_as_json("tools", value))


def _as_json(name: str, value: object) -> Any:
    """A value of calls or schemas as a file of rows would hold it, whoever has handed it over.

    Raises:
        RowFault: JSON cannot say it, it holds half a surrogate pair, or is nested too deeply.
    """
    try:
        said = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise RowFault(f"{name} is nested too deeply") from None
    except (TypeError, ValueError) as fault:
        raise RowFault(f"{name} holds what is no JSON: {fault}") from None
    try:
        return parse_json(text(name, said).encode(), name)
    except MlxloraError as fault:
        raise RowFault(f"{name} {fault.what}") from None


def answered(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation, if it ends with an answer.

    Raises:
        RowFault: it does not.
    """
    if said[-1]["role"] != "assistant":
        raise RowFault(f"the last message is of {said[-1]['role']}, wanted an answer of assistant")
    return said


def _content(name: str, content: object) -> str:
    """The text of a message: a string, or a list of parts of text, which are joined."""
    if not isinstance(content, list):
        return text(name, content)
    if not content:
        raise RowFault(f"{name} is an empty list, wanted a string or a list of parts of text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or "text" not in part:
            what = f"of type {short(str(kind))!r}" if kind not in (None, "text") else "that is none of text"
            raise RowFault(f'{name} has a part {what}, and only {{"type": "text", "text": …}} can be read')
        texts.append(text(f"a part of {name}", part["text"]))
    return "".join(texts)


def text(name: str, value: object) -> str:
    """A string that can be written as UTF-8.

    Raises:
        RowFault: it is none.
    """
    if not isinstance(value, str):
        raise RowFault(f"{name} is {kind(value)}, wanted a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as fault:
            half = value[fault.start]
            raise RowFault(f"{name} holds half a surrogate pair ({half!r}), which is no character") from None
    return value


def holds(value: object) -> bool:
    """Whether something would be lost with a value."""
    return bool(value) if isinstance(value, str | list | dict) else value is not None


def kind(value: object) -> str:
    """The JSON type of a value, as one would say it."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object") if value != [] else "an empty list"


def keys(content: Mapping[Any, Any]) -> str:
    """The keys of an object in words."""
    if not content:
        return "no keys"
    return "the keys " + listing(map(named, content), _KEYS_TOLD)


def named(key: object) -> str:
    """A key in a message; one that is empty is seen, too."""
    return short(str(key)) or "''"
