"""The GGUF writer: keys, then tensors whose places are known before any of them is read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mlxlora_core.files import new_file
from mlxlora_gguf.blocks import NUMBERS, BlockType

ALIGNMENT = 32
_VERSION = 3
_U32, _I32, _F32, _BOOL, _TEXT, _ARRAY = 4, 5, 6, 7, 8, 9

#: what a key may hold; whole numbers and numbers take 4 bytes
Value: TypeAlias = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write.

    Attributes:
        name: of the tensor.
        shape: rows first, as MLX has it; the last axis is whole blocks.
        type: of its blocks.
        content: its bytes, in pieces, made when they are written.
    """

    name: str
    shape: tuple[int, ...]
    type: BlockType
    content: Callable[[], Iterable[bytes]]

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) // self.type.weights * self.type.size


def write_gguf(path: Path, keys: Mapping[str, Value], tensors: Sequence[OutTensor]) -> None:
    """Write a file; the tensors are made one after another, each let go before the next.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    with new_file(path) as file:
        file.write(_head(keys, tensors))
        for tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            start = file.tell()
            for piece in tensor.content():
                file.write(piece)
            assert file.tell() - start == tensor.size, f"{tensor.name} is of another size"
        file.write(bytes(-file.tell() % ALIGNMENT))


def _head(keys: Mapping[str, Value], tensors: Sequence[OutTensor]) -> bytes:
    """Everything before the first tensor."""
    parts = [struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(keys))]
    parts += [_text(key) + _value(value) for key, value in keys.items()]
    offset = 0
    for tensor in tensors:
        axes = tensor.shape[::-1]  # the fastest axis first
        place = struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, NUMBERS[tensor.type.name], offset)
        parts.append(_text(tensor.name) + place)
        offset += -(-tensor.size // ALIGNMENT) * ALIGNMENT
    return b"".join(parts)


def _value(value: Any) -> bytes:
    """A value with its type in front."""
    if isinstance(value, (str, bool, int, float)):
        kind = _kind(value)
        return struct.pack("<I", kind) + _content(kind, [value])
    # llama.cpp wants types of tokens and the like as signed numbers
    kind = _I32 if (first := _kind(value[0])) == _U32 else first
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + _content(kind, value)


def _kind(value: Any) -> int:
    if isinstance(value, str):
        return _TEXT
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _U32 if value >= 0 else _I32
    return _F32


def _content(kind: int, values: Sequence[Any]) -> bytes:
    if kind == _TEXT:
        return b"".join(map(_text, values))
    form = {_U32: "I", _I32: "i", _F32: "f", _BOOL: "?"}[kind]
    return struct.pack(f"<{len(values)}{form}", *values)


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content
