"""The files of a folder that its tokenizer is opened from."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, listing
from mlxlora_core.files import file_bytes, read_json
from mlxlora_hf.folder import names_in, read_table

_FAST, _SENTENCEPIECE, _TEKKEN = "tokenizer.json", "tokenizer.model", "tekken.json"
_GENERATION, _SETTINGS = "generation_config.json", "tokenizer_config.json"
_TEMPLATE, _MORE_TEMPLATES, _JINJA = "chat_template.jinja", "additional_chat_templates", ".jinja"
_BESIDE = (
    *(_SETTINGS, "special_tokens_map.json", "added_tokens.json"),
    *(_TEMPLATE, "chat_template.json", _GENERATION),
)
_FILE_BYTES = 16 << 20
_ENDS = "eos_token_id"
_VERSION = re.compile(r"tokenizer\.model\.v[0-9]{1,4}(m[0-9]{1,4})?")


def hugging_face_files(folder: Path, ends: Mapping[str, Any]) -> dict[str, Path | bytes]:
    """Name -> file, or its contents where it is completed.

    Args:
        folder: of the model.
        ends: each place that states end ids -> what it states. All of them will stand in
            generation_config.json.

    Raises:
        ModelError: there is no tokenizer, or ids that are none.
    """
    names = names_in(folder)
    vocabulary = next((name for name in (_FAST, _TEKKEN, _SENTENCEPIECE) if name in names), None)
    if vocabulary is None:
        raise _no_tokenizer(folder, names)
    files: dict[str, Path | bytes] = {name: folder / name for name in (vocabulary, *_BESIDE) if name in names}
    if _TEMPLATE in names and (more := _more_templates(folder)):
        files[_SETTINGS] = _with_templates(folder, _SETTINGS in names, [_TEMPLATE, *more])
        del files[_TEMPLATE]
    completed = _completed(folder, _GENERATION in names, ends)
    if completed is not None:
        files[_GENERATION] = completed
    return files


def mistral_files(folder: Path) -> tuple[dict[str, Path | bytes], list[str]]:
    """Name -> file of a folder that Mistral's own reader reads, and what was taken for what, in words.

    Raises:
        ModelError: there is no tokenizer, or several.
    """
    names = names_in(folder)
    if _TEKKEN in names or _SENTENCEPIECE in names:
        name = _TEKKEN if _TEKKEN in names else _SENTENCEPIECE
        return {name: folder / name}, []
    versions = sorted(name for name in names if _VERSION.fullmatch(name))
    if len(versions) > 1:
        raise ModelError(
            f"has several tokenizers: {listing(versions)}", where=folder, fix="leave one of them there"
        )
    if versions:
        return {_SENTENCEPIECE: folder / versions[0]}, [f"{versions[0]} is taken for {_SENTENCEPIECE}"]
    if _FAST in names:
        return hugging_face_files(folder, {}), []
    raise _no_tokenizer(folder, names)


def _more_templates(folder: Path) -> list[str]:
    """The templates beside the first one, which transformers saves as files of a folder by their names."""
    names = sorted(names_in(folder / _MORE_TEMPLATES))
    return [f"{_MORE_TEMPLATES}/{name}" for name in names if name.endswith(_JINJA)]


def _with_templates(folder: Path, there: bool, templates: Iterable[str]) -> bytes:
    """tokenizer_config.json with the templates in it, as transformers before 4.53 saved several."""
    own = read_json(folder / _SETTINGS, _FILE_BYTES) if there else {}
    if not isinstance(own, dict):
        raise ModelError(f"holds {type(own).__name__}, wanted an object", where=folder / _SETTINGS)
    listed = []
    for name in templates:
        called = "default" if name == _TEMPLATE else Path(name).name.removesuffix(_JINJA)
        try:
            source = file_bytes(folder / name, _FILE_BYTES, folder / name).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ModelError("is not UTF-8", where=folder / name, fix="save it as UTF-8") from None
        listed.append({"name": called, "template": source})
    return json.dumps({**own, "chat_template": listed}, indent=2, ensure_ascii=False).encode()


def _completed(folder: Path, there: bool, ends: Mapping[str, Any]) -> bytes | None:
    """generation_config.json with every end id that is stated anywhere, or None where it has them all."""
    path = folder / _GENERATION
    own = read_table(path) if there else {}
    have = _ids(own.get(_ENDS), path, _ENDS)
    wanted = list(
        dict.fromkeys(
            [*have, *(i for place, ids in ends.items() for i in _ids(ids, folder, f"{_ENDS} of {place}"))]
        )
    )
    if wanted == have:
        return None
    return json.dumps({**own, _ENDS: wanted}, indent=2).encode()


def _ids(stated: Any, where: Path, what: str) -> list[int]:
    """Token ids that a key states: one, several, or none."""
    ids: Iterable[Any] = [] if stated is None else stated if isinstance(stated, list) else [stated]
    if not all(type(number) is int and number >= 0 for number in ids):
        raise ModelError(f"{what} is {str(stated)[:60]}, wanted an id or a list of ids", where=where)
    return list(dict.fromkeys(ids))


def _no_tokenizer(folder: Path, names: Collection[str]) -> ModelError:
    wanted = f"there is no tokenizer: read are {_FAST}, {_TEKKEN} and {_SENTENCEPIECE}"
    if {"vocab.json", "merges.txt"} <= set(names):
        return ModelError(
            f"{wanted}, and not vocab.json with merges.txt",
            where=folder,
            fix=f"make {_FAST} with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    return ModelError(wanted, where=folder, fix="download the whole folder")
