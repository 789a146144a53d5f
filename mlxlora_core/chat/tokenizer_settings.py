"""What stands beside a tokenizer: which tokens begin and end texts, and which were added later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mlxlora_core.errors import ModelError
from mlxlora_core.files.documents import parse_json
from mlxlora_core.files.input_file import file_bytes
from mlxlora_core.values import TokenizerFiles

CONFIG, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"
ADDED, GENERATION = "added_tokens.json", "generation_config.json"

_FILE_BYTES = 16 << 20
_TOKEN_LETTERS = 4096
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files say.

    Attributes:
        config_place: tokenizer_config.json.
        bos: how the token that begins a text is written, where one is named.
        eos: how the token that ends a text is written, where one is named.
        adds_bos: whether a text begins with that token; None where nothing says so.
        spaced: whether a text behind a special token gets a space in front as one at the start does.
        stops: the ids that end what is generated.
        stops_place: the file that states them.
        added: tokens as ``tokenizer.json`` has them below ``added_tokens``.
        added_place: the file that they stand in.
    """

    MOST_IDS: ClassVar[int] = 1 << 22  # the largest vocabularies in use have 300 000

    config_place: Path = Path(CONFIG)
    bos: str | None = None
    eos: str | None = None
    adds_bos: bool | None = None
    spaced: bool = True
    stops: tuple[int, ...] = ()
    stops_place: Path = Path(GENERATION)
    added: tuple[dict[str, Any], ...] = ()
    added_place: Path = Path(CONFIG)


def read_tokenizer_settings(files: TokenizerFiles) -> TokenizerSettings:
    """What the files beside a tokenizer say; each of them may be absent.

    Raises:
        ModelError: a file is damaged, or says something of another kind.
    """
    config, specials = _object(files, CONFIG), _object(files, SPECIALS)
    generation = _object(files, GENERATION)
    adds = config.get("add_bos_token")
    if not isinstance(adds, bool | None):
        raise ModelError(f"add_bos_token is {adds!r}, wanted true or false", where=file_place(files, CONFIG))
    decoder = config.get("added_tokens_decoder")
    return TokenizerSettings(
        config_place=file_place(files, CONFIG),
        bos=_named("bos_token", config, specials, file_place(files, CONFIG)),
        eos=_named("eos_token", config, specials, file_place(files, CONFIG)),
        adds_bos=adds,
        spaced=config.get("legacy") is not False,
        stops=_ids(generation.get("eos_token_id"), file_place(files, GENERATION)),
        stops_place=file_place(files, GENERATION),
        added=tuple(
            _described(decoder, file_place(files, CONFIG))
            if decoder
            else _listed(_object(files, ADDED), file_place(files, ADDED))
        ),
        added_place=file_place(files, CONFIG if decoder else ADDED),
    )


def _object(files: TokenizerFiles, name: str, limit_bytes: int = _FILE_BYTES) -> dict[str, Any]:
    """The JSON object in one of the files; nothing where it is absent.

    Raises:
        ModelError: it is damaged, or no object.
    """
    if name not in files:
        return {}
    where = file_place(files, name)
    found = parse_json(file_bytes(files[name], limit_bytes, where), where)
    if not isinstance(found, dict):
        raise ModelError(f"holds {type(found).__name__}, wanted an object", where=where)
    return found


def file_place(files: TokenizerFiles, name: str) -> Path:
    """Where one of the files is, for messages."""
    file = files.get(name)
    return file if isinstance(file, Path) else Path(name)


def check_added(token: Any, where: Path) -> None:
    """Refuse a token, described as ``tokenizer.json`` does it, without a proper id and text.

    Raises:
        ModelError: with the token.
    """
    content, number = (token.get(key) if isinstance(token, dict) else None for key in ("content", "id"))
    if not isinstance(content, str) or not 0 < len(content) <= _TOKEN_LETTERS:
        raise ModelError(f"adds a token that is written {content!r:.80}", where=where)
    most = TokenizerSettings.MOST_IDS
    if type(number) is not int or not 0 <= number < most:
        raise ModelError(
            f"adds the token {content!r:.80} with the id {number!r:.40}, wanted 0 to {most - 1}",
            where=where,
        )


def _named(key: str, config: Mapping[str, Any], specials: Mapping[str, Any], where: Path) -> str | None:
    """How a token is written: a text, or an object with more on it."""
    value = config.get(key)
    if value is None:
        value = specials.get(key)
    text = value.get("content", value) if isinstance(value, dict) else value
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
        found = {"id": int(key[:20]), "content": token.get("content"), **flags}
        check_added(found, where)
        yield found


def _listed(tokens: Mapping[str, Any], where: Path) -> Iterator[dict[str, Any]]:
    """The tokens of ``added_tokens.json``: ``{"<pad>": 32000}``."""
    for content, token in tokens.items():
        found = {"id": token, "content": content, **dict.fromkeys(_FLAGS, False)}
        check_added(found, where)
        yield found
