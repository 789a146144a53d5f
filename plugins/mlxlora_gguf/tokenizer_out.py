"""The keys that a GGUF file says its tokenizer by, made of the files that it is opened from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.api import ExportSource, ModelError, TokenizerFiles, UsageError, listing
from mlxlora_core.chat import TokenizerSettings, file_place, read_tokenizer_settings
from mlxlora_core.files import file_bytes, parse_json
from mlxlora_gguf import words as listed
from mlxlora_gguf.sentencepiece_model import Pieces, is_list_of_ranks, is_pieces, read_pieces
from mlxlora_gguf.splitting import RULES
from mlxlora_gguf.splitting_out import find_name, flat
from mlxlora_gguf.tokenizer import KEPT_KEYS
from mlxlora_gguf.vocabulary import CONTROL, DEFINED, ENDS, ID_KEYS, NORMAL, PREFIX, TEMPLATE, UNUSED
from mlxlora_gguf.words import Words
from mlxlora_gguf.writing import Value

TOKENS = PREFIX + "tokens"  # the key of how each token is written

_JSON, _MODEL, _TEKKEN = "tokenizer.json", "tokenizer.model", "tekken.json"
_CONFIG, _SPECIALS, _JINJA = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
_BYTES = 64 << 20  # the largest tokenizer.json in use has 33 MB
_MORE_ENDS = ("eot", "eom")  # ids that end a text beside eos


def tokenizer_keys(source: ExportSource, pre: str) -> tuple[dict[str, Value], list[str]]:
    """The keys of the tokenizer, and what llama.cpp will do otherwise than mlxlora.

    Args:
        source: what is exported.
        pre: name of the rule by which a text is split; nothing to find it.

    Raises:
        ModelError: a tokenizer that llama.cpp has no form for.
        UsageError: a name that is not known.
    """
    files = source.tokenizer
    document = _object(files, _JSON) if _JSON in files else {}
    settings, config = read_tokenizer_settings(files), _object(files, _CONFIG)
    words, where = _words(files, document)
    for token in settings.added:
        words.texts.setdefault(token["id"], token["content"])
        words.types.setdefault(token["id"], CONTROL if token.get("special") else DEFINED)
    kept = config.get(KEPT_KEYS)
    kept = kept if isinstance(kept, dict) else {}
    keys: dict[str, Value] = {PREFIX + "model": words.model}
    if words.model == "gpt2":
        keys[PREFIX + "pre"] = _rule(document, pre, str(kept.get("pre", "")), where)
    ids = _ids(files, settings, words, document, source)
    _mark_ends(words, {*source.stops, *(ids[name] for name in ("bos", "eos") if name in ids)})
    keys |= _lists(words, source.vocab_size or max(words.texts) + 1, where)
    keys |= {PREFIX + ID_KEYS[name]: number for name, number in ids.items()}
    keys |= _flags(settings, words, document, config)
    keys |= dict(_templates(files, config))
    room = len(words.texts)
    keys = {**{PREFIX + key: value for key, value in kept.items() if _is_kept(key, value, room)}, **keys}
    notes = [*words.notes, *_more_ends(keys, words, source.stops)]
    return keys, notes


def _words(files: TokenizerFiles, document: Mapping[str, Any]) -> tuple[Words, Path]:
    """The tokens of whichever file has them, and that file."""
    if document:
        where, model = file_place(files, _JSON), document.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            kind = model.get("type") if isinstance(model, dict) else None
            raise ModelError(
                f"is a tokenizer of kind {kind!r:.40}, which llama.cpp has no form for", where=where
            )
        if listed.is_byte_level(document):
            return listed.byte_level(document, where), where
        return listed.like_pieces(document, _pieces(files), where), where
    name = next((name for name in (_MODEL, _TEKKEN) if name in files), "")
    where = file_place(files, name) if name else Path(_JSON)
    pieces = _pieces(files) if name == _MODEL else None
    if pieces is None:
        raise ModelError(
            "is no tokenizer that is written as GGUF: wanted tokenizer.json, or a SentencePiece model",
            where=where,
            fix=f"put the model's {_JSON} into its folder",
        )
    return listed.from_pieces(pieces), where


def _pieces(files: TokenizerFiles) -> Pieces | None:
    """The SentencePiece model among the files, or None."""
    if _MODEL not in files:
        return None
    where = file_place(files, _MODEL)
    content = file_bytes(files[_MODEL], _BYTES, where)
    if is_list_of_ranks(content) or not is_pieces(content):
        return None
    return read_pieces(content, where)


def _rule(document: Mapping[str, Any], asked: str, known: str, where: Path) -> str:
    """The name of the rule by which a text is split."""
    if asked and asked not in RULES:
        raise UsageError(f"export.pre: got {asked!r:.40}, wanted {listing(sorted(RULES), 60)}")
    found = asked or find_name(document, known)
    if not found:
        raise ModelError(
            "splits a text in a way that no rule of llama.cpp is known to be",
            where=where,
            fix="if you know its name there, add --set export.pre=NAME",
        )
    return found


def _ids(
    files: TokenizerFiles,
    settings: TokenizerSettings,
    words: Words,
    document: Mapping[str, Any],
    source: ExportSource,
) -> dict[str, int]:
    """The ids of the special tokens: those that settings name, else those that the vocabulary does."""
    number_of = {text: number for number, text in words.texts.items()}
    config, specials = _object(files, _CONFIG), _object(files, _SPECIALS)
    ids = dict(words.ids)
    front = _front(document)
    if front is not None and "bos" not in ids:
        ids["bos"] = front
    for name in ("bos", "eos", "unk", "pad"):
        value = config.get(f"{name}_token") or specials.get(f"{name}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text in number_of:
            ids[name] = number_of[text]
    if settings.eos not in number_of:
        ends = (*settings.stops, *([ids["eos"]] if "eos" in ids else []), *sorted(source.stops))
        if not ends:
            raise ModelError("no file says which token ends a text", where=file_place(files, _CONFIG))
        ids["eos"] = ends[0]
    return {name: ids[name] for name in ("bos", "eos", "unk", "pad") if name in ids}


def _front(document: Mapping[str, Any]) -> int | None:
    """The id that the post-processor puts in front of a text."""
    for step in flat(document.get("post_processor"), "processors"):
        if step.get("type") != "TemplateProcessing":
            continue
        first: Any = next(iter(step.get("single") or ()), {})
        named = first.get("SpecialToken", {}).get("id") if isinstance(first, dict) else None
        found = (step.get("special_tokens") or {}).get(named, {}).get("ids") or [None]
        if type(found[0]) is int:
            return int(found[0])
    return None


def _mark_ends(words: Words, ends: set[int]) -> None:
    """Tokens that begin and end texts are control tokens, whatever the file calls them."""
    for number in ends:
        if words.types.get(number) in (NORMAL, DEFINED):
            words.types[number] = CONTROL


def _lists(words: Words, rows: int, where: Path) -> dict[str, Value]:
    """The tokens up to the rows of the embedding; those that there are none of are unused."""
    over = [number for number in words.texts if number >= rows]
    if over:
        words.notes.append(
            f"{len(over)} tokens from id {rows} on have no row in the embedding and are left out"
        )
    texts, types, taken = [], [], set(words.texts.values())
    for number in range(rows):
        text, unused = words.texts.get(number), f"[PAD{number}]"
        if text is None and unused in taken:
            raise ModelError(f"has no token {number}, and {unused!r} is another one", where=where)
        texts.append(unused if text is None else text)
        types.append(UNUSED if text in (None, unused) else words.types[number])
    found: dict[str, Value] = {TOKENS: texts, PREFIX + "token_type": types}
    if words.model == "gpt2":
        return found | {PREFIX + "merges": words.merges}
    lowest = min(words.scores.values(), default=0.0)
    return found | {PREFIX + "scores": [float(words.scores.get(number, lowest)) for number in range(rows)]}


def _flags(
    settings: TokenizerSettings, words: Words, document: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Value]:
    """What is put in front of a text, and behind it."""
    adds = settings.adds_bos
    if adds is None:
        adds = _front(document) is not None if document else "bos" in words.ids
    flags: dict[str, Value] = {
        PREFIX + "add_space_prefix": words.adds_space,
        PREFIX + "add_bos_token": adds,
    }
    if config.get("add_eos_token") is True:
        flags[PREFIX + "add_eos_token"] = True
    return flags


def _templates(files: TokenizerFiles, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, source) of the chat templates."""
    if _JINJA in files:
        content = file_bytes(files[_JINJA], _BYTES, file_place(files, _JINJA))
        yield TEMPLATE, content.decode("utf-8-sig", "replace")
        return
    found = config.get("chat_template") or _object(files, _OLD_TEMPLATE).get("chat_template")
    if isinstance(found, str):
        yield TEMPLATE, found
    for part in found if isinstance(found, list) else ():
        name, text = (part.get(key) if isinstance(part, dict) else None for key in ("name", "template"))
        if isinstance(name, str) and isinstance(text, str):
            yield TEMPLATE if name == "default" else f"{TEMPLATE}.{name}", text


def _is_kept(key: str, value: Any, room: int) -> bool:
    """Whether a key of the GGUF file that the model came from can be written again."""
    if not isinstance(key, str) or type(value) not in (bool, int):
        return False
    return not key.endswith("_token_id") or (type(value) is int and 0 <= value < room)


def _more_ends(keys: dict[str, Value], words: Words, stops: frozenset[int]) -> Iterator[str]:
    """State the ids that end a text and that llama.cpp would not know by how they are written."""
    stated = {keys.get(PREFIX + ID_KEYS[name]) for name in ("eos", *_MORE_ENDS)}
    unknown = [n for n in sorted(stops) if n not in stated and words.texts.get(n) not in ENDS]
    for name in _MORE_ENDS:
        if unknown and PREFIX + ID_KEYS[name] not in keys:
            keys[PREFIX + ID_KEYS[name]] = unknown.pop(0)
    if unknown:
        names = listing((words.texts.get(number, str(number)) for number in unknown), 3)
        yield f"llama.cpp will not stop at {names}: a GGUF file has no place for so many ends"


def _object(files: TokenizerFiles, name: str) -> dict[str, Any]:
    """The JSON object in one of the files; nothing where it is absent."""
    if name not in files:
        return {}
    where = file_place(files, name)
    found = parse_json(file_bytes(files[name], _BYTES, where), where)
    if not isinstance(found, dict):
        raise ModelError(f"holds {type(found).__name__}, wanted an object", where=where)
    return found
