"""Documents in JSON and TOML: read whole and bounded, and held against a form.

Whatever stands in such a file, it becomes values that later work can stand,
or one line: no key is there twice, no number is infinite or none, nothing is
nested deeper than :data:`DEPTH`. JSON has no word for numbers that are not
finite, so that :func:`finite` puts null and a word in their place.
"""

from __future__ import annotations

import json
import math
import re
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mlxlora_core.errors import MlxloraError, ModelError, listing, short
from mlxlora_core.files.forms import UNSOUND, Form, sound
from mlxlora_core.files.input_file import read_whole

T = TypeVar("T")

DEPTH = 64  # of lists and objects in each other

_NAME_LETTERS = 80
_RECENT_SECONDS = 2.0  # a file that has changed since is perhaps being replaced
_PATIENCE_SECONDS = 0.5
_WORD = "_is"
_KEY = r"""(?:(?<![\w-])[\w-]++|"[^"]*+"|'[^']*+')"""
_LONG_KEY = re.compile(rf"{_KEY}(?:[ \t]*+\.[ \t]*+{_KEY}){{{DEPTH}}}")


def read_json(path: Path, limit_bytes: int, kind: type[MlxloraError] = ModelError) -> Any:
    """The value in a JSON file.

    Raises:
        MlxloraError: of ``kind``: as :func:`~mlxlora_core.files.input_file.read_whole`
            and :func:`parse_json`.
    """
    return parse_json(read_whole(path, limit_bytes, kind), path, kind)


def read_form(
    path: Path, form: Form, limit_bytes: int, kind: type[MlxloraError] = ModelError, fix: str = ""
) -> Any:
    """What a JSON file holds, which is all that ``form`` says.

    Raises:
        MlxloraError: of ``kind``: as :func:`read_json`, or it does not agree with the form.
    """
    return parse_form(read_whole(path, limit_bytes, kind), form, path, kind, fix)


def parse_form(
    data: bytes, form: Form, where: str | Path, kind: type[MlxloraError] = ModelError, fix: str = ""
) -> Any:
    """What JSON holds, which is all that ``form`` says.

    Raises:
        MlxloraError: of ``kind``: as :func:`parse_json`, or it does not agree with the form.
    """
    taken, faults = sound(form, parse_json(data, where, kind, fix))
    if faults:
        raise kind(f"is not what mlxlora writes: {listing(faults, 3)}", where=where, fix=fix)
    return taken


def read_sound(
    path: Path, form: Form, limit_bytes: int, kind: type[MlxloraError] = ModelError, fix: str = ""
) -> tuple[Any, list[str]]:
    """The part of a JSON file that agrees with ``form``, and what does not, in words.

    Raises:
        MlxloraError: of ``kind``: as :func:`read_json`, or nothing of it agrees.
    """
    taken, faults = sound(form, parse_json(read_whole(path, limit_bytes, kind), path, kind, fix))
    if taken is UNSOUND:
        raise kind(f"is not what mlxlora writes: {listing(faults, 3)}", where=path, fix=fix)
    return taken, [f"{path.name}: {fault}" for fault in faults]


def read_settled(read: Callable[[], T], path: Path) -> T:
    """What ``read`` gives; a file at ``path`` that is just being replaced is waited for, half a second.

    Raises:
        MlxloraError: as ``read``, of a file that stays as it is.
    """
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return read()
        except MlxloraError:
            if time.monotonic() >= until or not _has_just_changed(path):
                raise
        time.sleep(0.02)


def _has_just_changed(path: Path) -> bool:
    """Whether a file, or the folder that it is not in, was written to in the last seconds."""
    for place in (path, path.parent):
        try:
            return abs(time.time() - place.stat().st_mtime) < _RECENT_SECONDS
        except (OSError, ValueError):
            continue
    return False


# --- texts to values ----------------------------------------------------------


def parse_json(data: bytes, where: str | Path, kind: type[MlxloraError] = ModelError, fix: str = "") -> Any:
    """The value that JSON says.

    Args:
        data: UTF-8, with or without a byte order mark.
        where: for messages.
        kind: the error to raise.
        fix: what to do about a fault; left empty, to mend the file.

    Raises:
        MlxloraError: of ``kind``: it is no UTF-8 or no JSON (with line and column),
            has a key twice, a number that is not finite, or is nested too deeply.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_number)
        _refuse_odd(value)
    except json.JSONDecodeError as fault:
        place = f"{where}:{fault.lineno}:{fault.colno}"
        raise kind(f"is no JSON: {fault.msg}", where=place, fix=fix or "mend it") from None
    except UnicodeDecodeError as fault:
        raise _no_utf8(data, fault, where, kind, fix) from None
    except (ValueError, RecursionError) as fault:
        why = _TOO_DEEP if isinstance(fault, RecursionError) else fault
        raise kind(f"is no usable JSON: {why}", where=where, fix=fix or "mend it") from None
    return value


def parse_toml(data: bytes, where: Path, kind: type[MlxloraError]) -> tuple[dict[str, Any], str]:
    """What TOML says, and its text with plain line ends.

    Raises:
        MlxloraError: of ``kind``: it is no UTF-8 or no TOML (with line and column), or is nested too deeply.
    """
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
        if any(line.count(".") >= DEPTH and _LONG_KEY.search(line) for line in text.split("\n")):
            raise ValueError(_TOO_DEEP)  # tomllib takes time by the square of the parts of a key
        document = tomllib.loads(text)
        _refuse_deep(document)
    except UnicodeDecodeError as fault:
        raise _no_utf8(data, fault, where, kind) from None
    except tomllib.TOMLDecodeError as fault:
        what, _, at = str(fault).partition(" (at line ")
        place = ":".join([str(where), *re.findall("[0-9]+", at)])
        raise kind(f"is no TOML: {what}", where=place, fix="mend it") from None
    except (ValueError, RecursionError) as fault:
        why = _TOO_DEEP if isinstance(fault, RecursionError) else fault
        raise kind(f"is no usable TOML: {why}", where=where, fix="mend it") from None
    return document, text


_TOO_DEEP = f"more than {DEPTH} lists and objects stand in each other"


def _no_utf8(
    data: bytes, fault: UnicodeDecodeError, where: str | Path, kind: type[MlxloraError], fix: str = ""
) -> MlxloraError:
    line = data.count(b"\n", 0, fault.start) + 1
    return kind("is not UTF-8", where=f"{where}:{line}", fix=fix or "save it as UTF-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless a key stands in it twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(short(key, _NAME_LETTERS) for key, n in counts.items() if n > 1)
        raise ValueError(f"{listing(twice)} there twice")
    return content


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _levels(value: Any) -> Iterator[list[Any]]:
    """The values of a document that hold no others, level by level; none stands on a level above another.

    Raises:
        ValueError: there are more than :data:`DEPTH` levels of lists and objects.
    """
    level = [value]
    for _ in range(DEPTH + 1):
        holders = [part for part in level if isinstance(part, dict | list)]
        yield [part for part in level if not isinstance(part, dict | list)]
        if not holders:
            return
        level = [
            part for holder in holders for part in (holder.values() if isinstance(holder, dict) else holder)
        ]
    raise ValueError(_TOO_DEEP)


def _refuse_deep(value: Any) -> None:
    for _ in _levels(value):
        pass


def _refuse_odd(value: Any) -> None:
    for level in _levels(value):
        if any(isinstance(part, float) and not math.isfinite(part) for part in level):
            raise ValueError("it has a number that is larger than any that can be computed with")


# --- values to JSON -----------------------------------------------------------


def finite(value: Any) -> Any:
    """``value`` as JSON can hold it: a number that is not finite is null.

    In an object the word for it stands beside: ``{"perplexity": null,
    "perplexity_is": "infinite"}``.
    """
    if isinstance(value, Mapping):
        words = {f"{key}{_WORD}": _word(part) for key, part in value.items() if _is_odd(part)}
        return {key: finite(part) for key, part in value.items()} | words
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if _is_odd(value) else value


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _word(value: float) -> str:
    """What a number that is not finite is."""
    return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
