"""What a SentencePiece model says, the way back of :mod:`mlxlora_gguf.pieces`.

The format: https://protobuf.dev/programming-guides/encoding/ and
``sentencepiece_model.proto`` of https://github.com/google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlxlora_core.api import ModelError
from mlxlora_gguf.vocabulary import BYTE, NORMAL

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_BPE = 2
_PIECES_LIMIT, _PIECE_BYTES = 1 << 20, 4096
#: fields of the trainer's settings with ids, and what those are where they are left out
_IDS = {40: ("unk", 0), 41: ("bos", 1), 42: ("eos", 2), 43: ("pad", -1)}


@dataclass
class Pieces:
    """A model of SentencePiece.

    Attributes:
        texts: of the pieces, by id.
        scores: of each.
        types: of each; the numbers are those of GGUF.
        ids: of the special pieces that there are: ``bos``, ``eos``, ``unk``, ``pad``.
        adds_space: whether a text gets a space in front.
        plain: whether it takes texts as they are, spaces apart.
    """

    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    ids: Mapping[str, int] = field(default_factory=dict)
    adds_space: bool = True
    plain: bool = True


class _Fault(Exception):
    """What keeps the bytes from being a model."""


def is_pieces(content: bytes) -> bool:
    """Whether a file looks like a model of SentencePiece: it begins with a piece."""
    return content[:1] == b"\x0a" and b"\n" in content[2:8]


def read_pieces(content: bytes, path: Path) -> Pieces:
    """The pieces of a model of kind BPE.

    Raises:
        ModelError: it is damaged, or of another kind.
    """
    try:
        found, kind = _read(content)
    except (_Fault, IndexError, struct.error, UnicodeDecodeError) as fault:
        why = str(fault) if isinstance(fault, _Fault) else "it ends within a field, or has a piece of no text"
        raise ModelError(f"is no SentencePiece model: {why}", where=path, fix="download it again") from None
    if kind != _BPE:
        raise ModelError(
            f"is a SentencePiece model of kind {kind}, which llama.cpp does not split as it does; "
            f"wanted BPE ({_BPE})",
            where=path,
        )
    return found


def _read(content: bytes) -> tuple[Pieces, int]:
    found, kind, ids = Pieces(), 1, dict(_IDS.values())
    for number, value in _fields(content):
        if number == 1 and isinstance(value, bytes):
            _add(found, value)
        elif number == 2 and isinstance(value, bytes):
            for key, setting in _fields(value):
                if key == 3 and isinstance(setting, int):
                    kind = setting
                elif key in _IDS and isinstance(setting, int):
                    ids[_IDS[key][0]] = setting if setting < 1 << 31 else -1
        elif number == 3 and isinstance(value, bytes):
            _normalizer(found, value)
    if not found.texts:
        raise _Fault("it has no pieces")
    found.ids = {name: number for name, number in ids.items() if 0 <= number < len(found.texts)}
    return found, kind


def _add(found: Pieces, content: bytes) -> None:
    """One more piece."""
    text, score, kind = b"", 0.0, NORMAL
    for number, value in _fields(content):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    if len(found.texts) >= _PIECES_LIMIT:
        raise _Fault(f"it has more than {_PIECES_LIMIT} pieces")
    if not 0 < len(text) <= _PIECE_BYTES or not NORMAL <= kind <= BYTE:
        raise _Fault(f"piece {len(found.texts)} is of type {kind} and {len(text)} bytes")
    found.texts.append(text.decode())
    found.scores.append(score)
    found.types.append(kind)


def _normalizer(found: Pieces, content: bytes) -> None:
    """How a text is prepared: nothing but spaces, or more."""
    found.plain = False  # extra spaces are taken out where nothing is said
    charsmap = b""
    for number, value in _fields(content):
        if number == 2 and isinstance(value, bytes):
            charsmap = value
        elif number == 3:
            found.adds_space = bool(value)
        elif number == 4:
            found.plain = not value
    found.plain = found.plain and not charsmap


def _fields(content: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of each field."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(content, at)
            yield tag >> 3, value
        elif wire == _BYTES:
            length, at = _varint(content, at)
            if length > len(content) - at:
                raise _Fault("a field goes past its end")
            yield tag >> 3, content[at : at + length]
            at += length
        elif wire == _FIXED_32:
            yield tag >> 3, struct.unpack_from("<f", content, at)[0]
            at += 4
        elif wire == _FIXED_64:
            at += 8
        else:
            raise _Fault(f"byte {at} begins no field")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits in each byte, and where the next thing begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Fault("a number has more than ten bytes")


def is_list_of_ranks(content: bytes) -> bool:
    """Whether a file is Meta's list of a token in base64 and its rank in each line."""
    line: Sequence[bytes] = content[:200].split(b"\n", 1)[0].split()
    return len(line) == 2 and line[1].isdigit()
