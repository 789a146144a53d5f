"""Files of named tensors: ``.safetensors`` and ``.npz``, written one tensor at a time.

MLX's own writers want all tensors at once and truncate the target first; these
keep one tensor in memory and go through the durable writer. Every file that
mlxlora writes holds, as metadata, the fingerprint of its tensors.

The formats: https://github.com/huggingface/safetensors#format and
``numpy.lib.format``. The metadata of an ``.npz`` is JSON in the comment of the
archive, which other readers pass over.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlxlora_core.errors import MlxloraError, ModelError, ResourceError
from mlxlora_core.files import durable, stored_tensor, tensor_header
from mlxlora_core.files.fingerprints import begin_tensor, combine, tensor_digests
from mlxlora_core.files.input_file import name_of_open, open_regular
from mlxlora_core.files.npz_file import (
    Described,
    Packed,
    comment_of,
    load_npz,
    npz_layout,
    npz_tensors,
    write_npz,
)
from mlxlora_core.files.tensor_checks import type_name
from mlxlora_core.values import LazyTensor

FINGERPRINT = tensor_header.FINGERPRINT

#: the types that a file can hold, as safetensors calls them
TYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint8: "U8",
    mx.uint16: "U16",
    mx.uint32: "U32",
    mx.uint64: "U64",
    mx.int8: "I8",
    mx.int16: "I16",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.bool_: "BOOL",
}
_HEADER_BYTES = 4096  # what stands in the header of every file
_ENTRY_BYTES = 384  # more than a name of 256 letters, a shape and two offsets take in the header


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        bytes: of all tensors.
        fingerprint: of all tensors, in hex; the same in every format.
    """

    bytes: int
    fingerprint: str


def save(
    path: Path, tensors: Iterable[tuple[str, mx.array]], metadata: Mapping[str, str], most: int
) -> Written:
    """Write named tensors as :func:`saving` does, in one go."""
    (written,) = deque(saving(path, tensors, metadata, most), maxlen=1)
    assert isinstance(written, Written), "it comes last"
    return written


def saving(
    path: Path, tensors: Iterable[tuple[str, mx.array]], metadata: Mapping[str, str], most: int
) -> Iterator[str | Written]:
    """Write named tensors one after another; the ending of ``path`` chooses the format.

    Args:
        path: ``.safetensors`` or ``.npz``.
        tensors: each is let go before the next one is asked for.
        metadata: what to write beside the tensors and their fingerprint.
        most: how many tensors will come at most.

    Yields:
        The name of each tensor after it is written and, when the file is in its
        place, what was written.

    Raises:
        ModelError: another ending, a name that comes twice, or a type that the
            format cannot hold.
        ResourceError: the disk is full, the folder cannot be written, or the
            file cannot be read back.
    """
    check_ending(path)
    content = _Content(metadata)
    with durable.new_file(path, partial(_check_names, content, path)) as file:
        if path.suffix == ".npz":
            yield from write_npz(file, content.packed(tensors, path), content.described)
        else:
            yield from _write_safetensors(file, content.packed(tensors, path), content.described, most)
    yield Written(content.bytes, combine(content.digests))


class _Content:
    """What has been written so far, for the metadata and the check.

    Attributes:
        digests: name -> digest of each tensor.
        bytes: of all of them.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._metadata = metadata
        self.digests: dict[str, str] = {}
        self.bytes = 0

    def packed(self, tensors: Iterable[tuple[str, mx.array]], path: Path) -> Iterator[Packed]:
        """Each tensor with its bytes, once it is noted."""
        for name, tensor in tensors:
            if name in self.digests:
                raise ModelError(f"tensor {name} comes twice", where=path)
            if fault := tensor_header.name_fault(name):
                raise ModelError(f"the name of tensor {name!r} {fault}", where=path)
            data = _bytes(tensor)
            self.digests[name] = _digest(name, tensor, data)
            self.bytes += data.nbytes
            yield name, tensor, data
            del tensor, data

    def described(self) -> Mapping[str, str]:
        """The metadata, as far as it is known."""
        return {"format": "mlx", **self._metadata, FINGERPRINT: combine(self.digests)}


def _check_names(content: _Content, path: Path, written: Path) -> None:
    """Have a reader that is not ours find what was written."""
    try:
        found = _names_npz(written) if path.suffix == ".npz" else _names_safetensors(written)
    except (zipfile.BadZipFile, SafetensorError):
        found = None
    if found != content.digests.keys():
        raise ResourceError("what is read back is not what was written", where=path, fix="check the disk")


def load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors, those of ``.safetensors`` not yet read, and the metadata of a file.

    The header is checked against the file first, and what was checked is what
    is read: the file is opened once.

    Raises:
        ModelError: the file is absent, damaged, or of another kind.
    """
    check_ending(path)
    with open_regular(path) as file:
        try:
            return load_npz(file, path) if path.suffix == ".npz" else _load_safetensors(file, path)
        except (MlxloraError, MemoryError):
            raise
        except Exception as fault:  # whatever MLX makes of bytes that anyone may have written
            raise ModelError(f"is damaged or no {path.suffix} file: {fault}", where=path) from fault


def stated(path: Path) -> dict[str, str]:
    """What a file says of itself, read without a look at its tensors; nothing where that cannot be read."""
    if path.suffix != ".npz":
        return tensor_header.stated(path)
    try:
        with open_regular(path) as file:
            return comment_of(npz_layout(file, path).comment)
    except MlxloraError:
        return {}


def lazy(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file in the order of their bytes, each read when it is asked for and kept nowhere.

    Raises:
        ModelError: as :func:`load`, now or when a tensor is read.
    """
    check_ending(path)
    if path.suffix != ".npz":
        return stored_tensor.lazy(path)
    with open_regular(path) as file:
        layout = npz_layout(file, path)
        # Looked at one after another, for what an array is stands in front of its bytes.
        sizes = {name: (t.shape, t.dtype) for name, t in npz_tensors(file, layout.members, path)}
    return {
        name: LazyTensor(shape, type_name(dtype), partial(_read_array, path, name))
        for name, (shape, dtype) in sizes.items()
    }


def digests(path: Path) -> dict[str, str]:
    """Name -> digest of each tensor of a file, by its bytes and not by what the file states.

    Raises:
        ModelError: as :func:`load`.
    """
    if path.suffix != ".npz":
        return tensor_digests(path)
    with open_regular(path) as file:
        layout = npz_layout(file, path)
        return {
            n: _digest(n, tensor, _bytes(tensor)) for n, tensor in npz_tensors(file, layout.members, path)
        }


def _read_array(path: Path, name: str) -> mx.array:
    """One array of an ``.npz``, and in memory nothing of the others."""
    with open_regular(path) as file:
        members = [m for m in npz_layout(file, path).members if m.name == f"{name}.npy"]
        found = dict(npz_tensors(file, members, path))
    if name not in found:
        raise ModelError(f"{name} is gone: the file was replaced while it was read", where=path)
    return found[name]


def tensor_digest(name: str, tensor: mx.array) -> str:
    """The digest, in hex, of a tensor as a file holds it under ``name``."""
    return _digest(name, tensor, _bytes(tensor))


def fingerprint(tensors: Mapping[str, mx.array]) -> str:
    """What :func:`save` calls these tensors: SHA-256 over names, types, shapes and bytes, in hex."""
    return combine({name: tensor_digest(name, tensor) for name, tensor in tensors.items()})


def header_bytes(count: int) -> int:
    """What a ``.safetensors`` of so many tensors takes beside them, at most, as it is written here."""
    return _HEADER_BYTES + count * _ENTRY_BYTES


def check_ending(path: Path) -> None:
    """Refuse a file name that says no format.

    Raises:
        ModelError: an ending that is neither ``.safetensors`` nor ``.npz``.
    """
    if path.suffix not in (".safetensors", ".npz"):
        raise ModelError(f"wanted .safetensors or .npz, got '{path.suffix}'", where=path)


# --- fingerprints -------------------------------------------------------------


def _bytes(tensor: mx.array) -> memoryview:
    """The bytes of a tensor, row by row; no copy where they lie so already."""
    if not tensor.size:  # on CUDA it lies at address 0, and the CRC-32 of nothing there is a wrong one
        return memoryview(b"")
    # Words of the same width, for types that the buffer protocol has not, and in the same shape:
    # MLX has no axis of 2 ** 31 and more. The protocol has a type of its own only since Python 3.12.
    view: Any = mx.contiguous(tensor).view(getattr(mx, f"uint{8 * tensor.dtype.size}"))
    return memoryview(view).cast("B")


def _digest(name: str, tensor: mx.array, data: memoryview) -> str:
    sha = begin_tensor(name, type_name(tensor.dtype), tensor.shape)
    sha.update(data)
    return sha.hexdigest()


def _names_safetensors(path: Path) -> set[str]:
    with safe_open(path, framework="numpy") as file:
        return set(file.keys())


def _names_npz(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


# --- safetensors --------------------------------------------------------------


def _write_safetensors(
    file: BinaryIO, tensors: Iterator[Packed], described: Described, most: int
) -> Iterator[str]:
    """Stream a ``.safetensors`` file; the name of each tensor that is written.

    The header stands in front of the data and is known last, so room for it is
    left and padded with spaces, as the format allows.
    """
    # In eights, so that the data is aligned.
    room = _HEADER_BYTES + len(json.dumps(dict(described()))) // 8 * 8 + most * _ENTRY_BYTES
    entries: dict[str, Any] = {}
    offset = 0
    file.seek(8 + room)
    for name, tensor, data in tensors:
        if tensor.dtype not in TYPES:
            raise ModelError(f"{name} is {type_name(tensor.dtype)}, which .safetensors cannot hold")
        file.write(data)
        end = offset + data.nbytes
        entries[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
        del tensor, data
        yield name
    header = json.dumps(
        {tensor_header.METADATA: dict(described()), **entries}, separators=(",", ":")
    ).encode()
    if len(header) > room:
        raise ModelError(f"the names of the tensors take {len(header)} bytes, there is room for {room}")
    file.seek(0)
    file.write(struct.pack("<Q", room) + header.ljust(room))
    file.seek(0, 2)


def _load_safetensors(file: BinaryIO, path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    metadata = tensor_header.read_safetensors(file, path)
    file.seek(0)
    # MLX reads a tensor of a named file when that is first used, but all of an open one at once.
    opened: Any = name_of_open(file) or file
    # A dictionary for this format; the stub covers every format that MLX reads.
    tensors: dict[str, mx.array] = mx.load(opened, format="safetensors")  # type: ignore[assignment]  # as said
    return tensors, metadata
