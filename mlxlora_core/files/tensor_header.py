"""What a ``.safetensors`` or ``.npy`` says of its tensors, checked before anything believes it.

The libraries of the two formats read the headers; what they let pass and MLX
does not stand is checked here. No number is used before the bytes that it
claims were found in the file. MLX's own readers check less, and ask for
memory by numbers of the header.

The formats: https://github.com/huggingface/safetensors#format and
``numpy.lib.format``.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from mlxlora_core.errors import ModelError, ResourceError
from mlxlora_core.files.input_file import AGAIN, name_of_open, open_regular, read_exactly, refuse_stand_in

if TYPE_CHECKING:
    import numpy as np

TENSORS_LIMIT = 100_000  # of one file
METADATA = "__metadata__"  # the key that safetensors reserves
FINGERPRINT = "fingerprint"  # the metadata that tells what the tensors of a file are
#: the types of safetensors that are read -> bytes an element
ITEM_BYTES = {
    "BOOL": 1,
    **dict.fromkeys(("U8", "I8"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64"), 8),
}
#: the types of safetensors -> as MLX calls them
TYPE_NAMES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}

_OTHER_TYPE = "save it in bfloat16, float16 or float32 with the tool that wrote it"
_HEADER_BYTES = 100_000_000  # the format's own limit
_PARTS = 10 * TENSORS_LIMIT  # a tensor of four axes has 10; each takes memory when it is parsed
_METADATA_ENTRIES, _METADATA_LETTERS = 10_000, 16 << 20  # far more than any tool writes
_NPY_HEADER_BYTES = 10_000  # numpy's own limit
_NAME_LETTERS = 512
_AXES = 32
_LARGEST_DIMENSION = 2**31 - 1  # MLX counts in 32 bits


def name_fault(name: str) -> str:
    """Why ``name`` is no name for a tensor, or nothing.

    A name may become a key, a file in an archive or a word on a screen: it
    has 1 to 512 printable letters and is no way out of a folder.
    """
    if not 0 < len(name) <= _NAME_LETTERS:
        return f"has {len(name)} letters, wanted 1 to {_NAME_LETTERS}"
    if not name.isprintable():
        return "holds a letter that cannot be printed"
    if "\\" in name or name.startswith("/") or {"..", "."} & {*name.split("/")}:
        return "is a path out of its place"
    return ""


# --- safetensors --------------------------------------------------------------


def read_safetensors(file: BinaryIO, path: Path) -> dict[str, str]:
    """Check the header of an open ``.safetensors`` against the file; gives its metadata.

    The safetensors library has the last word on the format: JSON, places that
    overlap or leave a hole, a file that is longer or shorter. What it lets
    pass is refused before: names and keys that stand there twice, names that
    are none, keys, types and axes that MLX does not have, and more of
    anything than a model needs, for which it would take twenty times the header.

    Raises:
        ModelError: what is wrong, with the tensor.
        ResourceError: there is no room to map the file.
    """
    size = os.fstat(file.fileno()).st_size
    text = _header(file, size, path)
    start = file.tell()
    try:
        tensors = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as reason:
        raise _damaged(f"its header is no JSON: {reason}", path) from None
    if not isinstance(tensors, dict):
        raise _damaged("its header is no JSON object", path)
    metadata = tensors.pop(METADATA, None) or {}  # MLX writes null when there is none
    if fault := _metadata_fault(metadata):
        raise _damaged(f"its {METADATA} {fault}", path)
    if len(tensors) > TENSORS_LIMIT:
        raise _damaged(f"it has more than {TENSORS_LIMIT} tensors", path)
    for name, entry in tensors.items():
        if fault := name_fault(name):
            raise _damaged(f"the name of tensor {name[:_NAME_LETTERS]!r} {fault}", path)
        if fault := _entry_fault(entry):
            raise _damaged(f"tensor {name} {fault}", path)
        if (dtype := entry["dtype"]) not in ITEM_BYTES:
            what = f"tensor {name} is {dtype[:_NAME_LETTERS]}, which is not read; wanted one of"
            raise ModelError(f"{what} {', '.join(ITEM_BYTES)}", where=path, fix=_OTHER_TYPE)
    _check_layout(file, tensors, start, size, path)
    return metadata


def read_entries(file: BinaryIO, path: Path) -> tuple[int, dict[str, Any]]:
    """Where the bytes of an open ``.safetensors`` begin, and what its header says of each tensor, checked.

    Raises:
        MlxloraError: as :func:`read_safetensors`.
    """
    read_safetensors(file, path)
    tensors = json.loads(_header(file, os.fstat(file.fileno()).st_size, path))
    tensors.pop(METADATA, None)
    return file.tell(), tensors


def stated(path: Path) -> dict[str, str]:
    """The metadata of a ``.safetensors``, whatever its tensors are; nothing where there is none to read."""
    try:
        with open_regular(path) as file:
            return read_metadata(file, path)
    except ModelError:
        return {}


def read_metadata(file: BinaryIO, path: Path) -> dict[str, str]:
    """The metadata of an open ``.safetensors``, whatever its tensors are.

    Raises:
        ModelError: there is no header.
    """
    try:
        header = json.loads(_header(file, os.fstat(file.fileno()).st_size, path))
        return {k: v for k, v in (header.get(METADATA) or {}).items() if isinstance(v, str)}
    except (ValueError, AttributeError, RecursionError) as reason:
        raise _damaged(f"its header is no JSON: {reason}", path) from None


def _header(file: BinaryIO, size: int, path: Path) -> str:
    """The JSON at the head of a file of ``size`` bytes, which is left at the first byte behind it."""
    refuse_stand_in(file, path)
    if size < 8:
        raise ModelError(f"is {size} bytes, its header needs 8 and more", where=path, fix=AGAIN)
    (length,) = struct.unpack("<Q", read_exactly(file, 8, path))
    if length > _HEADER_BYTES:
        raise ModelError(f"its header claims {length} bytes, wanted at most {_HEADER_BYTES}", where=path)
    if 8 + length > size:
        raise ModelError(f"is {size} bytes, its header needs {8 + length}", where=path, fix=AGAIN)
    header = read_exactly(file, length, path)
    if sum(map(header.count, (b",", b"[", b"{"))) > _PARTS:
        raise _damaged(f"its header has more than {_PARTS} parts", path)
    try:
        return header.decode()
    except UnicodeDecodeError as fault:
        raise ModelError(f"its header is no UTF-8 at byte {8 + fault.start}", where=path) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless a key stands in it twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key or tensor {name[:_NAME_LETTERS]} stands there twice")
    return content


def _metadata_fault(metadata: Any) -> str:
    """Why metadata cannot be, or nothing; there is a copy of it wherever a model goes."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        return "is no JSON of names and texts"
    letters = sum(len(name) + len(value) for name, value in metadata.items())
    if len(metadata) > _METADATA_ENTRIES or letters > _METADATA_LETTERS:
        most = f"{_METADATA_ENTRIES} of {_METADATA_LETTERS}"
        return f"has {len(metadata)} entries of {letters} letters, wanted at most {most}"
    return ""


def _entry_fault(entry: Any) -> str:
    """Why what a header says of a tensor cannot be, or nothing; its place is looked at later."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]} if len(entry) == 3:
            numbers = (*shape, start, stop)
        case _:
            numbers = (None,)
    if not all(type(number) is int and abs(number) < 2**63 for number in numbers):
        return "has no entry of dtype, shape and data_offsets"
    if min(numbers) < 0:
        return "has a negative number in its shape or offsets"
    if fault := _shape_fault(shape):
        return fault
    need, have = math.prod(shape) * ITEM_BYTES.get(dtype, 0), stop - start
    if dtype in ITEM_BYTES and need != have:
        return f"is {dtype} {tuple(shape)} and needs {need} bytes, its offsets give {have}"
    return ""


def _check_layout(file: BinaryIO, tensors: Mapping[str, Any], start: int, size: int, path: Path) -> None:
    """Have the library open the file, and find words for what it refuses.

    Args:
        file: what was opened and no other that may have come to its place.
        tensors: name -> entry of the header, each sound in itself.
        start: the byte behind the header.
        size: of the file, in bytes.
        path: for messages.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(name_of_open(file) or path, framework="numpy"):
            return
    except SafetensorError as fault:
        told = str(fault)
    except (OSError, MemoryError) as fault:  # it maps the whole file
        raise ResourceError(f"cannot be mapped into memory: {fault}", where=path) from None
    at = 0
    for begin, stop, name in sorted((*entry["data_offsets"], name) for name, entry in tensors.items()):
        if begin != at:
            what = "it overlaps another" if begin < at else "there is a hole"
            raise _damaged(f"tensor {name} begins at byte {begin} of the data, wanted {at}: {what}", path)
        at = stop
    if start + at > size:
        raise ModelError(f"is {size} bytes, its header needs {start + at}", where=path, fix=AGAIN)
    if start + at < size:
        told = f"{size - start - at} bytes behind its last tensor belong to none"
    raise _damaged(told[:_NAME_LETTERS], path)


def _damaged(what: str, path: Path) -> ModelError:
    return ModelError(f"is damaged or no .safetensors file: {what}", where=path)


def _shape_fault(shape: Sequence[int]) -> str:
    """Why a shape cannot be, or nothing."""
    if len(shape) > _AXES:
        return f"has {len(shape)} axes, wanted at most {_AXES}"
    if min(shape, default=0) < 0:
        return "has a negative number in its shape"
    if max(shape, default=0) > _LARGEST_DIMENSION:
        return f"has an axis of {max(shape)} elements, wanted at most {_LARGEST_DIMENSION}"
    return ""


# --- npy ----------------------------------------------------------------------


def read_npy(content: bytes, name: str, path: Path) -> np.ndarray[Any, Any]:
    """The numbers in an array file, as a view of its bytes; numpy reads the header, up to 10 000 bytes.

    Args:
        content: the whole file.
        name: of the array.
        path: of the archive that it stands in.

    Raises:
        ModelError: what is wrong, with the array.
    """
    import numpy as np

    def refuse(what: str) -> NoReturn:
        raise ModelError(f"is damaged or no .npz file: array {name} {what}", where=path)

    file = io.BytesIO(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of headers that are read by guessing
            form = np.lib.format
            first = form.read_magic(file) == (1, 0)
            read = form.read_array_header_1_0 if first else form.read_array_header_2_0
            shape, column_major, dtype = read(file, _NPY_HEADER_BYTES)
    except Exception as reason:  # a literal that anyone may have written can bring out any
        refuse(f"has no header of numpy's ({str(reason)[:_NAME_LETTERS]})")
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        refuse(f"is of type '{dtype.str}', wanted numbers")
    if fault := _shape_fault(shape):
        refuse(fault)
    need, have = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if need != have:
        refuse(f"is {dtype.str} {shape} and needs {need} bytes, it has {have}")
    return np.ndarray(shape, dtype, content, file.tell(), order="F" if column_major else "C")
