"""The Rust library ``tokenizers``, whose faults and panics become errors of mlxlora."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer, models

from mlxlora_core.api import ModelError

_PANIC = "PanicException"  # of the bridge between Rust and Python: an exception that no module exports


def load(content: str, where: Path) -> Tokenizer:
    """The library's tokenizer of a ``tokenizer.json``, which cuts nothing and fills up nothing.

    Raises:
        ModelError: the library cannot read it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns where a process forks
    with _told(where):
        tokenizer = Tokenizer.from_str(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as the letters that they are written with
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


def encode(tokenizer: Tokenizer, text: str, where: Path) -> Encoding:
    """The tokens of a text, and nothing in front of it or behind it.

    Raises:
        ModelError: the library fails, as it does when a pattern tries too many ways to match.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except BaseException as fault:
        raise _error(fault, where) from None


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
