"""How byte-level tokenizers split a text before they merge, by the name that GGUF files give the rule.

The names and which rule each stands for: ``src/llama-vocab.cpp`` of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The pieces of the patterns in use. A text is split into what they match, and what is between.
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FRONT = r"[^\r\n\p{L}\p{N}]?"
_SIGNS_OR_PATH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _cased(behind: str) -> str:
    """Words that end where a small letter is followed by a capital one."""
    return f"{_FRONT}{_UPPER}*{_LOWER}+{behind}|{_FRONT}{_UPPER}+{_LOWER}*{behind}"


_THREE_DIGITS = "|".join((_SHORT, _WORD, r"\p{N}{1,3}", _SIGNS, _SPACES))
_ONE_DIGIT = "|".join((_SHORT, _WORD, r"\p{N}", _SIGNS, _SPACES))
_WITH_MARKS = "|".join(
    (_SHORT, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _SPACES)
)
_TEKKEN = "|".join((_cased(""), r"\p{N}", _SIGNS_OR_PATH, _SPACES))
_GPT_4O = "|".join((_cased(_SHORT + "?"), r"\p{N}{1,3}", _SIGNS_OR_PATH, _SPACES))


@dataclass(frozen=True)
class Rule:
    """How a tokenizer splits and merges.

    Attributes:
        patterns: regular expressions by which a text is split, one after another.
        digits: whether each digit is by itself.
        gpt2: whether the pattern of GPT-2 splits what is left.
        ignore_merges: whether a part that is a token is taken whole, whatever the merges say.
        bos: whether a text begins with a begin token, where the file does not say.
    """

    patterns: Sequence[str] = ()
    digits: bool = False
    gpt2: bool = False
    ignore_merges: bool = False
    bos: bool = False


GPT_2 = Rule(gpt2=True)
_DIGITS = Rule(digits=True, gpt2=True)
_LLAMA_3 = Rule((_THREE_DIGITS,), ignore_merges=True, bos=True)
_QWEN_2 = Rule((_ONE_DIGIT,))

RULES = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "gigachat", "mellum", "a.x-4.0", "exaone4"), GPT_2),
    **dict.fromkeys(("trillion", "granite-docling", "jais"), GPT_2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA_3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Rule((_THREE_DIGITS,))),
    "glm4": Rule((_THREE_DIGITS,), ignore_merges=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2"), _QWEN_2),
    "qwen35": Rule((_WITH_MARKS,)),
    "tekken": Rule((_TEKKEN,), ignore_merges=True, bos=True),
    "deepseek-coder": Rule(
        ("[\\r\\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"), digits=True
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), Rule((_GPT_4O,))),
}
