"""Open a GGUF model: every part is checked, then config, tokenizer and unread tensors are handed over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxlora_core.api import ForeignModel, ModelError, TokenizerFiles, listing
from mlxlora_gguf.header import Header
from mlxlora_gguf.parts import find_parts, read_parts
from mlxlora_gguf.tokenizer import make_files

#: tensors that are settings: the config has their numbers
SETTINGS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_SETTING_NUMBERS = 4096
_TOKENIZER = "tokenizer."
_SPLIT = "split."
_KINDS = {
    "adapter": "a LoRA adapter",
    "mmproj": "a projector of images or sound",
    "imatrix": "an importance matrix",
}


def open_model(path: Path, scales: str) -> ForeignModel:
    """The model at ``path``: a file, any part of one, or a folder with one model.

    Args:
        path: what to open.
        scales: type of the scales of packed weights: ``exact``, ``float16`` or ``float32``.

    Raises:
        ModelError: a part is absent or damaged, or this is no language model that is read.
    """
    from mlxlora_gguf.reading import lazy, read_small

    headers = read_parts(find_parts(path))
    keys = headers[0].keys
    _require_model(keys, headers[0].path)
    config = {key: value for key, value in keys.items() if not key.startswith((_TOKENIZER, _SPLIT))}
    tensors = {}
    for header in headers:
        for entry in header.tensors:
            if entry.name not in SETTINGS:
                tensors[entry.name] = lazy(entry, header.state, scales)
            elif len(entry.shape) > 1 or entry.shape[0] > _SETTING_NUMBERS or entry.type.weights > 1:
                raise ModelError(
                    f"tensor {entry.name} is {entry.type.name} of shape {entry.shape}", where=header.path
                )
            else:
                config[entry.name] = read_small(entry, header.state)
    made = make_files(keys, headers[0].path)
    return ForeignModel(config, made.files, tensors, [*made.notes, *_notes(headers, scales)], layout="gguf")


def tokenizer_files(path: Path) -> TokenizerFiles:
    """The files of the tokenizer inside a GGUF file, which need not hold tensors.

    Raises:
        ModelError: the file is damaged, or its tokenizer is none that is read.
    """
    header = read_parts(find_parts(path))[0]
    return make_files(header.keys, header.path).files


def _require_model(keys: Mapping[str, Any], path: Path) -> None:
    """Refuse what is no language model."""
    kind = keys.get("general.type", "model")
    if kind != "model":
        what = _KINDS.get(kind, f"of type {kind!r:.60}") if isinstance(kind, str) else "of no type"
        raise ModelError(f"is {what}, wanted a model", where=path)
    architecture = keys.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelError("does not say which architecture it has (general.architecture)", where=path)
    if architecture == "clip":
        raise ModelError(f"is {_KINDS['mmproj']}, wanted a model", where=path)


def _notes(headers: Sequence[Header], scales: str) -> Iterator[str]:
    """What is not kept as it stands in the file."""
    entries = [entry for header in headers for entry in header.tensors if entry.name not in SETTINGS]
    dense = [e for e in entries if e.type.weights > 1 and (not e.type.bits or len(e.shape) < 2)]
    if dense:
        names = listing(sorted({entry.type.name for entry in dense}))
        numbers = sum(4 * entry.size // entry.type.size * entry.type.weights for entry in dense)
        yield (
            f"{len(dense)} tensors ({names}) have no packed form here and are expanded to float32, exactly, "
            "unless they are quantized: "
            f"{numbers / 1e6:.0f} MB instead of {sum(entry.size for entry in dense) / 1e6:.0f}"
        )
    rounded = [entry for entry in entries if entry.type.super_blocks]
    if rounded and scales == "float16":
        yield f"the scales of {len(rounded)} tensors (Q4_K, Q5_K) are rounded to float16"
