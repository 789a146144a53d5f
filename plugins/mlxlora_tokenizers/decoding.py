"""What each token adds to a text, by the ``decoder`` of a ``tokenizer.json``.

The decoders of language models take tokens one by one: what a token adds depends on
no other. So they are read here as steps from the spelling of a token to its bytes,
and any ids can be decoded in parts. What a decoder does to the start of a text alone
is left out: whether a text begins with a space that was put there is seen elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, listing

#: text of a token, or its bytes once they are known -> the same after one step
Step = Callable[["str | bytes"], "str | bytes"]

SPACE = "\u2581"  # how a space is written inside a token

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CLEANED = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")),
    *((" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


def byte_letters() -> list[str]:
    """The letter that byte-level vocabularies write each byte with.

    A byte that is a visible character of Latin-1 is that character; the others are the
    characters from U+0100 on, in order.
    """
    letters = [chr(byte) for byte in range(256)]
    hidden = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
    for number, byte in enumerate(hidden):
        letters[byte] = chr(0x100 + number)
    return letters


class TokenTexts(dict[int, bytes]):
    """id -> what it adds to a text, worked out when it is first asked for; nothing for ids without a token.

    Args:
        decoder: that of a ``tokenizer.json``.
        written: id -> how the token is written.
        added: ids of the tokens that are text as they are written.
        silent: ids of those that are no text.
        where: for messages.

    Raises:
        ModelError: a decoder of another kind, or one with settings of another kind.
    """

    def __init__(
        self,
        decoder: Any,
        written: Mapping[int, str],
        *,
        added: Container[int],
        silent: Container[int],
        where: Path,
    ) -> None:
        super().__init__()
        self._bytes, self._written = byte_steps(decoder, where), written
        self._apart = b" " if decoder is None or decoder.get("type") == "WordPiece" else b""
        self._added, self._silent = added, silent

    def __missing__(self, token: int) -> bytes:
        text = self._written.get(token)
        if text is None or token in self._silent:
            added = b""
        else:
            added = self._apart + text.encode() if token in self._added else self._bytes(text)
        self[token] = added
        return added


def byte_steps(decoder: Any, where: Path) -> Callable[[str], bytes]:
    """A function from the spelling of a token to the bytes that it adds to a text.

    Raises:
        ModelError: a decoder of another kind, or one with settings of another kind.
    """
    steps = _steps(decoder, where)

    def added(token: str) -> bytes:
        done: str | bytes = token
        for step in steps:
            done = step(done)
        return done if isinstance(done, bytes) else done.encode()

    return added


def _steps(decoder: Any, where: Path) -> list[Step]:
    if decoder is None:
        return [lambda token: token if isinstance(token, bytes) else f" {token}"]
    kind = decoder.get("type") if isinstance(decoder, dict) else None
    if kind == "Sequence" and isinstance(decoder.get("decoders"), list):
        return [step for part in decoder["decoders"] for step in _steps(part, where)]
    if isinstance(kind, str) and kind in _KINDS:
        try:
            return _KINDS[kind](decoder)
        except (KeyError, TypeError):
            raise ModelError(f"its decoder {kind} has settings of another kind", where=where) from None
    known = listing(["Sequence", *_KINDS], 20)
    raise ModelError(f"its decoder is {kind!r}, mlxlora knows {known}", where=where)


def _byte_level(decoder: Mapping[str, Any]) -> list[Step]:
    table = {letter: byte for byte, letter in enumerate(byte_letters())}

    def step(token: str | bytes) -> str | bytes:
        if isinstance(token, bytes) or not all(letter in table for letter in token):
            return token
        return bytes(table[letter] for letter in token)

    return [step]


def _byte_fallback(decoder: Mapping[str, Any]) -> list[Step]:
    def step(token: str | bytes) -> str | bytes:
        found = None if isinstance(token, bytes) else _BYTE.fullmatch(token)
        return token if found is None else bytes([int(found[1], 16)])

    return [step]


def _replace(decoder: Mapping[str, Any]) -> list[Step]:
    return [_replaced(_text(decoder["pattern"]["String"]), _text(decoder["content"]))]


def _metaspace(decoder: Mapping[str, Any]) -> list[Step]:
    return [_replaced(_text(decoder.get("replacement", SPACE)), " ")]


def _suffix(decoder: Mapping[str, Any]) -> list[Step]:
    return [_replaced(_text(decoder.get("suffix", "</w>")), " ")]


def _replaced(old: str, new: str) -> Step:
    return lambda token: token if isinstance(token, bytes) or not old else token.replace(old, new)


def _word_piece(decoder: Mapping[str, Any]) -> list[Step]:
    prefix, cleanup = _text(decoder.get("prefix", "##")), decoder.get("cleanup", True)

    def step(token: str | bytes) -> str | bytes:
        if isinstance(token, bytes):
            return token
        token = token.removeprefix(prefix) if prefix and token.startswith(prefix) else f" {token}"
        for spaced, joined in _CLEANED if cleanup else ():
            token = token.replace(spaced, joined)
        return token

    return [step]


def _nothing(decoder: Mapping[str, Any]) -> list[Step]:
    return []


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_KINDS: dict[str, Callable[[Mapping[str, Any]], list[Step]]] = {
    "ByteLevel": _byte_level,
    "ByteFallback": _byte_fallback,
    "Replace": _replace,
    "Metaspace": _metaspace,
    "WordPiece": _word_piece,
    "BPEDecoder": _suffix,
    "Fuse": _nothing,
    "Strip": _nothing,
}
