"""Byte-pair vocabularies that list byte strings by rank, as tiktoken has them, as a ``tokenizer.json``.

Such a list names no merges: two neighbours may become one token wherever their bytes
together are one, the one of the lowest rank first. So every way to cut a token in two
tokens is a merge, in the order of the ranks of what they make.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError
from mlxlora_tokenizers.decoding import byte_letters
from mlxlora_tokenizers.tokenizer_json import Document

_TOKEN_BYTES = 512

#: how each byte of a token is written
_LETTERS = {byte: ord(letter) for byte, letter in enumerate(byte_letters())}


def written(token: bytes) -> str:
    """How a byte-level vocabulary writes a token."""
    return token.decode("latin-1").translate(_LETTERS)


def check_ranks(tokens: Sequence[bytes], where: Path) -> None:
    """Refuse a list by which some text has no ids.

    Args:
        tokens: the bytes of each, by rank.
        where: for messages.

    Raises:
        ModelError: a token is empty, too long or there twice, or a byte has none.
    """
    if any(not 0 < len(token) <= _TOKEN_BYTES for token in tokens):
        raise ModelError(f"has a token that is empty or longer than {_TOKEN_BYTES} bytes", where=where)
    known = set(tokens)
    if len(known) < len(tokens):
        raise ModelError("has a token twice", where=where)
    absent = [byte for byte in range(256) if bytes([byte]) not in known]
    if absent:
        raise ModelError(f"has no token for {len(absent)} of the 256 bytes", where=where)


def document(tokens: Sequence[bytes], specials: Iterable[str], pattern: str, first: int) -> Document:
    """The ``tokenizer.json`` of such a list.

    Args:
        tokens: the bytes of each, by rank.
        specials: the special tokens by id; their ids are those that the list leaves free.
        pattern: the regular expression that splits texts into words.
        first: the id of rank 0: 0 where the special tokens stand behind, else their number.
    """
    words = [written(token) for token in tokens]
    begin = 0 if first else len(words)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    added = [_special(begin + number, content) for number, content in enumerate(specials)]
    vocab = {word: first + rank for rank, word in enumerate(words)}
    vocab |= {token["content"]: token["id"] for token in added}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a word that is a token is that token
            "vocab": vocab,
            "merges": _merges(words),
        },
    }


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in the order in which they are tried."""
    rank = {word: number for number, word in enumerate(words)}.get
    found = []
    for word in words:
        ways = []
        for cut in range(1, len(word)):
            left = rank(word[:cut])
            if left is not None:
                right = rank(word[cut:])
                if right is not None:
                    ways.append((left, right))
        ways.sort()
        found += [(words[left], words[right]) for left, right in ways]
    return found


def _special(number: int, content: str) -> Mapping[str, Any]:
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
