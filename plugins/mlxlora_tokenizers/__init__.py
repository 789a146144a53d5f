"""Tokenizer ``tokenizers``: ``tokenizer.json``, the ``tokenizer.model`` of Llama 3, and ``tekken.json``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mlxlora_core.api import MlxloraError, NoOptions, Tokenizer, TokenizerFiles, TokenizerLoader, hookimpl
from mlxlora_core.files import open_regular, read_some

#: the files that are opened, the one that is taken first where several are there
TOKENIZER, RANKS, TEKKEN = "tokenizer.json", "tokenizer.model", "tekken.json"

_HEAD_BYTES = 4096
_RANK = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


def detect(files: TokenizerFiles) -> bool:
    """Whether there is a ``tokenizer.json``, a ``tekken.json``, or a ``tokenizer.model`` that lists ranks."""
    return TOKENIZER in files or TEKKEN in files or (RANKS in files and _lists_ranks(files[RANKS]))


def _lists_ranks(file: Path | bytes) -> bool:
    """Whether a file begins as those of Llama 3 do, with bytes in base64 and their rank."""
    if isinstance(file, bytes):
        return _RANK.match(file[:_HEAD_BYTES]) is not None
    try:
        with open_regular(file) as opened:
            return _RANK.match(read_some(opened, _HEAD_BYTES, file)) is not None
    except MlxloraError:  # whoever opens the file tells what is wrong with it
        return False


def open_files(files: TokenizerFiles, options: NoOptions) -> Tokenizer:
    """The tokenizer in those files; see :class:`mlxlora_tokenizers.tokenizer.LibraryTokenizer`."""
    from mlxlora_tokenizers.opening import open_tokenizer

    return open_tokenizer(files)


@hookimpl
def mlxlora_tokenizers() -> Iterable[TokenizerLoader]:
    """The one tokenizer of this plugin."""
    summary = "tokenizer.json of Hugging Face, Llama 3's tokenizer.model and tekken.json, with chat templates"
    return [TokenizerLoader(name="tokenizers", summary=summary, detect=detect, open=open_files)]
