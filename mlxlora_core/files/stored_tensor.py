"""The tensors of a ``.safetensors``, read one at a time: the file is looked at once, and kept is nothing."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mlxlora_core.errors import ModelError
from mlxlora_core.files.input_file import name_of_open, open_regular
from mlxlora_core.files.tensor_header import TYPE_NAMES, read_entries
from mlxlora_core.values import LazyTensor

if TYPE_CHECKING:
    import mlx.core as mx


def lazy(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a ``.safetensors`` in the order of their bytes, each read when it is asked for.

    Raises:
        ModelError: the file is absent, damaged, or of another kind; when a tensor is
            read, also that the file is not the one that was looked at.
    """
    with open_regular(path) as file:
        _, entries = read_entries(file, path)
        opened = _Opened(path, _state(file))
    return {
        name: LazyTensor(tuple(entry["shape"]), TYPE_NAMES[entry["dtype"]], partial(opened.read, name))
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    }


class _Opened:
    """A file of which MLX has read the header, and of each tensor nothing before it is asked for.

    Args:
        path: of the file.
        state: which file was checked, with its size and the time of its last change.
    """

    def __init__(self, path: Path, state: tuple[int, ...]) -> None:
        self._path, self._state = path, state
        self._unread: dict[str, mx.array] = {}

    def read(self, name: str) -> mx.array:
        """One tensor; it is given away, so that the memory is the caller's."""
        import mlx.core as mx

        try:
            if name not in self._unread:  # the first one, or one for the second time
                self._unread = self._load()
            tensor = self._unread.pop(name)
            mx.eval(tensor)
        except RuntimeError as fault:
            raise ModelError(f"{name} cannot be read: {fault}", where=self._path) from fault
        return tensor

    def _load(self) -> dict[str, mx.array]:
        """All tensors, none of which is read yet."""
        import mlx.core as mx

        with open_regular(self._path) as file:
            if _state(file) != self._state:
                raise ModelError("changed while it was read", where=self._path, fix="start again")
            # MLX opens what has a name for itself, and reads of it what is used.
            tensors: Any = mx.load(name_of_open(file) or str(self._path), format="safetensors")
        return dict(tensors)


def _state(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
