"""One tensor of a ``.safetensors``, read alone: of the file its bytes, of memory its size.

MLX reads a whole header before it gives a single tensor. So it is shown a file
of this one tensor, with a header of its own, behind which the bytes stand as
they stand in the real file.
"""

from __future__ import annotations

import io
import json
import os
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mlxlora_core.errors import ModelError
from mlxlora_core.files.input_file import open_regular
from mlxlora_core.files.tensor_header import TYPE_NAMES, read_entries
from mlxlora_core.values import LazyTensor

if TYPE_CHECKING:
    import mlx.core as mx

_NAME = "tensor"


def lazy(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a ``.safetensors`` in the order of their bytes, each read when it is asked for.

    Raises:
        ModelError: the file is absent, damaged, or of another kind; when a tensor is
            read, also that the file is not the one that was looked at.
    """
    with open_regular(path) as file:
        start, entries = read_entries(file, path)
        state = _state(file)
    found = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        place = _Place(path, state, name, entry["dtype"], tuple(entry["shape"]), start + begin, stop - begin)
        found[name] = LazyTensor(place.shape, TYPE_NAMES[place.dtype], partial(_read, place))
    return found


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands.

    Attributes:
        path: of the file.
        state: which file it was, with its size and the time of its last change.
        name: of the tensor.
        dtype: as safetensors calls it.
        shape: its dimensions.
        start: byte of the file at which it begins.
        size: in bytes.
    """

    path: Path
    state: tuple[int, ...]
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class _OneTensor(io.RawIOBase):
    """A ``.safetensors`` of one tensor, whose bytes are those of another file.

    Attributes:
        fault: what that file said when it was read, or None.
    """

    def __init__(self, file: BinaryIO, place: _Place) -> None:
        super().__init__()
        entry = {"dtype": place.dtype, "shape": place.shape, "data_offsets": [0, place.size]}
        header = json.dumps({_NAME: entry}).encode()
        self._head = struct.pack("<Q", len(header)) + header
        self._file, self._place, self._at = file, place, 0
        self.fault: OSError | None = None

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The byte that is read next."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Read on at another byte."""
        self._at = offset + (0, self._at, len(self._head) + self._place.size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``; how many bytes came."""
        view = memoryview(buffer).cast("B")
        count = 0
        if self._at < len(self._head):
            part = self._head[self._at : self._at + len(view)]
            view[: len(part)] = part
            count = len(part)
        within = self._at + count - len(self._head)
        rest = view[count : count + self._place.size - within]
        if rest:
            try:
                self._file.seek(self._place.start + within)
                count += self._file.readinto(rest)  # type: ignore[attr-defined]  # BinaryIO does not say so
            except OSError as fault:
                self.fault = fault
        self._at += count
        return count


def _read(place: _Place) -> mx.array:
    """The tensor at a place."""
    import mlx.core as mx

    with open_regular(place.path) as file:
        if _state(file) != place.state:
            raise ModelError("changed while it was read", where=place.path, fix="start again")
        stream: Any = _OneTensor(file, place)
        try:
            loaded: Any = mx.load(stream, format="safetensors")
            tensor: mx.array = loaded[_NAME]
            mx.eval(tensor)
        except RuntimeError as fault:
            why = stream.fault.strerror if stream.fault else "it ends too soon, or there is no memory for it"
            raise ModelError(f"{place.name} cannot be read: {why}", where=place.path) from fault
    return tensor


def _state(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
