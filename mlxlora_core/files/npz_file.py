"""``.npz`` archives of arrays, written one at a time and read without trust in what they say.

The format: ``numpy.lib.format``. The metadata is JSON in the comment of the
archive, which other readers pass over.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.files import tensor_header, zip_layout
from mlxlora_core.files.input_file import refuse_stand_in
from mlxlora_core.files.tensor_checks import type_name

Described = Callable[[], Mapping[str, str]]
Packed = tuple[str, mx.array, memoryview]

_COMMENT_BYTES = 65535  # what a zip archive has room for
# An .npz may unpack to so many times its size, and a small one to so much in any case.
_UNPACK_RATIO, _UNPACK_BYTES = 100, 16 << 20


def write_npz(file: BinaryIO, tensors: Iterator[Packed], described: Described) -> Iterator[str]:
    """Stream an uncompressed ``.npz`` archive; the name of each tensor that is written."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor, data in tensors:
            if tensor.dtype == mx.bfloat16:
                raise ModelError(
                    f"{name} is bfloat16, which .npz cannot hold", fix="use float16, or .safetensors"
                )
            # A fixed date, so that the same tensors give the same bytes.
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            header = {
                "descr": np.dtype(type_name(tensor.dtype)).str,
                "fortran_order": False,
                "shape": tuple(tensor.shape),
            }
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                stream.write(data)
            del tensor, data
            yield name
        comment = json.dumps(dict(described())).encode()
        if len(comment) > _COMMENT_BYTES:
            raise ModelError(
                f"the metadata takes {len(comment)} bytes, an .npz has room for {_COMMENT_BYTES}",
                fix="use .safetensors",
            )
        archive.comment = comment


def load_npz(file: BinaryIO, path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors of an open archive, and its metadata.

    Raises:
        ModelError: it is damaged, or holds something else.
    """
    layout = npz_layout(file, path)
    return dict(npz_tensors(file, layout.members, path)), comment_of(layout.comment)


def npz_layout(file: BinaryIO, path: Path) -> zip_layout.ZipLayout:
    """The members of an archive of arrays."""
    # Not read by MLX, whose parser trusts what a header says of sizes.
    refuse_stand_in(file, path)
    archive = zip_layout.read_zip_layout(file, path)
    other = [member.name for member in archive.members if not member.name.endswith(".npy")]
    if other:
        raise ModelError(f"holds what is no array: {listing(other)}", where=path)
    packed = sum(member.packed_bytes for member in archive.members)
    unpacked = sum(member.size_bytes for member in archive.members)
    if unpacked > max(_UNPACK_BYTES, _UNPACK_RATIO * packed):
        raise ModelError(f"{packed} bytes would unpack to {unpacked}", where=path)
    return archive


def npz_tensors(
    file: BinaryIO, members: Iterable[zip_layout.ZipMember], path: Path
) -> Iterator[tuple[str, mx.array]]:
    """(name, tensor) of each member, one at a time."""
    for member in members:
        name = member.name.removesuffix(".npy")
        content = zip_layout.read_zip_member(file, member, path)
        array: Any = tensor_header.read_npy(content, name, path)
        yield name, mx.array(array.astype(array.dtype.newbyteorder("=")))


def comment_of(comment: bytes) -> dict[str, str]:
    """The metadata in the comment of an archive; another tool's comment is none."""
    try:
        metadata = json.loads(comment)
    except (ValueError, RecursionError):
        return {}
    return {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}
