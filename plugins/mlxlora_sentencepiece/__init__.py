"""Tokenizer ``sentencepiece``: the ``tokenizer.model`` of Llama 1, Llama 2 and Mistral."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mlxlora_core.api import MlxloraError, NoOptions, Tokenizer, TokenizerFiles, TokenizerLoader, hookimpl
from mlxlora_core.files import open_regular, read_some

FILE = "tokenizer.model"

_HEAD_BYTES = 4096
_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


def detect(files: TokenizerFiles) -> bool:
    """Whether there is a ``tokenizer.model``, and it is no list of ranks as Llama 3 has under that name."""
    source = files.get(FILE)
    if source is None or isinstance(source, bytes):
        return source is not None and not _RANKS.match(source)
    try:
        with open_regular(source) as file:
            return not _RANKS.match(read_some(file, _HEAD_BYTES, source))
    except MlxloraError:  # what is wrong with it is told when it is opened
        return True


def open_files(files: TokenizerFiles, options: NoOptions) -> Tokenizer:
    """The tokenizer in those files; see :class:`mlxlora_sentencepiece.tokenizer.SentencePieceTokenizer`."""
    from mlxlora_core.chat import find_template, read_tokenizer_settings
    from mlxlora_sentencepiece.tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(files[FILE], read_tokenizer_settings(files), find_template(files))


@hookimpl
def mlxlora_tokenizers() -> Iterable[TokenizerLoader]:
    """The one tokenizer of this plugin."""
    summary = "SentencePiece models, as Llama 2 and Mistral have them, with their forms of conversations"
    return [TokenizerLoader(name="sentencepiece", summary=summary, detect=detect, open=open_files)]
