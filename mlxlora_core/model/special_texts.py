"""Texts that are spelled like special tokens: ``<s>``, ``[INST]``, ``<|eot_id|>``."""

from __future__ import annotations

import re
from collections.abc import Set

# What is spelt as such tokens are, and which of it many models have.
_SHAPE = re.compile(r"<</?SYS>>|<[^<>\[\]\s]{1,60}>|\[[^\[\]<>\s]{1,60}\]")
_KNOWN = re.compile(
    r"</?s>|<(?:bos|eos|pad|unk|mask|sep|cls)>"
    r"|<\|[\w.:/-]+\|>|<\uff5c[\w\u2581.-]+\uff5c>"
    r"|<(?:start|end)_of_(?:turn|image)>|<end_of_utterance>|<</?SYS>>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS)\]|\[TOOL_CALLS\]"
    r"|<(?:PRE|SUF|MID|EOT)>|<fim_(?:prefix|middle|suffix|pad)>"
)


def special_texts(text: str, names: Set[str] = frozenset()) -> set[str]:
    """What a text holds that is written as tokens are that begin and end texts and turns.

    Args:
        text: to look at.
        names: such texts of one tokenizer, beside those of many.
    """
    return {spelt for spelt in _SHAPE.findall(text) if spelt in names or _KNOWN.fullmatch(spelt)}
