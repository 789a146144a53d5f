"""The tokens of a ``tokenizer.json`` or ``tokenizer.model`` as a GGUF file lists them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError
from mlxlora_gguf.pieces import SPACE
from mlxlora_gguf.sentencepiece_model import Pieces
from mlxlora_gguf.splitting_out import flat
from mlxlora_gguf.vocabulary import BYTE, CONTROL, DEFINED, NORMAL, UNKNOWN

_PARTS = 64  # letters of a token whose ways to be merged are looked at


@dataclass
class Words:
    """The tokens of a model, by id.

    Attributes:
        model: ``gpt2`` or ``llama``.
        texts: of the tokens that there are.
        types: of each.
        scores: of each, for ``llama``.
        merges: ``"a b"``, the first one first, for ``gpt2``.
        ids: of the special tokens that the file itself names.
        adds_space: whether a text gets a space in front.
        notes: what llama.cpp will do otherwise, in words.
    """

    model: str
    texts: dict[int, str]
    types: dict[int, int]
    scores: dict[int, float] = field(default_factory=dict)
    merges: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    adds_space: bool = False
    notes: list[str] = field(default_factory=list)


def is_byte_level(document: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` has tokens of bytes that are written as letters."""
    places = (("decoder", "decoders"), ("pre_tokenizer", "pretokenizers"))
    return any(
        step.get("type") == "ByteLevel" for place, key in places for step in flat(document.get(place), key)
    )


def byte_level(document: Mapping[str, Any], path: Path) -> Words:
    """The tokens of a byte-level BPE.

    Raises:
        ModelError: it is damaged, or a merge cannot be written.
    """
    texts, types = _listed(document, path)
    merges = [" ".join(pair) for pair in _merges(document, path)]
    if any(merge.count(" ") != 1 for merge in merges):
        raise ModelError("has a merge of a token with a space in it, which GGUF cannot say", where=path)
    return Words("gpt2", texts, types, merges=merges)


def like_pieces(document: Mapping[str, Any], pieces: Pieces | None, path: Path) -> Words:
    """The tokens of a BPE that writes spaces as SentencePiece does.

    Args:
        document: the ``tokenizer.json``.
        pieces: those of the ``tokenizer.model`` beside it, whose scores and types are taken if they fit.
        path: of the file, for messages.

    Raises:
        ModelError: it is damaged, or prepares a text in a way that llama.cpp does not.
    """
    texts, types = _listed(document, path)
    words = Words("llama", texts, types, adds_space=_adds_space(document, path))
    unknown = document["model"].get("unk_token")
    for number, text in texts.items():
        if (
            document["model"].get("byte_fallback")
            and len(text) == 6
            and text[:3] == "<0x"
            and text[-1] == ">"
        ):
            types[number] = BYTE
        elif text == unknown:
            types[number], words.ids["unk"] = UNKNOWN, number
    if pieces is not None and all(texts.get(number) == text for number, text in enumerate(pieces.texts)):
        words.scores = dict(enumerate(pieces.scores))
        kept = {number: kind for number, kind in enumerate(pieces.types) if types[number] == NORMAL}
        types.update(kept)
    else:
        words.scores = _scores(document, words, path)
    return words


def from_pieces(pieces: Pieces) -> Words:
    """The tokens of a ``tokenizer.model``."""
    # llama.cpp finds these before it writes spaces as letters.
    texts = [
        text.replace(SPACE, " ") if kind == DEFINED else text
        for text, kind in zip(pieces.texts, pieces.types, strict=True)
    ]
    words = Words("llama", dict(enumerate(texts)), dict(enumerate(pieces.types)))
    words.scores, words.ids = dict(enumerate(pieces.scores)), dict(pieces.ids)
    words.adds_space = pieces.adds_space
    if not pieces.plain:
        words.notes.append(
            "tokenizer.model changes letters or spaces of a text before it is split, and llama.cpp does not: "
            "some texts get other tokens there"
        )
    return words


def _listed(document: Mapping[str, Any], path: Path) -> tuple[dict[int, str], dict[int, int]]:
    """id -> text and type of each token, the added ones among them."""
    vocabulary, added = document["model"].get("vocab"), document.get("added_tokens") or []
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise ModelError("has no list of tokens", where=path)
    texts = {number: text for text, number in vocabulary.items()}
    for token in added:
        texts[token["id"]] = token["content"]
    types = dict.fromkeys(texts, NORMAL)
    types |= {token["id"]: CONTROL if token.get("special") else DEFINED for token in added}
    if not all(type(number) is int and number >= 0 for number in texts):
        raise ModelError("has a token whose id is no whole number", where=path)
    return texts, types


def _merges(document: Mapping[str, Any], path: Path) -> Iterator[Sequence[str]]:
    """What is merged, in pairs."""
    merges = document["model"].get("merges")
    if not isinstance(merges, list) or not merges:
        raise ModelError("has no merges", where=path)
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ModelError(f"has a merge {merge!r:.80}, wanted two tokens", where=path)
        yield pair


def _adds_space(document: Mapping[str, Any], path: Path) -> bool:
    """Whether a text gets a space in front.

    Raises:
        ModelError: it is prepared in another way than spaces becoming the letter for them.
    """
    replaced = adds = False
    for step in flat(document.get("normalizer"), "normalizers"):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            adds = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            replaced = True
        else:
            _refuse_step(step, path)
    for step in flat(document.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace":
            replaced = True
            adds = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        elif step.get("type") != "Split" or step.get("pattern") != {"String": " "} or not replaced:
            _refuse_step(step, path)
    if not replaced:
        raise ModelError("does not write spaces as SentencePiece does, which llama.cpp needs", where=path)
    return bool(adds)


def _refuse_step(step: Mapping[str, Any], path: Path) -> None:
    raise ModelError(
        f"prepares a text by a step {step.get('type')!r:.40} that llama.cpp does not have for its kind",
        where=path,
        fix="put the model's tokenizer.model beside it, and no tokenizer.json",
    )


def _scores(document: Mapping[str, Any], words: Words, path: Path) -> dict[int, float]:
    """What merges of SentencePiece go by: the token that is merged first has the highest score."""
    numbers = {text: number for number, text in words.texts.items()}
    scores: dict[int, float] = {}
    pairs = set()
    for first, second in _merges(document, path):
        pairs.add((first, second))
        number = numbers.get(first + second)
        if number is None:
            raise ModelError(f"has a merge {first + ' ' + second!r:.80} that makes no token", where=path)
        scores.setdefault(number, -float(len(scores)))
    ordinary = {text for text, number in numbers.items() if words.types[number] == NORMAL}
    other = sum(_has_other_parts(text, ordinary, pairs) for text in ordinary)
    if other:
        words.notes.append(
            f"{other} tokens can be put together in ways that the merges of tokenizer.json leave out: "
            "llama.cpp knows none, and may split some texts otherwise"
        )
    lowest = -float(len(scores))
    special = {number for number, kind in words.types.items() if kind not in (NORMAL, DEFINED)}
    return {
        number: 0.0 if number in special else scores.get(number, lowest) for number in sorted(words.texts)
    }


def _has_other_parts(text: str, known: set[str], pairs: set[tuple[str, str]]) -> bool:
    """Whether a token is two others that no merge puts together."""
    if len(text) > _PARTS:
        return False
    parts = ((text[:at], text[at:]) for at in range(1, len(text)))
    return any(part[0] in known and part[1] in known and part not in pairs for part in parts)
