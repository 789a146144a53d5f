"""Files of named tensors: ``.safetensors`` and ``.npz``, written one tensor at a time.

MLX's own writers want all tensors at once and truncate the target first; these
keep one tensor in memory and go through the durable writer.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from mlxlora_core import durable
from mlxlora_core.errors import ModelError, some

METADATA = "__metadata__"  # the key that safetensors reserves; in an .npz a member of that name

_SAFETENSORS_TYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
    mx.int32: "I32",
}
_HEADER_ENTRY_BYTES = 384


class TensorWriter(Protocol):
    """Takes tensors one after another."""

    def add(self, name: str, tensor: mx.array) -> None:
        """Write one tensor."""

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write what must stand in the file beside the tensors."""


class SafetensorsWriter:
    """Streams a ``.safetensors`` file.

    The header stands in front of the data and is known last, so room for it is
    left and padded with spaces, as the format allows.

    Args:
        file: open for writing, at its start, seekable.
        tensors: how many tensors will come at most.
    """

    def __init__(self, file: BinaryIO, tensors: int) -> None:
        self._file = file
        self._room = 4096 + tensors * _HEADER_ENTRY_BYTES
        self._entries: dict[str, Any] = {}
        self._offset = 0
        file.seek(8 + self._room)

    def add(self, name: str, tensor: mx.array) -> None:
        """Write one tensor behind the last one."""
        data = tensor_bytes(tensor)
        self._file.write(data)
        self._entries[name] = {
            "dtype": _SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, self._offset + len(data)],
        }
        self._offset += len(data)

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write the header into the room left for it.

        Raises:
            ModelError: the names and the metadata are longer than that room.
        """
        header = json.dumps({METADATA: dict(metadata), **self._entries}, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ModelError(f"tensor names take {len(header)} bytes, there is room for {self._room}")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))


class NpzWriter:
    """Streams an uncompressed ``.npz`` archive.

    Args:
        file: open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)

    def add(self, name: str, tensor: mx.array) -> None:
        """Write one tensor as a member of its own.

        Raises:
            ModelError: bfloat16, which numpy does not have.
        """
        if tensor.dtype == mx.bfloat16:
            raise ModelError(f"{name} is bfloat16, which .npz cannot hold", fix="use float16 or safetensors")
        # A fixed date, so that the same tensors give the same bytes.
        member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
        with self._archive.open(member, "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, np.asarray(tensor), allow_pickle=False)

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write the metadata as one more member, JSON in bytes, and end the archive."""
        self.add(METADATA, mx.array(np.frombuffer(json.dumps(dict(metadata)).encode(), np.uint8)))
        self._archive.close()


def tensor_bytes(tensor: mx.array) -> memoryview:
    """The bytes of a tensor, row by row."""
    flat = mx.contiguous(tensor).reshape(-1)
    # The buffer protocol has a type of its own only since Python 3.12.
    view: Any = flat.view(mx.uint8) if flat.size else flat.astype(mx.uint8)
    return memoryview(view)


def digest(name: str, tensor: mx.array) -> bytes:
    """SHA-256 of one named tensor: its name, type, shape and bytes."""
    sha = hashlib.sha256(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
    sha.update(tensor_bytes(tensor))
    return sha.digest()


def combine(digests: Mapping[str, bytes]) -> str:
    """One fingerprint, in hex, of named digests, whatever their order."""
    sha = hashlib.sha256()
    for name in sorted(digests):
        sha.update(digests[name])
    return sha.hexdigest()


def save(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write a small file of tensors; the ending of ``path`` chooses the format.

    Raises:
        ModelError: an ending that is neither ``.safetensors`` nor ``.npz``.
        ResourceError: the disk is full, or the folder cannot be written.
    """

    def write(file: BinaryIO) -> None:
        writer: TensorWriter = (
            NpzWriter(file)
            if path.suffix == ".npz"
            else SafetensorsWriter(file, len(tensors) + len(metadata))
        )
        for name in sorted(tensors):
            writer.add(name, tensors[name])
        writer.close(metadata)

    check_ending(path)
    durable.write_file(path, write)


def load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors, not yet evaluated, and the metadata of a file.

    Raises:
        ModelError: the file is absent, damaged, or of another kind.
    """
    check_ending(path)
    if not path.is_file():
        raise ModelError("there is no such file", where=path)
    try:
        metadata = _safetensors_metadata(path) if path.suffix == ".safetensors" else {}
        # A dictionary for both formats; the stub covers every format that MLX reads.
        tensors: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    except (SafetensorError, RuntimeError, ValueError, OSError, zipfile.BadZipFile) as fault:
        raise ModelError(f"is damaged or no {path.suffix} file: {fault}", where=path) from fault
    if METADATA in tensors:
        metadata = json.loads(bytes(np.asarray(tensors.pop(METADATA)).tobytes()))
    return tensors, metadata


def check_ending(path: Path) -> None:
    """Refuse a file name that says no format.

    Raises:
        ModelError: an ending that is neither ``.safetensors`` nor ``.npz``.
    """
    if path.suffix not in (".safetensors", ".npz"):
        raise ModelError(f"wanted .safetensors or .npz, got '{path.suffix}'", where=path)


def mismatches(got: Mapping[str, mx.array], want: Mapping[str, mx.array]) -> list[str]:
    """What keeps the tensors ``got`` from taking the places of ``want``: all of it, in words."""
    faults = []
    missing = sorted(want.keys() - got.keys())
    unknown = sorted(got.keys() - want.keys())
    if missing:
        faults.append(f"{len(missing)} missing: {some(missing)}")
    if unknown:
        faults.append(f"{len(unknown)} unknown: {some(unknown)}")
    shapes = [
        f"{name} is {tuple(got[name].shape)}, wanted {tuple(want[name].shape)}"
        for name in sorted(want.keys() & got.keys())
        if got[name].shape != want[name].shape
    ]
    if shapes:
        faults.append(f"{len(shapes)} of a wrong shape: {some(shapes)}")
    return faults


def _safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata; opening checks the header against the file as the format demands."""
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})
