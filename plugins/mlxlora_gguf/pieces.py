"""A SentencePiece vocabulary as the file that SentencePiece reads, a protocol buffer.

The format: https://protobuf.dev/programming-guides/encoding/ and
``sentencepiece_model.proto`` of https://github.com/google/sentencepiece.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from mlxlora_core.api import ModelError
from mlxlora_gguf.vocabulary import BYTE, CONTROL, DEFINED, UNKNOWN, Vocabulary

_VARINT, _BYTES, _FIXED_32 = 0, 2, 5
SPACE = "\u2581"  # how SentencePiece writes a space
_BPE = 2  # type of the model
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def sentencepiece_model(vocabulary: Vocabulary, path: Path) -> bytes:
    """The contents of tokenizer.model, of a vocabulary of model ``llama``.

    Raises:
        ModelError: it lacks scores or an unknown token, or has some bytes only.
    """
    if not vocabulary.scores:
        raise ModelError("has a tokenizer of model llama without scores (tokenizer.ggml.scores)", where=path)
    if "unk" not in vocabulary.ids:
        raise ModelError("has a tokenizer of model llama without an unknown token", where=path)
    types = _types(vocabulary)
    count = types.count(BYTE)
    wrong = [
        t
        for t, kind in zip(vocabulary.tokens, types, strict=True)
        if kind == BYTE and not _BYTE_PIECE.fullmatch(t)
    ]
    if count not in (0, 256) or wrong:
        what = f"a token of type byte that is {wrong[0]!r:.60}" if wrong else f"{count} tokens of type byte"
        raise ModelError(f"has {what}, wanted <0x00> to <0xFF>, or none", where=path)
    pieces = zip(vocabulary.tokens, vocabulary.scores, types, strict=True)
    content = [_field(1, _piece(text, score, kind)) for text, score, kind in pieces]
    content += [
        _field(2, b"".join(_trainer(vocabulary, count == 256))),
        _field(3, b"".join(_normalizer(vocabulary))),
    ]
    return b"".join(content)


def _types(vocabulary: Vocabulary) -> list[int]:
    """The types of the pieces.

    SentencePiece knows one unknown piece, and finds begin and end among the control pieces.
    """
    types = [DEFINED if kind == UNKNOWN else kind for kind in vocabulary.types]
    for name in ("bos", "eos"):
        if name in vocabulary.ids:
            types[vocabulary.ids[name]] = CONTROL
    types[vocabulary.ids["unk"]] = UNKNOWN
    return types


def _piece(text: str, score: float, kind: int) -> bytes:
    """One piece; of those that are found before a text is split GGUF has the spaces as they are."""
    if kind == DEFINED:
        text = text.replace(" ", SPACE)
    return _field(1, text.encode()) + struct.pack("<Bf", 2 << 3 | _FIXED_32, score) + _number(3, kind)


def _trainer(vocabulary: Vocabulary, byte_fallback: bool) -> Iterator[bytes]:
    """What a model tells of its training, from which the reader takes its kind and its special pieces."""
    yield _number(3, _BPE)
    yield _number(4, len(vocabulary.tokens))
    yield _number(35, byte_fallback)
    for field, name in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad")):
        yield _number(field, vocabulary.ids.get(name, -1))
    for field, name in ((45, "unk"), (46, "bos"), (47, "eos"), (48, "pad")):
        if name in vocabulary.ids:
            yield _field(field, vocabulary.tokens[vocabulary.ids[name]].encode())


def _normalizer(vocabulary: Vocabulary) -> Iterator[bytes]:
    """A text is taken as it is, with a space in front unless the file says otherwise."""
    yield _field(1, b"identity")
    yield _number(3, vocabulary.flags.get("add_space_prefix", True))
    yield _number(4, False)  # remove_extra_whitespaces
    yield _number(5, True)  # escape_whitespaces


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes."""
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    """A field that is a number."""
    return _varint(number << 3 | _VARINT) + _varint(value % (1 << 64))


def _varint(value: int) -> bytes:
    """A number, seven bits in each byte, the lowest first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
