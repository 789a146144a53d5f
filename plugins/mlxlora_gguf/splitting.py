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
_LINE_END = "[\\r\\n]"
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_OF_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
#: the letters of a word of deepseek-llm, from and to: those with two cases, but for many that Unicode has
_TWO_CASES = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a "
    "38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf "
    "1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d "
    "1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 "
    "1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f "
    "2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f "
    "a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 "
    "104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
)
_LETTERS = "".join("-".join(chr(int(end, 16)) for end in run.split("-")) for run in _TWO_CASES.split())
_WIDE_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"


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
    "deepseek-coder": Rule((_LINE_END, r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN), digits=True),
    "deepseek-llm": Rule((_LINE_END, rf"\s?[{_LETTERS}]+", _WIDE_SIGNS, r"\s+$", _EAST_ASIAN, r"\p{N}+")),
    "falcon": Rule((r"[\p{P}$+<=>^~|`]+", _OF_GPT_2, "[0-9]{3}")),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), Rule((_GPT_4O,))),
}
