"""The chat template that stands among the files of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.chat.template import ChatTemplate
from mlxlora_core.errors import ModelError, listing
from mlxlora_core.files.documents import parse_json
from mlxlora_core.files.input_file import file_bytes
from mlxlora_core.values import TokenizerFiles

TEMPLATE, OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
CONFIG, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"

_FILE_BYTES = 64 << 20  # tokenizer_config.json repeats every added token
_KEY = "chat_template"


def find_template(files: TokenizerFiles) -> ChatTemplate | None:
    """The chat template of a model, or None where it has none.

    It is looked for in ``chat_template.jinja``, then under ``chat_template`` in
    ``tokenizer_config.json``, which may be a list of templates by name, then in
    ``chat_template.json``. Whether it can be run shows when it is first used.

    Args:
        files: those of the tokenizer, by name.

    Raises:
        ModelError: a file is damaged, or what stands in it is no template.
    """
    config = _object(files, CONFIG)
    named, where = _named(files, config)
    if not named:
        return None
    default = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
    if default is None:
        raise ModelError(f"has the chat templates {listing(named)}, and none is named default", where=where)
    stated = {name: value for name, value in config.items() if value is not None}
    specials = dict(_specials({**_object(files, SPECIALS), **stated}))
    return ChatTemplate(default, specials, tools_source=named.get("tool_use", ""), where=where)


def _named(files: TokenizerFiles, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """name -> source of the templates in the first file that has any, and that file."""
    if TEMPLATE in files:
        where = _where(files, TEMPLATE)
        try:
            source = file_bytes(files[TEMPLATE], _FILE_BYTES, Path(where)).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ModelError("is not UTF-8", where=where, fix="save it as UTF-8") from None
        return {"default": source}, where
    if config.get(_KEY) is not None:
        return _templates(config[_KEY], _where(files, CONFIG)), _where(files, CONFIG)
    old = _object(files, OLD_TEMPLATE)
    where = _where(files, OLD_TEMPLATE)
    return (_templates(old[_KEY], where) if old.get(_KEY) is not None else {}), where


def _templates(value: Any, where: str) -> dict[str, str]:
    """name -> source, of a template or of a list of them."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and value:
        parts = [part if isinstance(part, dict) else {} for part in value]
        found = {part.get("name"): part.get("template") for part in parts}
        if len(found) == len(parts) and all(isinstance(text, str) for pair in found.items() for text in pair):
            return {str(name): str(source) for name, source in found.items()}
    raise ModelError(f"{_KEY} is neither a text nor a list of {{name, template}}", where=where)


def _specials(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of the tokens that templates know by name."""
    extra = config.get("extra_special_tokens")
    for name, value in {**(extra if isinstance(extra, dict) else {}), **config}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            yield name, text


def _object(files: TokenizerFiles, name: str) -> Mapping[str, Any]:
    """What a JSON file holds, or nothing where it is not there."""
    if name not in files:
        return {}
    where = _where(files, name)
    value = parse_json(file_bytes(files[name], _FILE_BYTES, Path(where)), where)
    if not isinstance(value, dict):
        raise ModelError("holds no JSON object", where=where)
    return value


def _where(files: TokenizerFiles, name: str) -> str:
    file = files.get(name)
    return str(file) if isinstance(file, Path) else name
