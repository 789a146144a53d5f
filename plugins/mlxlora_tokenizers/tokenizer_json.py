"""A ``tokenizer.json`` before the library sees it: what would cut or grow texts is taken out or refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from mlxlora_core.api import ModelError, listing
from mlxlora_core.chat import TokenizerSettings, check_added

FILE_BYTES = 64 << 20  # the largest in use have 33 MB

_PARTS = 64  # steps of a normalizer or a pre-tokenizer
_GROWTH = 64  # how many times longer the replacements of a normalizer may make a text

# The library takes a step whose type it does not know for one with the same settings.
_KNOWN = {
    "normalizer": {
        *("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled"),
        *("Prepend", "Replace", "Strip", "StripAccents"),
    },
    "pre_tokenizer": {
        *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace"),
        *("Punctuation", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
    },
    "post_processor": {"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"},
}
_SEQUENCES = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
}

Document = dict[str, Any]


def check(document: Document, where: Path) -> None:
    """Refuse what is no ``tokenizer.json``.

    Raises:
        ModelError: with what is wrong.
    """
    model, added = document.get("model"), document.get("added_tokens", [])
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        _refuse("has no model with a vocabulary", where)
    if not isinstance(added, list):
        _refuse(f"has {type(added).__name__} below added_tokens, wanted a list", where)
    for token in added:
        check_added(token, where)
    contents = [token["content"] for token in added]
    if len({token["id"] for token in added}) < len(added) or len(set(contents)) < len(contents):
        _refuse("adds a token twice, or two tokens with one id", where)
    for section, known in _KNOWN.items():
        steps = list(islice(_steps(document, section), _PARTS + 1))
        others = [kind for step in steps if (kind := str(step.get("type"))) not in known]
        if others or len(steps) > _PARTS:
            what = f"the type {others[0]!r:.60}" if others else f"more than {_PARTS} steps"
            _refuse(f"its {section} has {what}, mlxlora knows {listing(sorted(known), 20)}", where)
    if prod(_growth(step, where) for step in _steps(document, "normalizer")) > _GROWTH:
        _refuse(f"its normalizer makes texts more than {_GROWTH} times longer", where)


def prepared(document: Document, settings: TokenizerSettings, where: Path) -> tuple[Document, bool]:
    """The document that the library is given, and whether it differs from the one in the file.

    Nothing in it cuts texts or fills them up, or leaves out merges at random. Tokens
    that other files add are added, and those that begin and end texts are special.

    Raises:
        ModelError: tokens of two files clash.
    """
    added = document.get("added_tokens", [])
    more = list(_more(added, settings, where))
    ends = {settings.bos, settings.eos} - {None}
    meant = [t for t in added if (t["content"] in ends or t["id"] in settings.stops) and not t.get("special")]
    made = dict(document)
    if more or meant:
        ordinary = [token for token in (*added, *more) if token not in meant]
        special = [{**token, "special": True, "normalized": False} for token in meant]
        made["added_tokens"] = sorted([*ordinary, *special], key=lambda token: int(token["id"]))
    if document["model"].get("dropout"):
        made["model"] = {**document["model"], "dropout": None}
    for key in ("truncation", "padding"):
        if document.get(key) is not None:
            made[key] = None
    return made, made != document


def _more(added: list[Any], settings: TokenizerSettings, where: Path) -> Iterator[Any]:
    """Tokens of the other files that are not in this one."""
    by_id = {token["id"]: token["content"] for token in added}
    by_content = {token["content"]: token["id"] for token in added}
    for token in settings.added:
        number, content = token["id"], token["content"]
        if by_id.get(number, content) != content or by_content.get(content, number) != number:
            there = f"{by_id.get(number)!r:.80} has that id" if number in by_id else "it has another one"
            raise ModelError(
                f"the token {content!r:.80} has the id {number}; in {where.name} {there}",
                where=settings.added_place,
                fix="take all files of the tokenizer from one model",
            )
        if number not in by_id:
            yield token


def without_prefix(document: Document) -> Document:
    """The same tokenizer without the space that it puts in front of a text."""
    made = copy.deepcopy({key: document.get(key) for key in ("normalizer", "pre_tokenizer")})
    for part in _steps(made, "normalizer"):
        if part.get("type") == "Prepend":
            part["prepend"] = ""
    for part in _steps(made, "pre_tokenizer"):
        if part.get("type") == "Metaspace":
            part.pop("add_prefix_space", None)
            part["prepend_scheme"] = "never"
        elif part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
    return {**document, **made}


def prefixes_first_alone(document: Document) -> bool:
    """Whether only the very start of a text gets a space in front, and not what follows a special token."""
    return any(step.get("prepend_scheme") == "first" for step in _steps(document, "pre_tokenizer"))


def front_ids(document: Document, where: Path) -> list[int]:
    """The ids that the post-processor puts in front of a text.

    Raises:
        ModelError: it is spelt in another way.
    """
    found: list[int] = []
    try:
        for part in _steps(document, "post_processor"):
            if part.get("type") == "TemplateProcessing":
                found = [*_template_front(part), *found]
            elif part.get("type") in ("BertProcessing", "RobertaProcessing"):
                found = [part["cls"][1], *found]
    except (KeyError, TypeError, IndexError, AttributeError):
        _refuse("its post_processor has settings of another kind", where)
    if not all(type(token) is int for token in found):
        _refuse("its post_processor adds what is no id", where)
    return found


def _template_front(part: dict[str, Any]) -> Iterator[int]:
    for step in part["single"]:
        if "SpecialToken" not in step:
            return
        yield from part["special_tokens"][step["SpecialToken"]["id"]]["ids"]


def _steps(document: Document, section: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, one after another."""
    left = [document.get(section)]
    while left:
        step = left.pop()
        if not isinstance(step, dict):
            continue
        inner = step.get(_SEQUENCES[section]) if step.get("type") == "Sequence" else None
        if isinstance(inner, list):
            left += reversed(inner)
        else:
            yield step


def _growth(part: dict[str, Any], where: Path) -> float:
    """How many times longer a step of a normalizer may make a text."""
    if part.get("type") == "Prepend" and len(str(part.get("prepend"))) > _GROWTH:
        _refuse("its normalizer puts a long text in front", where)
    if part.get("type") != "Replace":
        return 1.0
    pattern = part.get("pattern")
    old, new = pattern.get("String") if isinstance(pattern, dict) else None, len(str(part.get("content")))
    return max(1.0, new / len(old)) if isinstance(old, str) and old else 1.0 + new


def _refuse(what: str, where: Path) -> NoReturn:
    raise ModelError(what, where=where, fix="download it again")
