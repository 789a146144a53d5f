"""A ``tokenizer.json`` before the library sees it: what would cut or grow texts is taken out or refused."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mlxlora_core.api import ModelError
from mlxlora_core.chat import TokenizerSettings, check_added

FILE_BYTES = 64 << 20  # the largest in use have 33 MB

_PARTS = 64  # steps of a normalizer or a pre-tokenizer
_GROWTH = 64  # how many times longer the replacements of a normalizer may make a text

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
    growth = 1.0
    for count, part in enumerate(_parts(document.get("normalizer"), "normalizers"), 1):
        growth *= _growth(part, where)
        if count > _PARTS or growth > _GROWTH:
            _refuse(f"its normalizer makes texts {_GROWTH} times longer, or has {_PARTS} steps", where)
    if sum(1 for _ in _parts(document.get("pre_tokenizer"), "pretokenizers")) > _PARTS:
        _refuse(f"its pre-tokenizer has more than {_PARTS} steps", where)


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
    for part in _parts(made["normalizer"], "normalizers"):
        if part.get("type") == "Prepend":
            part["prepend"] = ""
    for part in _parts(made["pre_tokenizer"], "pretokenizers"):
        if part.get("type") == "Metaspace":
            part.pop("add_prefix_space", None)
            part["prepend_scheme"] = "never"
        elif part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
    return {**document, **made}


def prefixes_first_alone(document: Document) -> bool:
    """Whether only the very start of a text gets a space in front, and not what follows a special token."""
    parts = list(_parts(document.get("pre_tokenizer"), "pretokenizers"))
    return any(part.get("prepend_scheme") == "first" for part in parts)


def front_ids(document: Document, where: Path) -> list[int]:
    """The ids that the post-processor puts in front of a text.

    Raises:
        ModelError: it is spelt in another way.
    """
    found: list[int] = []
    try:
        for part in _parts(document.get("post_processor"), "processors"):
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


def _parts(value: Any, key: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, one after another."""
    if not isinstance(value, dict):
        return
    if value.get("type") == "Sequence":
        inner = value.get(key)
        for part in inner if isinstance(inner, Iterable) else ():
            yield from _parts(part, key)
    else:
        yield value


def _growth(part: dict[str, Any], where: Path) -> float:
    """How many times longer a step of a normalizer may make a text."""
    if part.get("type") == "Prepend" and len(str(part.get("prepend"))) > _GROWTH:
        _refuse("its normalizer puts a long text in front", where)
    if part.get("type") != "Replace":
        return 1.0
    pattern = part.get("pattern")
    old = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1.0, len(str(part.get("content"))) / max(1, len(old) if isinstance(old, str) else 1))


def _refuse(what: str, where: Path) -> NoReturn:
    raise ModelError(what, where=where, fix="download it again")
