"""What a row is: the shapes that people have, each turned into one of three plain ones.

The plain ones are ``{text}``, ``{prompt, completion}`` and ``{messages: [{role,
content}, ...]}``, the last with ``tools`` where the assistant has some; everything
behind this module knows no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlxlora_core.errors import listing, nearest
from mlxlora_core.files.jsonl import short
from mlxlora_core.files.row_messages import Reader, RowFault, answered, holds, keys, kind, named, text, tools

#: what a column can be read as, see :func:`parse_columns`
COLUMN_NAMES = (
    *("text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output"),
    *("system", "tools", "role", "content"),
)
WANTED = "text, prompt and completion, messages, conversations, or instruction and output"

_INSIDE = ("role", "content")  # the columns of a message, not of a row
#: pairs of columns that people ask and answer in, for the advice in a message
_ASKED = (
    *("question", "query", "instruction", "input", "inputs", "input_text", "user", "human", "problem"),
    *("source", "prompt", "q"),
)
_ANSWERED = (
    *("answer", "response", "output", "outputs", "output_text", "assistant", "bot", "solution", "target"),
    *("targets", "target_text", "completion", "chosen", "a"),
)
_TALKS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_TEXTS = ("text", "content", "body", "document", "sentence")


@dataclass(frozen=True)
class PlainRow:
    """A row as all that follows reads it.

    Attributes:
        content: of a plain shape, with the keys of that shape and no other.
        form: the shape that it came in, where that was another.
        unread: the keys that hold something and are not read.
    """

    content: dict[str, Any]
    form: str = ""
    unread: tuple[str, ...] = ()


def parse_columns(texts: Iterable[str]) -> dict[str, str]:
    """``prompt=question`` texts as what is read -> the column that it is read from.

    Raises:
        ValueError: a text that is no such thing, a name that there is not, or one that is there twice.
    """
    columns: dict[str, str] = {}
    for each in texts:
        name, equals, column = (part.strip() for part in each.partition("="))
        if not equals or not column:
            raise ValueError(f"wanted NAME=COLUMN such as prompt=question, got {short(each)!r}")
        if name not in COLUMN_NAMES:
            hint = nearest(name, COLUMN_NAMES)
            raise ValueError(
                f"nothing is read as {short(name)!r} ({hint}there is {listing(COLUMN_NAMES, 20)})"
            )
        if name in columns:
            raise ValueError(f"{name} is read from two columns, {short(columns[name])} and {short(column)}")
        columns[name] = column
    return columns


def read_row(value: object, columns: Mapping[str, str] | None = None) -> PlainRow:
    """A row of any of the shapes as a plain one.

    Args:
        value: what a line, an element or a caller holds.
        columns: as :func:`parse_columns` gives them. Where there are some of a row, only shapes
            with one of them are looked for.

    Raises:
        RowFault: it is no row, or one that could be read in two ways.
    """
    if not isinstance(value, Mapping):
        raise RowFault(f"is {kind(value)}, wanted an object with {WANTED}")
    columns = columns or {}
    outer = {name: column for name, column in columns.items() if name not in _INSIDE}
    row = _renamed(value, outer) if outer else value
    shape = _shape_of(row, value, outer)
    reading = _Reading(columns)
    content = shape.read(reading, row)
    form = "" if content.keys() - {"tools"} == shape.needs else " and ".join(shape.keys)
    unread = _unread(value, shape, outer) if len(value) > len(shape.keys) else []
    return PlainRow(content, form, (*unread, *sorted(reading.unread)))


def check_content(content: object) -> str | None:
    """Why ``content`` is no row, or None when it is one."""
    try:
        read_row(content)
    except RowFault as fault:
        return str(fault)
    return None


def _renamed(value: Mapping[Any, Any], outer: Mapping[str, str]) -> dict[Any, Any]:
    """A row with its columns named as they are read; what hides behind such a name is left out."""
    taken = {*outer.values()}
    row = {key: held for key, held in value.items() if key not in taken and key not in outer}
    return row | {name: value[column] for name, column in outer.items() if column in value}


def _unread(value: Mapping[Any, Any], shape: _Shape, outer: Mapping[str, str]) -> list[str]:
    """The keys of a row that hold something, and that its shape has not read."""
    read = {*shape.keys, *shape.beside}
    columns = {name: column for name, column in outer.items() if name in read}
    read = (read - columns.keys()) | {*columns.values()}
    return [named(key) for key, held in value.items() if key not in read and holds(held)]


def _shape_of(row: Mapping[str, Any], value: Mapping[str, Any], outer: Mapping[str, str]) -> _Shape:
    """The one shape that a row has, its columns named as they are read."""
    asked = [shape for shape in _SHAPES if outer.keys() & {*shape.keys, *shape.beside}] if outer else []
    found = [shape for shape in asked or _SHAPES if row.keys() >= shape.needs]
    if len(found) > 1:  # a table of rows of several shapes has null where a row is of another
        found = [shape for shape in found if all(row[key] is not None for key in shape.keys)] or found
    if len(found) == 1:
        return found[0]
    if found:
        names, key = ["/".join(shape.keys) for shape in found], found[0].keys[0]
        fix = f"say which one is meant, such as --columns {key}={outer.get(key, key)}"
        raise RowFault(f"has {' and '.join(names)}, wanted only one of these", fix)
    gone = [f"{short(column)} for {name}" for name, column in outer.items() if column not in value]
    if gone:
        raise RowFault(f"has no column {listing(gone)}; it has {keys(value)}")
    wanted = " or ".join(" and ".join(shape.keys) for shape in asked) or WANTED
    raise RowFault(f"needs {wanted}; it has {keys(value)}", "" if outer else _advice(value))


def _advice(value: Mapping[str, Any]) -> str:
    """Which columns could be meant, in the words of the option that says so."""
    names = {str(key).lower(): str(key) for key in value}

    def first(known: Sequence[str]) -> str | None:
        return next((names[name] for name in known if name in names), None)

    asked, answered = first(_ASKED), first(_ANSWERED)
    talk, text = first(_TALKS), first(_TEXTS)
    guess = "prompt=question,completion=answer"
    if names.get("instruction") == "instruction" and answered:
        guess = f"output={answered}" + (f",input={names['context']}" if "context" in names else "")
    elif asked and answered:
        guess = f"prompt={asked},completion={answered}"
    elif talk:
        guess = f"messages={talk}"
    elif text:
        guess = f"text={text}"
    return f"say which column is which, such as --columns {guess} (in a recipe: [data] options columns)"


def _conversation(said: list[dict[str, Any]], row: Mapping[str, Any]) -> dict[str, Any]:
    """A plain conversation, with the tools of its row."""
    found = tools(row.get("tools"))
    return {"messages": answered(said)} | ({"tools": found} if found else {})


class _Reading:
    """The reading of one row."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._messages = Reader(columns)

    @property
    def unread(self) -> set[str]:
        """What its messages hold that is not read."""
        return self._messages.unread

    def text(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A plain text."""
        return {"text": text("text", row["text"])}

    def pair(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Prompt and completion: two texts, or two lists of messages, which are one conversation."""
        lists = [isinstance(row[key], list) for key in ("prompt", "completion")]
        if not any(lists):
            if holds(row.get("tools")):
                raise RowFault("has tools beside prompt and completion as texts, wanted messages")
            return {key: text(key, row[key]) for key in ("prompt", "completion")}
        said = [self._messages.said(key, row[key]) for key in ("prompt", "completion")]
        return _conversation(said[0] + said[1], row)

    def talk(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A conversation, with a system text in it or beside it."""
        key = "messages" if "messages" in row else "conversations"
        said = self._messages.said(key, row[key])
        if row.get("system"):
            if said[0]["role"] == "system":
                raise RowFault(f"has system beside {key} that begin with one of system")
            said.insert(0, {"role": "system", "content": text("system", row["system"])})
        return _conversation(said, row)

    def instruction(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Instruction, input and output, in the words that Stanford Alpaca put them in."""
        asked, more = text("instruction", row["instruction"]), text("input", row.get("input") or "")
        told = ", paired with an input that provides further context" if more else ""
        parts = [
            f"Below is an instruction that describes a task{told}. "
            "Write a response that appropriately completes the request.",
            f"### Instruction:\n{asked}",
            *([f"### Input:\n{more}"] if more else []),
            "### Response:\n",
        ]
        for key in ("system", "history"):
            if row.get(key):
                raise RowFault(f"has {key} beside instruction and output, wanted such a row as messages")
        return {"prompt": "\n\n".join(parts), "completion": text("output", row["output"])}


@dataclass(frozen=True)
class _Shape:
    """A shape that people have.

    Attributes:
        keys: what a row of it must have.
        read: makes a plain row of one.
        beside: what it may have as well.
    """

    keys: tuple[str, ...]
    read: Callable[[_Reading, Mapping[str, Any]], dict[str, Any]]
    beside: tuple[str, ...] = ()

    @cached_property
    def needs(self) -> frozenset[str]:
        """The keys as a set."""
        return frozenset(self.keys)


_SHAPES = (
    _Shape(("text",), _Reading.text),
    _Shape(("prompt", "completion"), _Reading.pair, beside=("tools",)),
    _Shape(("messages",), _Reading.talk, beside=("system", "tools")),
    _Shape(("conversations",), _Reading.talk, beside=("system", "tools")),
    _Shape(("instruction", "output"), _Reading.instruction, beside=("input",)),
)
