"""The files that list byte strings by rank: Llama 3's ``tokenizer.model`` and Mistral's ``tekken.json``."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError
from mlxlora_core.chat import TokenizerSettings
from mlxlora_core.files import parse_json
from mlxlora_tokenizers import ranks
from mlxlora_tokenizers.tokenizer_json import Document

_LLAMA_RANKS = 128_000
_LLAMA_SPECIALS = 256
_LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_NAMES = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
    *("<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
)
#: a header in front of each message and an end behind it, as Llama 3's own code writes them
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

_TEKKEN_NAMES = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
# Roles must alternate, the user's first; SYSTEM is what becomes of a system message in front of them.
_TEKKEN_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(before='', role='user') %}{% for message in messages %}"
    "{% if loop.first and message.role == 'system' %}SYSTEM"
    "{% elif message.role != ns.role %}"
    "{{ raise_exception('messages must alternate user, assistant after an optional system') }}"
    "{% elif message.role == 'user' %}[INST]{{ ns.before }}{{ message.content }}[/INST]"
    "{% set ns.before = '' %}{% set ns.role = 'assistant' %}"
    "{% else %}{{ message.content }}{{ eos_token }}{% set ns.role = 'user' %}{% endif %}{% endfor %}"
)
_SYSTEM_BEFORE = "{% set ns.before = message.content + '\n\n' %}"
_SYSTEM_APART = "[SYSTEM_PROMPT]{{ message.content }}[/SYSTEM_PROMPT]"


@dataclass(frozen=True)
class RankFile:
    """What such a file says.

    Attributes:
        document: the same as a ``tokenizer.json``.
        bos: how the token that begins a text is written.
        ends: how those are written that end one, first that of a whole text.
        template: of conversations, where no other file has one.
        form: what that is, in words.
    """

    document: Document
    bos: str
    ends: tuple[str, ...]
    template: str
    form: str


def read_llama(content: bytes, where: Path) -> RankFile:
    """Llama 3's: a line of base64 and rank for each token; its 256 special tokens are not named there.

    Raises:
        ModelError: it is damaged, or of another model.
    """
    tokens = []
    for number, line in enumerate(content.splitlines()):
        word, _, rank = line.partition(b" ")
        if rank != b"%d" % number:
            raise ModelError(f"rank {rank[:20]!r}, wanted {number}", where=f"{where}:{number + 1}")
        tokens.append(_decoded(word, f"{where}:{number + 1}"))
    if len(tokens) > _LLAMA_RANKS:
        raise ModelError(
            f"lists {len(tokens)} ranks, Llama 3 has {_LLAMA_RANKS}: it is of another model",
            where=where,
            fix="put the model's tokenizer.json in its place",
        )
    ranks.check_ranks(tokens, where)
    reserved = range(2, 2 + _LLAMA_SPECIALS - len(_LLAMA_NAMES))
    names = [*_LLAMA_NAMES, *(f"<|reserved_special_token_{number}|>" for number in reserved)]
    return RankFile(
        document=ranks.document(tokens, names, _LLAMA_PATTERN, first=0),
        bos="<|begin_of_text|>",
        ends=("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
        template=LLAMA_TEMPLATE,
        form="the form of Llama 3",
    )


def read_tekken(content: bytes, where: Path) -> RankFile:
    """Mistral's: an object with the pattern, the tokens by rank and, in later versions, the special tokens.

    Raises:
        ModelError: it is damaged.
    """
    found = parse_json(content, where)
    try:
        config = found["config"]
        pattern, size = config["pattern"], config["default_vocab_size"]
        count, version = config["default_num_special_tokens"], config["version"]
        listed = [(token["rank"], token["token_bytes"]) for token in found["vocab"]]
        named = found.get("special_tokens") or [{"token_str": name} for name in _TEKKEN_NAMES]
        names = [token["token_str"] for token in named]
    except (KeyError, TypeError, AttributeError) as fault:
        raise _other(f"it lacks {fault}" if isinstance(fault, KeyError) else str(fault), where) from None
    if not isinstance(pattern, str) or not all(
        type(n) is int and 0 < n < TokenizerSettings.MOST_IDS for n in (size, count)
    ):
        raise _other("its config has settings of another kind", where)
    if any(token.get("rank", number) != number for number, token in enumerate(named)) or len(names) > count:
        raise _other("its special tokens are not in order", where)
    names += [f"<SPECIAL_{number}>" for number in range(len(names), count)]
    if len(set(names)) < count or not {"<s>", "</s>"} <= set(names) or not all(map(_is_name, names)):
        raise _other("it has a special token twice, or no <s> or </s>", where)
    tokens = []
    for number, (rank, word) in enumerate(listed[: size - count]):
        if rank != number or not isinstance(word, str):
            raise _other(f"its token {number} has the rank {rank!r:.40}", where)
        tokens.append(_decoded(word.encode(), where))
    if len(tokens) < size - count:
        raise _other(f"it lists {len(tokens)} of {size - count} tokens", where)
    ranks.check_ranks(tokens, where)
    return RankFile(
        document=ranks.document(tokens, names, pattern, first=count),
        bos="<s>",
        ends=("</s>",),
        template=_TEKKEN_TEMPLATE.replace("SYSTEM", _SYSTEM_BEFORE if version == "v3" else _SYSTEM_APART, 1),
        form=f"the form of Mistral's version {version!s:.8} with its control tokens",
    )


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= 200


def _decoded(word: bytes, where: str | Path) -> bytes:
    """The bytes that base64 stands for."""
    try:
        return base64.b64decode(word, validate=True)
    except (binascii.Error, ValueError):
        raise ModelError(f"{word[:40]!r} is no base64", where=where, fix="download it again") from None


def _other(why: str, where: Path) -> ModelError:
    return ModelError(f"is no Tekken vocabulary: {why}", where=where, fix="download it again")
