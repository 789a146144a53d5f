"""Bytes in and out: durable writing, locks, safe reading, tensor files, rows.

What is named here is for plugins: reading files of strangers without waiting
for a pipe, following a stand-in or trusting a size, and writing files that are
never seen half-written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlxlora_core.files.config_keys import KnownKeys, show_key, show_value, stated_rope
from mlxlora_core.files.data_path import DataFiles, find_data
from mlxlora_core.files.documents import parse_json, read_json
from mlxlora_core.files.durable import append_line, copy_file, new_file, write_json, write_text
from mlxlora_core.files.fingerprints import content_digest
from mlxlora_core.files.input_file import (
    file_bytes,
    is_in_folder,
    open_regular,
    read_exactly,
    read_some,
    refuse_stand_in,
)
from mlxlora_core.files.lazy_rows import ordered_rows, shifted, some_rows
from mlxlora_core.files.model_card import write_card
from mlxlora_core.files.row_shapes import parse_columns
from mlxlora_core.files.rows import RowFile, left_out, refuse_faults, scan_rows
from mlxlora_core.files.zip_layout import ZipMember, read_zip_layout

if TYPE_CHECKING:
    from mlxlora_core.values import LazyTensor

__all__ = [
    "DataFiles",
    "KnownKeys",
    "RowFile",
    "ZipMember",
    "append_line",
    "content_digest",
    "copy_file",
    "file_bytes",
    "find_data",
    "is_in_folder",
    "lazy_tensors",
    "left_out",
    "new_file",
    "open_regular",
    "ordered_rows",
    "parse_columns",
    "parse_json",
    "read_exactly",
    "read_json",
    "read_some",
    "read_zip_layout",
    "refuse_faults",
    "refuse_stand_in",
    "save_tensors",
    "scan_rows",
    "shifted",
    "show_key",
    "show_value",
    "some_rows",
    "stated_rope",
    "write_card",
    "write_json",
    "write_text",
]


def lazy_tensors(path: Path) -> dict[str, "LazyTensor"]:
    """The tensors of a ``.safetensors`` or ``.npz``, each read when it is asked for and kept nowhere.

    They come in the order of their bytes. What the file says of itself is checked first.

    Raises:
        ModelError: the file is absent, damaged, or of another kind; now or when a tensor is read.
    """
    from mlxlora_core.files import tensor_file

    return tensor_file.lazy(path)


def save_tensors(
    path: Path, tensors: Mapping[str, "LazyTensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors, read and let go one after another; the ending chooses the format.

    Args:
        path: ``.safetensors`` or ``.npz``.
        tensors: name -> tensor.
        metadata: what to write beside them.

    Raises:
        ModelError: a type that the format cannot hold, such as bfloat16 in ``.npz``.
        ResourceError: the disk is full, or the folder cannot be written.
    """
    from mlxlora_core.files import tensor_file

    each = ((name, tensor.read()) for name, tensor in tensors.items())
    tensor_file.save(path, each, metadata or {}, len(tensors))
