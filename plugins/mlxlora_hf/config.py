"""config.json: the text model in it, and what in it is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, SafetyError, listing
from mlxlora_hf.folder import CONFIG, read_table

_TEXT = "text_config"
#: where models that wrap a text model have it otherwise
_OTHER_TEXTS = ("language_config", "llm_config", "thinker_config", "decoder", "text_model_config")
_CODE, _POINTER = "model_file", "auto_map"
_QUANTIZATION, _THEIR_QUANTIZATION = "quantization", "quantization_config"
_READ = "bf16, f16 and f32 weights are read, and those that mlx-lm has quantized (affine)"
#: what the wrapper states of the text model in it
_SHARED = ("tie_word_embeddings",)


@dataclass(frozen=True)
class Config:
    """What config.json says.

    Attributes:
        text: of the text model, without what the loader itself has dealt with.
        quantization: the table of what mlx-lm has packed, or None.
        ends: each place that states end ids -> what it states.
        notes: what the owner may not expect, in words.
    """

    text: dict[str, Any]
    quantization: Mapping[str, Any] | None
    ends: Mapping[str, Any]
    notes: tuple[str, ...]


def read_config(folder: Path) -> Config:
    """config.json of a folder.

    Raises:
        ModelError: it is absent, damaged, or that of something that is not read, which it names.
        SafetyError: it names a file of code.
    """
    path = folder / CONFIG
    if not path.exists():
        raise ModelError(f"there is no {CONFIG}", where=folder, fix="download the whole folder")
    whole = read_table(path)
    text, notes = _text_model(whole, path)
    _refuse_code((whole, text), path)
    quantization = _quantization((whole, text), path)
    code = sorted({key for stated in (whole, text) for key in _names_of_code(stated.get(_POINTER))})
    if code:
        kind = text.get("model_type")
        notes.append(
            f"{CONFIG} points at code ({_POINTER}: {listing(code)}), which is not run: "
            f"what is built is mlxlora's own {kind!r}"
        )
    ends = {CONFIG: whole.get("eos_token_id"), f"{CONFIG} {_TEXT}": text.get("eos_token_id")}
    dealt = (_POINTER, _QUANTIZATION, _THEIR_QUANTIZATION)
    kept = {key: value for key, value in text.items() if key not in dealt}
    return Config(kept, quantization, ends, tuple(notes))


def _text_model(whole: Mapping[str, Any], path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """The config of the text model, and a note where it stood inside another one."""
    kind = whole.get("model_type")
    text = whole.get(_TEXT)
    if text is None:
        other = [key for key in _OTHER_TEXTS if isinstance(whole.get(key), dict)]
        if other and "hidden_size" not in whole:
            raise ModelError(
                f"is a {kind!r} model, with a text model under {listing(other)}; one under {_TEXT} is read",
                where=path,
                fix="take the text model by itself, where its makers give it",
            )
        return whole, []
    if not isinstance(text, dict):
        raise ModelError(f"{_TEXT} is a {type(text).__name__}, wanted an object", where=path)
    if not isinstance(text.get("model_type"), str):
        raise ModelError(
            f"is a {kind!r} model, whose {_TEXT} does not state the model_type of the text model",
            where=path,
            fix="take the text model by itself, where its makers give it",
        )
    shared = {key: whole[key] for key in _SHARED if key in whole and text.get(key) is None}
    return {**text, **shared}, [f"of this {kind!r} model the text model is read, a {text['model_type']!r}"]


def _refuse_code(configs: tuple[Mapping[str, Any], ...], path: Path) -> None:
    if any(config.get(_CODE) for config in configs):
        raise SafetyError(
            f"names a file of code ({_CODE}), which is never run", where=path, fix="take a model without one"
        )


def _names_of_code(pointer: Any) -> list[str]:
    """What an ``auto_map`` has code for."""
    if not pointer:
        return []
    return [str(key) for key in pointer] if isinstance(pointer, dict) else [_POINTER]


def _quantization(configs: tuple[Mapping[str, Any], ...], path: Path) -> Mapping[str, Any] | None:
    """mlx-lm's table, which wins over what stands beside it; another tool's is refused by name."""
    for key in (_QUANTIZATION, _THEIR_QUANTIZATION):
        for config in configs:
            table = config.get(key)
            if table is None or table == {}:
                continue
            if not isinstance(table, dict):
                raise ModelError(f"{key} is a {type(table).__name__}, wanted an object", where=path)
            method = table.get("quant_method") or table.get("quant_algo")
            if method is not None or (key == _THEIR_QUANTIZATION and "bits" not in table):
                named = f"by {method}" if method is not None else f"in a way that {key} does not name"
                raise ModelError(
                    f"is quantized {named}, which is not read; {_READ}",
                    where=path,
                    fix="take the model that it was made of, and quantize that: --quantize",
                )
            return table
    return None
