"""A byte-level BPE vocabulary as a ``tokenizer.json`` of Hugging Face's tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, listing
from mlxlora_gguf.splitting import GPT_2, RULES, Rule
from mlxlora_gguf.vocabulary import CONTROL, DEFINED, UNKNOWN, Vocabulary

_UNSTATED = ("", "default")


def find_rule(vocabulary: Vocabulary, path: Path) -> Rule:
    """How the tokenizer splits a text; that of GPT-2 where the file does not say.

    Raises:
        ModelError: a rule that is not known.
    """
    if vocabulary.pre in _UNSTATED:
        return GPT_2
    if vocabulary.pre not in RULES:
        raise ModelError(
            f"splits text by the rule {vocabulary.pre!r:.60} (tokenizer.ggml.pre), which is not known; "
            f"known are {listing(sorted(RULES), 50)}",
            where=path,
        )
    return RULES[vocabulary.pre]


def assumption(vocabulary: Vocabulary) -> Iterator[str]:
    """What is assumed of a vocabulary that does not say how it splits a text."""
    if vocabulary.pre in _UNSTATED:
        yield (
            "the file does not say how its tokenizer splits a text (tokenizer.ggml.pre); the rule of GPT-2 "
            "is taken, which may give other tokens than the model was trained with"
        )


def tokenizer_json(vocabulary: Vocabulary, rule: Rule, begin: bool, path: Path) -> bytes:
    """The contents of tokenizer.json.

    Args:
        vocabulary: of model ``gpt2``.
        rule: by which it splits.
        begin: whether a text begins with the begin token.
        path: of the file, for messages.

    Raises:
        ModelError: a merge of what are no tokens.
    """
    tokens = {token: number for number, token in enumerate(vocabulary.tokens)}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added(vocabulary)),
        "normalizer": None,
        "pre_tokenizer": _splitter(rule),
        "post_processor": _frame(vocabulary, begin),
        "decoder": _byte_level(False),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.ignore_merges,
            "vocab": tokens,
            "merges": _merges(vocabulary, tokens, path),
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _added(vocabulary: Vocabulary) -> Iterator[Mapping[str, Any]]:
    """The tokens that are found in a text before it is split."""
    ends = set(vocabulary.ends)
    for number, kind in enumerate(vocabulary.types):
        if kind in (CONTROL, DEFINED, UNKNOWN):
            yield {
                "id": number,
                "content": vocabulary.tokens[number],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != DEFINED or number in ends,
            }


def _merges(
    vocabulary: Vocabulary, tokens: Mapping[str, int], path: Path
) -> Sequence[str] | Sequence[tuple[str, str]]:
    """What is merged, as ``"a b"``, which is read fastest, or in pairs where a token has a space."""
    if not vocabulary.merges:
        raise ModelError("has a tokenizer of model gpt2 without merges (tokenizer.ggml.merges)", where=path)
    for merge in vocabulary.merges:
        first, _, second = merge.partition(" ")
        if " " in second or not (first in tokens and second in tokens and first + second in tokens):
            return [_pair(merge, tokens, path) for merge in vocabulary.merges]
    return vocabulary.merges


def _pair(merge: str, tokens: Mapping[str, int], path: Path) -> tuple[str, str]:
    """What stands before and behind the first space that is not the first letter."""
    at = merge.find(" ", 1)
    first, second = merge[:at], merge[at + 1 :]
    if at < 0 or not (first in tokens and second in tokens and first + second in tokens):
        raise ModelError(f"has a merge {merge!r:.100} that makes no token of two others", where=path)
    return first, second


def _splitter(rule: Rule) -> Mapping[str, Any]:
    """The pre-tokenizer."""
    steps: list[Mapping[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in rule.patterns
    ]
    if rule.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    return {"type": "Sequence", "pretokenizers": [*steps, _byte_level(rule.gpt2)]}


def _byte_level(split: bool) -> Mapping[str, Any]:
    """Bytes as letters, after the pattern of GPT-2 has split the text if it is to."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": split}


def _frame(vocabulary: Vocabulary, begin: bool) -> Mapping[str, Any] | None:
    """What is put before and behind a text."""
    front = ["bos"] if begin else []
    behind = ["eos"] if vocabulary.flags.get("add_eos_token") and "eos" in vocabulary.ids else []
    if not front and not behind:
        return None
    special = {name: vocabulary.tokens[vocabulary.ids[name]] for name in front + behind}

    def framed(*texts: str) -> list[Mapping[str, Any]]:
        frame: list[Mapping[str, Any]] = []
        for kind, text in enumerate(texts):
            frame += [{"SpecialToken": {"id": special[name], "type_id": kind}} for name in front]
            frame += [{"Sequence": {"id": text, "type_id": kind}}]
            frame += [{"SpecialToken": {"id": special[name], "type_id": kind}} for name in behind]
        return frame

    return {
        "type": "TemplateProcessing",
        "single": framed("A"),
        "pair": framed("A", "B"),
        "special_tokens": {
            token: {"id": token, "ids": [vocabulary.ids[name]], "tokens": [token]}
            for name, token in special.items()
        },
    }
