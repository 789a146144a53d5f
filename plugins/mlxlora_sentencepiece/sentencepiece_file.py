"""A SentencePiece model, walked field by field before its C++ reader sees it.

The file is a protocol buffer. Its reader takes pieces that are no text, types
that do not exist and lengths as they come; what it makes of them shows up later
as an error in the middle of a text.

The format: https://protobuf.dev/programming-guides/encoding/ and
``sentencepiece_model.proto`` of https://github.com/google/sentencepiece.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from mlxlora_core.api import ModelError

FILE_BYTES = 64 << 20  # the largest in use have 5 MB

_PIECES_LIMIT = 1 << 20
_PIECE_BYTES = 4096
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_PIECES, _MESSAGES = 1, {2, 3, 4, 5}  # fields of the model
_NORMAL, _DEFINED, _BYTE = 1, 4, 6  # types of a piece: the first, user-defined, the last
_BYTE_PIECE = re.compile(rb"<0x[0-9A-F]{2}>")


class _Fault(Exception):
    """What keeps the bytes from being a model."""


def check_model(content: bytes, path: Path) -> list[str]:
    """The user-defined pieces of a SentencePiece model; bytes that are none are refused.

    Raises:
        ModelError: with what is wrong.
    """
    try:
        pieces, defined = _check_fields(content)
    except (_Fault, IndexError) as fault:
        reason = str(fault) if isinstance(fault, _Fault) else f"it ends in a field, at {len(content)} bytes"
        _refuse(reason, path)
    if not 0 < pieces <= _PIECES_LIMIT:
        _refuse(f"it has {pieces} pieces, wanted 1 to {_PIECES_LIMIT}", path)
    return defined


def _check_fields(content: bytes) -> tuple[int, list[str]]:
    """How many pieces there are, all of them proper, and which are user-defined."""
    pieces, defined = 0, []
    seen: set[int] = set()
    for field, wire, start, stop in _fields(content, 0, len(content)):
        if field == _PIECES and wire == _BYTES:
            piece, kind = _check_piece(content, start, stop, pieces)
            pieces += 1
            if kind == _DEFINED:
                defined.append(piece.decode())
        elif field in _MESSAGES and wire == _BYTES:
            if field in seen:
                raise _Fault(f"its field {field} is there twice")
            seen.add(field)
            for _ in _fields(content, start, stop):
                pass
        elif field <= max(_MESSAGES):
            raise _Fault(f"its field {field} is of another kind")
    return pieces, defined


def _check_piece(content: bytes, start: int, stop: int, number: int) -> tuple[bytes, int]:
    """The text of a piece and its type."""
    piece, kind, scored = None, _NORMAL, False
    for field, wire, begin, end in _fields(content, start, stop):
        if (field, wire) == (1, _BYTES):
            piece = content[begin:end]
        elif (field, wire) == (2, _FIXED_32):
            scored = True
        elif (field, wire) == (3, _VARINT):
            kind = _varint(content, begin)[0]
        elif field <= 3:
            raise _Fault(f"piece {number} has a field {field} of another kind")
    if not piece or len(piece) > _PIECE_BYTES:
        raise _Fault(f"piece {number} has {len(piece or b'')} bytes, wanted 1 to {_PIECE_BYTES}")
    if not _NORMAL <= kind <= _BYTE or not scored:
        raise _Fault(f"piece {number} has no score, or is of type {kind}, wanted {_NORMAL} to {_BYTE}")
    if kind == _BYTE and not _BYTE_PIECE.fullmatch(piece):
        raise _Fault(f"piece {number} is no byte")
    if not piece.isascii():
        try:
            piece.decode()
        except UnicodeDecodeError:
            raise _Fault(f"piece {number} is no UTF-8") from None
    return piece, kind


def _fields(content: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, first byte, byte behind the last) of the value of each field."""
    while at < stop:
        tag, start = _varint(content, at)
        wire = tag & 7
        if wire == _BYTES:
            length, start = _varint(content, start)
            at = start + length
        elif wire == _VARINT:
            _, at = _varint(content, start)
        elif wire in (_FIXED_32, _FIXED_64):
            at = start + (4 if wire == _FIXED_32 else 8)
        else:
            raise _Fault(f"byte {at} begins no field")
        if at > stop:
            where = (
                f"is {len(content)} bytes, a field needs {at}"
                if stop == len(content)
                else f"ends at byte {at}"
            )
            raise _Fault(f"a field goes past its end: {where}")
        if not tag >> 3:
            raise _Fault(f"a field before byte {at} has the number 0")
        yield tag >> 3, wire, start, at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of up to ten bytes, seven bits in each, and the byte behind it."""
    value = content[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for shift in range(7, 70, 7):
        at += 1
        byte = content[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
    raise _Fault(f"a number before byte {at} has no end")


def _refuse(reason: str, path: Path) -> NoReturn:
    raise ModelError(f"is not a SentencePiece model: {reason}", where=path, fix="download the file again")
