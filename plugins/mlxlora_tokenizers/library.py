"""The Rust library ``tokenizers``, whose faults and panics become errors of mlxlora."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from mlxlora_core.api import ModelError

# What a pattern that tries every way to match would be found out by.
_PROBES = ("a" * 60 + "!", " " * 60 + "x", "1" * 60 + ".", "\n" * 60 + "x", "ab" * 30 + "!", "A" * 60)
_PANIC = "PanicException"  # of the bridge between Rust and Python: an exception that no module exports


def load(content: str, where: Path) -> Tokenizer:
    """The library's tokenizer of a ``tokenizer.json``, which takes special tokens in a text for letters.

    Raises:
        ModelError: the library cannot read it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns where a process forks
    with _quiet(), _told(where):
        tokenizer = Tokenizer.from_str(content)
        tokenizer.encode_special_tokens = True  # as the letters that they are written with
        for text in _PROBES:
            tokenizer.encode(text, add_special_tokens=False)
    return tokenizer


def assemble(document: Mapping[str, Any], where: Path) -> Tokenizer:
    """The same of byte-pair encoding that stands in no file, without writing it as JSON.

    Raises:
        ModelError: the library cannot use it.
    """
    model = document["model"]
    nothing = {"type": "BPE", "vocab": {}, "merges": []}
    tokenizer = load(json.dumps({**document, "model": nothing, "added_tokens": []}), where)
    with _told(where):
        tokenizer.model = models.BPE(
            vocab=model["vocab"], merges=model["merges"], ignore_merges=model["ignore_merges"]
        )
        for token in document["added_tokens"]:
            tokenizer.add_tokens([AddedToken(**{key: token[key] for key in token if key != "id"})])
    return tokenizer


def ids(tokenizer: Tokenizer, text: str, where: Path) -> list[int]:
    """The ids of a text, and nothing in front of it or behind it.

    Raises:
        ModelError: the library fails, as it does when a pattern tries too many ways to match.
    """
    with _told(where):  # twice as fast as one text alone, for which places are worked out
        found: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return found


def places(tokenizer: Tokenizer, text: str, where: Path) -> list[tuple[int, int]]:
    """Where each of those begins and ends in the text.

    Raises:
        ModelError: the library fails.
    """
    with _told(where):
        found: list[tuple[int, int]] = tokenizer.encode(text, add_special_tokens=False).offsets
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, what the library writes to stderr is lost: it tells of a panic before it raises one."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    nothing = os.open(os.devnull, os.O_RDONLY)  # to which nothing can be written
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@contextmanager
def _told(where: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as fault:
        raise _error(fault, where) from None


def _error(fault: BaseException, where: Path) -> BaseException:
    """What to raise in the place of a fault: an interrupt or a want of memory stays what it is."""
    if isinstance(fault, MemoryError) or not (isinstance(fault, Exception) or type(fault).__name__ == _PANIC):
        return fault
    return ModelError(f"the library tokenizers cannot use it: {fault}", where=where, fix="download it again")
