"""What a ``.safetensors`` or ``.npy`` says of its tensors, checked before anything believes it.

Nothing here evaluates a header: each is matched against the few forms that the
formats allow, so that there is nothing to nest, and no number is used before
the bytes that it claims were found in the file. MLX's own readers check less,
and ask for memory by numbers of the header.

The formats: https://github.com/huggingface/safetensors#format and
``numpy.lib.format``.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from mlxlora_core.errors import ModelError
from mlxlora_core.files.input_file import AGAIN, read_exactly, refuse_stand_in

TENSORS_LIMIT = 100_000  # of one file
METADATA = "__metadata__"  # the key that safetensors reserves
#: the types of safetensors that are read -> bytes an element
ITEM_BYTES = {
    "BOOL": 1,
    **dict.fromkeys(("U8", "I8"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64"), 8),
}

_HEADER_BYTES = 100_000_000  # the format's own limit
_NPY_HEADER_BYTES = 10_000  # numpy's own limit
_NAME_LETTERS = 512
_AXES = 32
_LARGEST_DIMENSION = 2**31 - 1  # MLX counts in 32 bits

_GAP = r"[ \t\r\n]*+"
_NUMBER = r"-?(?:0|[1-9][0-9]{0,18})"
_FIELD = rf"""(?:
    "dtype"{_GAP}:{_GAP}"(?P<dtype>[0-9A-Za-z_]{{1,20}})"
  | "shape"{_GAP}:{_GAP}\[{_GAP}(?P<shape>(?:{_NUMBER}(?:{_GAP},{_GAP}{_NUMBER})*+)?+){_GAP}\]
  | "data_offsets"{_GAP}:{_GAP}\[{_GAP}(?P<start>{_NUMBER}){_GAP},{_GAP}(?P<stop>{_NUMBER}){_GAP}\]
)"""
#: three fields in any order; each but the last is followed by a comma and another
_ENTRY = re.compile(rf"\{{{_GAP}(?:{_FIELD}{_GAP}(?:,{_GAP}(?=\")|(?=\}}))){{3}}\}}", re.VERBOSE)
_DECODER = json.JSONDecoder()
_COLON = re.compile(rf"{_GAP}:{_GAP}")
_OPEN = re.compile(rf"\{{{_GAP}")
_NEXT = re.compile(rf"{_GAP}([,}}]){_GAP}")

_NPY_FIELD = r"""(?:
    'descr'\ *:\ *'(?P<descr>[^'\n]*)'
  | 'fortran_order'\ *:\ *(?P<fortran>True|False)
  | 'shape'\ *:\ *\((?P<shape>(?:[0-9]{1,19},\ *(?:[0-9]{1,19}(?:,\ *[0-9]{1,19})*+,?\ *)?)?)\)
)"""
_NPY = re.compile(rf"\{{\ *(?:{_NPY_FIELD}\ *(?:,\ *(?=')|,?\ *(?=\}}))){{3}}\}}\ *\n?", re.VERBOSE)
_NPY_TYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248])")


@dataclass(frozen=True)
class Npy:
    """What an array file says of its array.

    Attributes:
        descr: its type, as numpy spells it: ``<f4``.
        column_major: whether the first axis runs fastest.
        shape: its dimensions.
        start: the byte at which its values begin.
    """

    descr: str
    column_major: bool
    shape: tuple[int, ...]
    start: int


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

    Tensors lie one after another, fill the file to its last byte, and each
    takes what its type and shape say.

    Raises:
        ModelError: what is wrong, with the tensor.
    """
    size = os.fstat(file.fileno()).st_size
    refuse_stand_in(file, path)
    if size < 8:
        raise ModelError(f"is {size} bytes, its header needs 8 and more", where=path, fix=AGAIN)
    (length,) = struct.unpack("<Q", read_exactly(file, 8, path))
    if length > _HEADER_BYTES:
        raise ModelError(f"its header claims {length} bytes, wanted at most {_HEADER_BYTES}", where=path)
    if 8 + length > size:
        raise ModelError(f"is {size} bytes, its header needs {8 + length}", where=path, fix=AGAIN)
    try:
        text = read_exactly(file, length, path).decode()
    except UnicodeDecodeError as fault:
        raise ModelError(f"its header is no UTF-8 at byte {8 + fault.start}", where=path) from None
    header = _Header(text, path)
    header.parse()
    header.check_layout(size - 8 - length, size)
    return header.metadata


class _Header:
    """The JSON at the head of a ``.safetensors``.

    Attributes:
        metadata: what stands under ``__metadata__``.
        extents: (start, stop, name) of every tensor, in bytes behind the header.
    """

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path = text, path
        self.metadata: dict[str, str] = {}
        self.extents: list[tuple[int, int, str]] = []

    def parse(self) -> None:
        """Read all of it."""
        names: set[str] = set()
        at = self._take(_OPEN, 0).end()
        more = not self.text.startswith("}", at)
        at += not more
        while more:
            name, at = self._string(at)
            if name in names:
                self._refuse(f"tensor {name} stands there twice")
            names.add(name)
            at = self._take(_COLON, at).end()
            at = self._metadata(at) if name == METADATA else self._tensor(name, at)
            more, at = self._more(at)
        if self.text[at:].strip(" \t\r\n"):
            self._refuse(f"its header is no JSON at letter {at}")

    def check_layout(self, room: int, size: int) -> None:
        """Hold the tensors against the bytes that there are behind the header."""
        at = 0
        for start, stop, name in sorted(self.extents):
            if start != at:
                self._refuse(f"tensor {name} begins at byte {start} of the data, wanted {at}: ", start < at)
            at = stop
        if at > room:
            raise ModelError(
                f"is {size} bytes, its header needs {size + at - room}", where=self.path, fix=AGAIN
            )
        if at < room:
            self._refuse(f"{room - at} bytes behind its last tensor belong to none")

    def _tensor(self, name: str, at: int) -> int:
        if fault := name_fault(name):
            self._refuse(f"the name of tensor {name[:_NAME_LETTERS]!r} {fault}")
        if len(self.extents) == TENSORS_LIMIT:
            self._refuse(f"it has more than {TENSORS_LIMIT} tensors")
        match = _ENTRY.match(self.text, at)
        dtype, shape, start, stop = match.group("dtype", "shape", "start", "stop") if match else (None,) * 4
        if match is None or dtype is None or shape is None or start is None or stop is None:
            self._refuse(f"tensor {name} has no entry of dtype, shape and data_offsets")
        if dtype not in ITEM_BYTES:
            self._refuse(f"tensor {name} is {dtype}, wanted one of {', '.join(ITEM_BYTES)}")
        if "-" in f"{shape}{start}{stop}":
            self._refuse(f"tensor {name} has a negative number in its shape or offsets")
        dimensions = tuple(map(int, shape.split(","))) if shape else ()
        if fault := _shape_fault(dimensions):
            self._refuse(f"tensor {name} {fault}")
        need, have = math.prod(dimensions) * ITEM_BYTES[dtype], int(stop) - int(start)
        if need != have:
            self._refuse(
                f"tensor {name} is {dtype} {dimensions} and needs {need} bytes, its offsets give {have}"
            )
        self.extents.append((int(start), int(stop), name))
        return match.end()

    def _metadata(self, at: int) -> int:
        if self.text.startswith("null", at):  # MLX writes it when there is none
            return at + 4
        at = self._take(_OPEN, at).end()
        if self.text.startswith("}", at):
            return at + 1
        more = True
        while more:
            key, at = self._string(at)
            if key in self.metadata:
                self._refuse(f"its metadata has {key[:_NAME_LETTERS]} twice")
            self.metadata[key], at = self._string(self._take(_COLON, at).end())
            more, at = self._more(at)
        return at

    def _more(self, at: int) -> tuple[bool, int]:
        """Whether a comma follows and not the end of the object, and the letter behind it."""
        match = self._take(_NEXT, at)
        return match[1] == ",", match.end() if match[1] == "," else match.end(1)

    def _string(self, at: int) -> tuple[str, int]:
        """The string that begins at a letter, and the letter behind it."""
        if not self.text.startswith('"', at):
            self._refuse(f"its header is no JSON of names and texts at letter {at}")
        try:
            value, end = _DECODER.raw_decode(self.text, at)
            value.encode()
        except ValueError:
            self._refuse(f"its header has no proper text at letter {at}")
        return value, end

    def _take(self, pattern: re.Pattern[str], at: int) -> re.Match[str]:
        match = pattern.match(self.text, at)
        if match is None:
            self._refuse(f"its header is no JSON of a .safetensors file at letter {at}")
        return match

    def _refuse(self, what: str, overlaps: bool | None = None) -> NoReturn:
        reason = "" if overlaps is None else "it overlaps another" if overlaps else "there is a hole"
        raise ModelError(f"is damaged or no .safetensors file: {what}{reason}", where=self.path)


def _shape_fault(shape: Sequence[int]) -> str:
    """Why a shape cannot be, or nothing."""
    if len(shape) > _AXES:
        return f"has {len(shape)} axes, wanted at most {_AXES}"
    if max(shape, default=0) > _LARGEST_DIMENSION:
        return f"has an axis of {max(shape)} elements, wanted at most {_LARGEST_DIMENSION}"
    return ""


# --- npy ----------------------------------------------------------------------


def read_npy(content: bytes, name: str, path: Path) -> Npy:
    """Check the header of an array file against its bytes.

    Args:
        content: the whole file.
        name: of the array.
        path: of the archive that it stands in.

    Raises:
        ModelError: what is wrong, with the array.
    """

    def refuse(what: str) -> NoReturn:
        raise ModelError(f"is damaged or no .npz file: array {name} {what}", where=path)

    version = content[6:8]
    if not content.startswith(b"\x93NUMPY") or version not in (b"\1\0", b"\2\0", b"\3\0"):
        refuse("has no header of numpy's")
    layout = "<H" if version == b"\1\0" else "<I"
    start = 8 + struct.calcsize(layout)
    if len(content) < start:
        refuse("ends in its header")
    (length,) = struct.unpack_from(layout, content, 8)
    if length > min(_NPY_HEADER_BYTES, len(content) - start):
        refuse(f"claims a header of {length} bytes, it has {len(content)} in all")
    match = _NPY.fullmatch(content[start : start + length].decode("latin-1"))
    descr, fortran, shape = match.group("descr", "fortran", "shape") if match else (None, None, None)
    if descr is None or fortran is None or shape is None:
        refuse("has no header of type, order and shape")
    if not _NPY_TYPE.fullmatch(descr):
        refuse(f"is of type '{descr}', wanted numbers")
    dimensions = tuple(int(size) for size in shape.split(",") if size.strip())
    if fault := _shape_fault(dimensions):
        refuse(fault)
    start += length
    need = math.prod(dimensions) * int(descr[-1])
    if need != len(content) - start:
        refuse(f"is {descr} {dimensions} and needs {need} bytes, it has {len(content) - start}")
    return Npy(descr, fortran == "True", dimensions, start)
