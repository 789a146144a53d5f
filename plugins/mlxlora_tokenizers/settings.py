"""What stands beside a ``tokenizer.json``: which tokens begin and end texts, and which were added later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, TokenizerFiles
from mlxlora_core.files import file_bytes, parse_json

CONFIG, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"
ADDED, GENERATION = "added_tokens.json", "generation_config.json"

_FILE_BYTES = 16 << 20
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Settings:
    """What the files say.

    Attributes:
        config_place: tokenizer_config.json.
        bos: how the token that begins a text is written, where one is named.
        eos: how the token that ends a text is written, where one is named.
        adds_bos: whether a text begins with that token; None where nothing says so.
        stops: the ids that end what is generated.
        stops_place: the file that states them.
        added: tokens as ``tokenizer.json`` has them below ``added_tokens``.
        added_place: the file that they stand in.
    """

    config_place: Path = Path(CONFIG)
    bos: str | None = None
    eos: str | None = None
    adds_bos: bool | None = None
    stops: tuple[int, ...] = ()
    stops_place: Path = Path(GENERATION)
    added: tuple[dict[str, Any], ...] = ()
    added_place: Path = Path(CONFIG)


def read_settings(files: TokenizerFiles) -> Settings:
    """What the files beside a tokenizer say; each of them may be absent.

    Raises:
        ModelError: a file is damaged, or says something of another kind.
    """
    config, specials = read_object(files, CONFIG), read_object(files, SPECIALS)
    generation = read_object(files, GENERATION)
    adds = config.get("add_bos_token")
    if not isinstance(adds, bool | None):
        raise ModelError(f"add_bos_token is {adds!r}, wanted true or false", where=place(files, CONFIG))
    decoder = config.get("added_tokens_decoder")
    return Settings(
        config_place=place(files, CONFIG),
        bos=_named("bos_token", config, specials, place(files, CONFIG)),
        eos=_named("eos_token", config, specials, place(files, CONFIG)),
        adds_bos=adds,
        stops=_ids(generation.get("eos_token_id"), place(files, GENERATION)),
        stops_place=place(files, GENERATION),
        added=tuple(
            _described(decoder, place(files, CONFIG))
            if decoder
            else _listed(read_object(files, ADDED), place(files, ADDED))
        ),
        added_place=place(files, CONFIG if decoder else ADDED),
    )


def read_object(files: TokenizerFiles, name: str, limit_bytes: int = _FILE_BYTES) -> dict[str, Any]:
    """The JSON object in one of the files; nothing where it is absent.

    Raises:
        ModelError: it is damaged, or no object.
    """
    if name not in files:
        return {}
    where = place(files, name)
    found = parse_json(file_bytes(files[name], limit_bytes, where), where)
    if not isinstance(found, dict):
        raise ModelError(f"holds {type(found).__name__}, wanted an object", where=where)
    return found


def place(files: TokenizerFiles, name: str) -> Path:
    """Where one of the files is, for messages."""
    file = files.get(name)
    return file if isinstance(file, Path) else Path(name)


def _named(key: str, config: Mapping[str, Any], specials: Mapping[str, Any], where: Path) -> str | None:
    """How a token is written: a text, or an object with more on it."""
    value = config.get(key)
    if value is None:
        value = specials.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ModelError(f"{key} is {text!r:.80}, wanted a text", where=where)
    return text or None


def _ids(value: Any, where: Path) -> tuple[int, ...]:
    """One id or a list of them."""
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in found):
        raise ModelError(f"eos_token_id is {value!r:.80}, wanted an id or a list of ids", where=where)
    return tuple(found)


def _described(decoder: Any, where: Path) -> Iterator[dict[str, Any]]:
    """The tokens of ``added_tokens_decoder``: ``{"151643": {"content": …, "special": …}}``."""
    for key, said in decoder.items() if isinstance(decoder, dict) else [("", None)]:
        token = said if isinstance(said, dict) else {}
        flags = {flag: token.get(flag, False) for flag in _FLAGS}
        if not key.isdecimal() or not token or not all(isinstance(flag, bool) for flag in flags.values()):
            raise ModelError(
                f"added_tokens_decoder[{key!r:.40}] is {said!r:.80}, wanted how the token is written",
                where=where,
            )
        yield {"id": int(key[:20]), "content": token.get("content"), **flags}


def _listed(tokens: Mapping[str, Any], where: Path) -> Iterator[dict[str, Any]]:
    """The tokens of ``added_tokens.json``: ``{"<pad>": 32000}``."""
    for content, token in tokens.items():
        yield {"id": token, "content": content, **dict.fromkeys(_FLAGS, False)}
