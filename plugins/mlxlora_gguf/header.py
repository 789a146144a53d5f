"""What a GGUF file says of itself: keys, and the tensors with their places, all of it checked.

No number is used before the bytes that it claims were found in the file, and nothing
of a tensor is read. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mlxlora_core.api import ModelError, listing
from mlxlora_core.files import open_regular, refuse_stand_in
from mlxlora_gguf.blocks import REFUSED, TYPES, BlockType
from mlxlora_gguf.source import Fault, Source

MAGIC = b"GGUF"
ALIGNMENT = "general.alignment"

_TENSORS_LIMIT, _KEYS_LIMIT = 100_000, 10_000
_ITEMS_LIMIT = 8 << 20  # of all arrays together; the largest vocabularies in use have 1.3 million
_KEY_BYTES, _NAME_BYTES, _TEXT_BYTES = 1024, 256, 16 << 20
_AXES = 4
_LARGEST_DIMENSION = 2**31 - 1  # MLX counts in 32 bits
_LARGEST_ALIGNMENT = 1 << 20
_LEAST_ENTRY_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # of a tensor: a name of one letter, one axis
_TEXT, _ARRAY, _BOOL = 8, 9, 7
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        name: of the tensor.
        shape: rows first, as MLX has it.
        type: of its blocks.
        offset: of its first byte in the file.
        path: of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    path: Path

    @property
    def row_bytes(self) -> int:
        """Bytes of a row along the last axis."""
        return self.shape[-1] // self.type.weights * self.type.size

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Header:
    """A checked file.

    Attributes:
        path: of the file.
        keys: what it says of the model.
        tensors: in the order of their bytes.
        state: of the file when it was looked at; see :func:`file_state`.
    """

    path: Path
    keys: Mapping[str, Any]
    tensors: Sequence[Entry]
    state: tuple[int, ...]


def file_state(status: os.stat_result) -> tuple[int, ...]:
    """What changes when another file takes a file's place, or somebody writes to it."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_header(path: Path) -> Header:
    """The keys and tensors of a GGUF file.

    Raises:
        ModelError: it is none, is damaged, or has tensors of a type that is not read.
    """
    with open_regular(path) as file:
        refuse_stand_in(file, path)
        status = os.fstat(file.fileno())
        source = Source(file, status.st_size, path)
        try:
            count, keys_count = _opening(source)
            keys = _keys(source, keys_count)
            tensors = _tensors(source, count, path)
            return Header(path, keys, _placed(source, tensors, keys), file_state(status))
        except Fault as fault:
            raise ModelError(f"is no GGUF file that can be read: {fault}", where=path) from None


def _opening(source: Source) -> tuple[int, int]:
    """How many tensors there are, and how many keys."""
    magic, version = source.values("4sI")
    if magic != MAGIC:
        raise Fault("it does not begin with GGUF")
    if version and not version & 0xFFFF:
        raise Fault("its numbers have their highest byte first, which is not read")
    if version not in (2, 3):
        raise Fault(f"it is of version {version}, wanted 2 or 3")
    count, keys_count = source.values("QQ")
    if count > _TENSORS_LIMIT or count * _LEAST_ENTRY_BYTES > source.left():
        raise Fault(
            f"it claims {count} tensors, wanted at most {_TENSORS_LIMIT} and as many as it has room for"
        )
    if keys_count > _KEYS_LIMIT:
        raise Fault(f"it claims {keys_count} keys, wanted at most {_KEYS_LIMIT}")
    return count, keys_count


# --- keys ---------------------------------------------------------------------


def _keys(source: Source, count: int) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    room = _ITEMS_LIMIT
    for number in range(count):
        key = source.text(_KEY_BYTES, f"the name of key {number}")
        if not key or not key.isprintable():
            raise Fault(f"key {number} has no name that can be printed")
        if key in keys:
            raise Fault(f"key {key} is there twice")
        (kind,) = source.values("I")
        if kind == _ARRAY:
            keys[key] = _array(source, key, room)
            room -= len(keys[key])
        else:
            keys[key] = _value(source, kind, key)
    return keys


def _value(source: Source, kind: int, key: str) -> Any:
    if kind == _TEXT:
        return source.text(_TEXT_BYTES, f"key {key}")
    return _numbers(source, kind, 1, key)[0]


def _array(source: Source, key: str, room: int) -> list[Any]:
    kind, count = source.values("IQ")
    if count > room:
        raise Fault(f"key {key} claims {count} items, wanted at most {room}")
    if kind == _ARRAY:
        raise Fault(f"key {key} is an array of arrays, which is not read")
    return source.texts(count, f"key {key}") if kind == _TEXT else _numbers(source, kind, count, key)


def _numbers(source: Source, kind: int, count: int, key: str) -> list[Any]:
    """The next numbers, all of them finite."""
    if kind not in _FORMS:
        raise Fault(f"key {key} is of type {kind}, wanted 0 to {max(_FORMS)}")
    found: Iterable[Any] = source.values(f"{count}{_FORMS[kind]}")
    if kind == _BOOL:
        if set(found) - {0, 1}:
            raise Fault(f"key {key} is a truth value of neither 0 nor 1")
        found = map(bool, found)
    elif _FORMS[kind] in "fd" and not all(map(math.isfinite, found)):
        raise Fault(f"key {key} has a number that is not finite")
    return list(found)


# --- tensors ------------------------------------------------------------------


def _tensors(source: Source, count: int, path: Path) -> list[Entry]:
    """The tensors as the header lists them, their offsets still relative to where the tensors begin."""
    found: list[Entry] = []
    names: set[str] = set()
    refused: dict[str, list[str]] = {}
    for number in range(count):
        name = source.text(_NAME_BYTES, f"the name of tensor {number}")
        if not name or not name.isprintable():
            raise Fault(f"tensor {number} has no name that can be printed")
        if name in names:
            raise Fault(f"tensor {name} is there twice")
        names.add(name)
        shape = _shape(source, name)
        kind, offset = source.values("IQ")
        if kind in TYPES:
            found.append(_entry(name, shape, TYPES[kind], offset, source.size, path))
        else:
            refused.setdefault(REFUSED.get(kind, f"type {kind}"), []).append(name)
    if refused:
        _refuse_types(refused, path)
    return found


def _refuse_types(refused: Mapping[str, Sequence[str]], path: Path) -> NoReturn:
    """Name what cannot be read, by its type."""
    read = listing((kind.name for kind in TYPES.values()), len(TYPES))
    each = (f"{len(names)} of type {kind} ({listing(names, 1)})" for kind, names in refused.items())
    raise ModelError(
        f"has tensors whose type is not read: {listing(each)}",
        where=path,
        fix=f"take a file of the same model in other types; {read} are read",
    )


def _shape(source: Source, name: str) -> tuple[int, ...]:
    """The shape of a tensor, rows first: the file has it the other way round."""
    (axes,) = source.values("I")
    if not 1 <= axes <= _AXES:
        raise Fault(f"tensor {name} has {axes} axes, wanted 1 to {_AXES}")
    dimensions = source.values(f"{axes}Q")
    if not all(1 <= size <= _LARGEST_DIMENSION for size in dimensions):
        raise Fault(f"tensor {name} has shape {dimensions}, wanted 1 to {_LARGEST_DIMENSION} along each axis")
    return tuple(reversed(dimensions))


def _entry(name: str, shape: tuple[int, ...], kind: BlockType, offset: int, size: int, path: Path) -> Entry:
    """A tensor whose size is sound and not larger than its file."""
    if shape[-1] % kind.weights:
        raise Fault(
            f"tensor {name} has rows of {shape[-1]}, which blocks of {kind.weights} ({kind.name}) do not fill"
        )
    entry = Entry(name, shape, kind, offset, path)
    if offset > size or entry.size > size:
        raise Fault(f"tensor {name} has {entry.size} bytes at offset {offset}, in a file of {size}")
    return entry


def _placed(source: Source, tensors: list[Entry], keys: Mapping[str, Any]) -> list[Entry]:
    """The tensors in the order of their bytes, which lie one behind the other up to the end of the file."""
    alignment = keys.get(ALIGNMENT, 32)
    if type(alignment) is not int or not 1 <= alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise Fault(f"its {ALIGNMENT} is {alignment!r:.40}, wanted a power of two up to {_LARGEST_ALIGNMENT}")
    start = at = _aligned(source.at, alignment) if tensors else source.at
    last = source.at
    placed = []
    for entry in sorted(tensors, key=lambda entry: entry.offset):
        if start + entry.offset != at:
            how = (
                "shares bytes with the one before it"
                if start + entry.offset < last
                else "leaves a hole before it"
            )
            raise Fault(f"tensor {entry.name} begins at offset {entry.offset}, wanted {at - start}: it {how}")
        placed.append(Entry(entry.name, entry.shape, entry.type, at, entry.path))
        last = at + entry.size
        at = _aligned(last, alignment)
    if not last <= source.size <= max(at, last):
        what = "too short" if source.size < last else "longer than its tensors"
        raise Fault(f"it is {what}: it has {source.size} bytes, wanted {last}")
    return placed


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment
