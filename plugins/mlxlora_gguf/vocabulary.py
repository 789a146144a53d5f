"""The vocabulary inside a GGUF file, its keys checked and completed as llama.cpp completes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mlxlora_core.api import ModelError, listing

NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = range(1, 7)  # types of a token

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
_TOKENS_LIMIT, _TOKEN_BYTES = 1 << 20, 4096
_NO_ID = (-1, 2**32 - 1)  # how writers say that there is none
ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
_NEEDED = ("bos", "eos", "eot", "eom")  # an id of these that does not exist is no oversight
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {}}
#: other models of tokenizers, in words
_OTHERS = {
    "bert": "WordPiece",
    "t5": "the Unigram of T5",
    "rwkv": "that of RWKV",
    "plamo2": "that of PLaMo",
    "gemma4": "that of Gemma 4",
}
_END = "<|end|>"
#: how the tokens are written that end a text or a turn in the models in use
ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> </s> <eos> <turn|> [e~[ "
    f"{_END} <\uff5cend\u2581of\u2581sentence\uff5c>".split()
)


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made of.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece BPE).
        pre: name of the rule by which a text is split before merging; empty where none is stated.
        tokens: by id, no two alike and none empty.
        types: of each.
        scores: of each; empty where none are stated.
        merges: ``"a b"``, the first one first.
        ids: of the special tokens that there are: ``bos``, ``eos``, ``unk``, ``pad``, ``eot``, ``eom``.
        ends: the ids of which each ends a text or a turn.
        flags: what is stated of ``add_bos_token``, ``add_eos_token`` and ``add_space_prefix``.
        templates: name -> chat template; the one without a name is ``default``.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    ids: Mapping[str, int]
    ends: Sequence[int]
    flags: Mapping[str, bool]
    templates: Mapping[str, str]


def read_vocabulary(keys: Mapping[str, Any], path: Path) -> Vocabulary:
    """The vocabulary that the keys of a file hold.

    Raises:
        ModelError: keys that contradict each other, or a model of tokenizer that is not read.
    """
    found = _Keys(keys, path)
    model = found.one("model", str, "")
    if model not in _DEFAULT_IDS:
        known = f"{_OTHERS[model]}, " if model in _OTHERS else ""
        what = (
            f"a tokenizer of model {model!r:.60} ({known}wanted gpt2 or llama)" if model else "no tokenizer"
        )
        raise ModelError(f"has {what}, which is not read" if model else f"has {what}", where=path)
    tokens = _tokens(found)
    types = found.some("token_type", int, len(tokens)) or [NORMAL] * len(tokens)
    wrong = sorted({kind for kind in types if not 0 <= kind <= BYTE})
    if wrong:
        found.refuse(f"has tokens of type {listing(wrong, 3)}, wanted 0 to {BYTE}")
    ids = _ids(found, model, len(tokens))
    types = [kind or NORMAL for kind in types]
    for name in _NEEDED:
        if name in ids and types[ids[name]] == NORMAL and len(tokens[ids[name]]) > 1:
            types[ids[name]] = CONTROL
    ends = _ends(tokens, types, ids)
    if not ends:
        found.refuse("does not say which token ends a text (tokenizer.ggml.eos_token_id)")
    names = ("add_bos_token", "add_eos_token", "add_space_prefix")
    return Vocabulary(
        model=model,
        pre=found.one("pre", str, ""),
        tokens=tokens,
        types=types,
        scores=found.some("scores", (float, int), len(tokens)),
        merges=found.some("merges", str),
        ids=ids,
        ends=ends,
        flags={name: found.one(name, bool, False) for name in names if PREFIX + name in keys},
        templates=_templates(found),
    )


class _Keys:
    """The keys of a file, each of the type that is asked for."""

    def __init__(self, keys: Mapping[str, Any], path: Path) -> None:
        self.all, self._path = keys, path

    def one(self, name: str, kind: type, default: Any, prefix: str = PREFIX) -> Any:
        """The value of a key, or ``default``."""
        value = self.all.get(prefix + name, default)
        if type(value) is not kind:
            self.refuse(f"has a key {prefix}{name} of type {type(value).__name__}, wanted {kind.__name__}")
        return value

    def some(self, name: str, kinds: type | tuple[type, ...], count: int | None = None) -> list[Any]:
        """The values of a key; none where it is absent."""
        values = self.one(name, list, [])
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if values and type(values[0]) not in kinds:  # all items of an array are of one type
            self.refuse(
                f"has a key {PREFIX}{name} of {type(values[0]).__name__} items, wanted {kinds[0].__name__}"
            )
        if values and count is not None and len(values) != count:
            self.refuse(f"has {len(values)} values of {PREFIX}{name} for {count} tokens")
        return list(values)

    def refuse(self, what: str) -> NoReturn:
        """Raise an error that names the file."""
        raise ModelError(what, where=self._path)


def _tokens(keys: _Keys) -> list[str]:
    """The tokens; an empty one is called as llama.cpp calls it."""
    tokens = keys.some("tokens", str)
    if not 0 < len(tokens) <= _TOKENS_LIMIT:
        keys.refuse(f"has {len(tokens)} tokens, wanted 1 to {_TOKENS_LIMIT}")
    if max(map(len, tokens)) > _TOKEN_BYTES:
        keys.refuse(f"has a token of {max(map(len, tokens))} letters, wanted at most {_TOKEN_BYTES}")
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        ((token, times),) = Counter(tokens).most_common(1)
        keys.refuse(f"has the token {token!r:.100} {times} times")
    return tokens


def _ids(keys: _Keys, model: str, count: int) -> dict[str, int]:
    """The ids of the special tokens that there are."""
    ids = {name: number for name, number in _DEFAULT_IDS[model].items() if number < count}
    for name, key in ID_KEYS.items():
        number = keys.one(key, int, -1)
        if 0 <= number < count:
            ids[name] = number
        elif number not in _NO_ID and name in _NEEDED:
            keys.refuse(f"has {PREFIX}{key} {number}, wanted an id below {count}")
    return ids


def _ends(tokens: Sequence[str], types: Sequence[int], ids: Mapping[str, int]) -> list[int]:
    """The ids that end a text or a turn, those that the keys name first."""
    ends = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    number_of = {token: number for number, token in enumerate(tokens) if token in ENDS}
    if {"<|return|>", "<|call|>"} <= number_of.keys() or {"<|calls|>", "<|flush|>"} <= number_of.keys():
        number_of.pop(_END, None)  # ends a message there, and not the turn
    for token, number in number_of.items():
        # Gemma has </s> as a tag of HTML
        special = (CONTROL,) if token == "</s>" else (CONTROL, DEFINED, UNKNOWN)
        if types[number] in special:
            ends.append(number)
    return list(dict.fromkeys(ends))


def _templates(keys: _Keys) -> dict[str, str]:
    """The chat templates by their names."""
    templates = {}
    for key in keys.all:
        if key == TEMPLATE or key.startswith(TEMPLATE + "."):
            name = key.removeprefix(TEMPLATE).removeprefix(".") or "default"
            templates[name] = keys.one(key, str, "", prefix="")
    return templates
