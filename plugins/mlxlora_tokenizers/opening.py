"""The tokenizer in a model's files, whichever of the formats they have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlxlora_core.api import ModelError, TokenizerFiles, listing
from mlxlora_core.chat import (
    ChatTemplate,
    SpecialTexts,
    SpecialToken,
    TokenizerSettings,
    file_place,
    find_template,
    read_tokenizer_settings,
    turn_end_ids,
)
from mlxlora_core.files import file_bytes, parse_json
from mlxlora_tokenizers import RANKS, TEKKEN, TOKENIZER, library
from mlxlora_tokenizers.decoding import TokenTexts
from mlxlora_tokenizers.rank_files import RankFile, read_llama, read_tekken
from mlxlora_tokenizers.tokenizer import LibraryTokenizer, Parts
from mlxlora_tokenizers.tokenizer_json import FILE_BYTES, Document, check, front_ids, prepared

_OWN = "the template of its files"


@dataclass(frozen=True)
class Source:
    """A tokenizer as its files say it.

    Attributes:
        where: the file with the vocabulary.
        content: its bytes.
        document: as a ``tokenizer.json`` says it.
        settings: what stands beside it.
        template: of conversations, if there is one.
        form: where that comes from, in words.
        is_json: whether the file is a ``tokenizer.json``.
    """

    where: Path
    content: bytes
    document: Document
    settings: TokenizerSettings
    template: ChatTemplate | None
    form: str
    is_json: bool


def open_tokenizer(files: TokenizerFiles) -> LibraryTokenizer:
    """The tokenizer in those files.

    Raises:
        ModelError: they are damaged, say nothing of how a text ends, or clash.
        SafetyError: the chat template reaches for what it must not.
    """
    name = next(name for name in (TOKENIZER, TEKKEN, RANKS) if name in files)
    where = file_place(files, name)
    if where is files[name] and not where.exists():
        raise ModelError("there is no tokenizer", where=where, fix=f"put the model's {name} there")
    content = file_bytes(files[name], FILE_BYTES, where)
    template, settings = find_template(files), read_tokenizer_settings(files)
    if name == TOKENIZER:
        source = _from_json(content, where, settings, template)
    else:
        read = read_tekken if name == TEKKEN else read_llama
        source = _from_ranks(read(content, where), content, where, settings, template)
    document, changed = prepared(source.document, source.settings, where)
    if source.is_json:
        opened = library.load(json.dumps(document) if changed else content.decode("utf-8-sig"), where)
    else:
        opened = library.assemble(document, where)
    vocabulary = _vocabulary(opened, document, where)
    return LibraryTokenizer(_parts(source, document, opened, vocabulary))


def _from_json(
    content: bytes, where: Path, settings: TokenizerSettings, template: ChatTemplate | None
) -> Source:
    document = parse_json(content, where)
    if not isinstance(document, dict):
        raise ModelError(f"holds {type(document).__name__}, wanted an object", where=where)
    check(document, where)
    return Source(where, content, document, settings, template, _OWN, True)


def _from_ranks(
    found: RankFile, content: bytes, where: Path, settings: TokenizerSettings, template: ChatTemplate | None
) -> Source:
    """What a list of ranks is a tokenizer by, with what the files beside it say of its ends."""
    added = {token["content"]: token["id"] for token in found.document["added_tokens"]}
    settings = replace(
        settings,
        bos=settings.bos or found.bos,
        eos=settings.eos or found.ends[0],
        adds_bos=settings.adds_bos is not False,
        stops=(*settings.stops, *(added[text] for text in found.ends)),
    )
    specials = {"bos_token": found.bos, "eos_token": found.ends[0]}
    own = ChatTemplate(found.template, specials, where=str(where))
    form = found.form if template is None else _OWN
    return Source(where, content, found.document, settings, template or own, form, False)


def _vocabulary(opened: Tokenizer, document: Document, where: Path) -> dict[str, int]:
    """How each token is written -> its id.

    Raises:
        ModelError: an id is too large or belongs to two tokens, or an added token has got another one.
    """
    listed = document["model"]["vocab"]
    vocabulary: dict[str, int] = (
        dict(listed) if isinstance(listed, dict) else {piece[0]: i for i, piece in enumerate(listed)}
    )
    for token in document.get("added_tokens", []):
        got = opened.token_to_id(token["content"])
        if got != token["id"]:
            raise ModelError(
                f"the added token {token['content']!r:.80} has the id {token['id']}, and {got} by its place",
                where=where,
                fix="download it again",
            )
        vocabulary[token["content"]] = token["id"]
    if not vocabulary or max(vocabulary.values()) >= TokenizerSettings.MOST_IDS:
        raise ModelError(
            f"it has no token, or an id from {TokenizerSettings.MOST_IDS} on",
            where=where,
            fix="download it again",
        )
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ModelError("two of its tokens have one id", where=where, fix="download it again")
    return vocabulary


def _parts(source: Source, document: Document, opened: Tokenizer, vocabulary: Mapping[str, int]) -> Parts:
    where = source.where
    size = max(vocabulary.values()) + 1
    bos, eos, stops = _ends(source, document, vocabulary, size)
    added = {token["id"]: token for token in document.get("added_tokens", [])}
    special = {number for number, token in added.items() if token.get("special")}
    ends = stops if bos is None else stops | {bos}
    silent = special | ends
    unknown = {vocabulary.get(document["model"].get("unk_token") or ""), document["model"].get("unk_id")}
    written = {number: text for text, number in vocabulary.items()}
    # A token that is looked for in the normalized text stands for what is found there.
    normal = {
        number: text for number in added if (text := str(opened.id_to_token(number))) != written[number]
    }
    return Parts(
        where=where,
        document=document,
        library=opened,
        texts=TokenTexts(
            document.get("decoder"),
            {**written, **normal},
            added=added.keys() - normal.keys(),
            silent=silent,
            where=where,
        ),
        vocab_size=size,
        bos=bos,
        eos=eos,
        stops=stops,
        kept_apart=frozenset((special - unknown) | ends),
        special=SpecialTexts(
            _special_token(number, written[number], added) for number in sorted(silent & written.keys())
        ),
        special_texts=frozenset(written[number] for number in (silent & written.keys()) | added.keys()),
        template=source.template,
        form=source.form if source.template else "no chat template",
        fingerprint=_fingerprint(source, document, bos, eos, stops),
    )


def _ends(
    source: Source, document: Document, vocabulary: Mapping[str, int], size: int
) -> tuple[int | None, int, frozenset[int]]:
    """The ids that begin a text and that end one, and all of those that end one.

    Raises:
        ModelError: one of them is not in the vocabulary, or no file states an end.
    """
    settings, where = source.settings, source.where
    for token in settings.stops:
        if token >= size:
            raise ModelError(
                f"eos_token_id {token} is beyond the vocabulary of {size} tokens",
                where=settings.stops_place,
                fix="take all files of the model from one place",
            )
    named = _id(settings.eos, "eos_token", vocabulary, source)
    ends = [*([] if named is None else [named]), *settings.stops]
    if not ends:
        raise ModelError(
            "no file says which token ends a text",
            where=where,
            fix='put a generation_config.json with {"eos_token_id": ID} beside it',
        )
    stops = {*ends, *turn_end_ids(source.template, vocabulary.get)}
    return _bos(source, document, vocabulary, size), ends[0], frozenset(stops)


def _bos(source: Source, document: Document, vocabulary: Mapping[str, int], size: int) -> int | None:
    """The id that begins a text: that of the config where it says so, else what the post-processor adds."""
    named = _id(source.settings.bos, "bos_token", vocabulary, source)
    if source.settings.adds_bos is False:
        return None
    if source.settings.adds_bos and named is not None:
        return named
    front = front_ids(document, source.where)
    if len(front) > 1 or any(not 0 <= token < size for token in front):
        raise ModelError(
            f"its post_processor puts {listing(front, 4)} in front of a text, wanted one id below {size}",
            where=source.where,
        )
    return front[0] if front else None


def _id(text: str | None, key: str, vocabulary: Mapping[str, int], source: Source) -> int | None:
    """The id of a token that a file names.

    Raises:
        ModelError: there is no such token.
    """
    if text is None:
        return None
    if text not in vocabulary:
        raise ModelError(
            f"{key} is {text!r:.80}, which the vocabulary does not have",
            where=source.settings.config_place,
            fix="take all files of the tokenizer from one model",
        )
    return vocabulary[text]


def _special_token(number: int, content: str, added: Mapping[int, Mapping[str, Any]]) -> SpecialToken:
    said = added.get(number, {})
    flags = {flag: bool(said.get(flag)) for flag in ("lstrip", "rstrip", "single_word")}
    return SpecialToken(number, content, **flags)


def _fingerprint(source: Source, document: Document, bos: int | None, eos: int, stops: frozenset[int]) -> str:
    template = source.template.fingerprint if source.template else ""
    told = [document.get("added_tokens", []), bos, eos, sorted(stops), template]
    return hashlib.sha256(source.content + json.dumps(told).encode()).hexdigest()
