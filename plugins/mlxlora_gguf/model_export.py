"""Exporter ``gguf``: a model as one file of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.api import ExportSource, MlxloraError, ModelError
from mlxlora_gguf.contents import Cost, out_tensor, small_tensor, told_type
from mlxlora_gguf.header import read_header
from mlxlora_gguf.tokenizer_out import TOKENS, tokenizer_keys
from mlxlora_gguf.writing import OutTensor, Value, write_gguf

#: the key that shows a file to be one of ours
MARK = "general.mlxlora"

_ARCHITECTURE = "general.architecture"
_FILE = "model.gguf"
_PHI_3, _TOKENS_OF_PHI_3 = ("phi-3", "phi3"), ("<unk>", "<s>", "</s>", "<|endoftext|>")


def export_model(source: ExportSource, target: Path, kind: str, pre: str, context: int | None) -> list[str]:
    """Write ``model.gguf`` into a folder.

    Args:
        source: the model, in the layout ``gguf``.
        target: folder.
        kind: type of the weights, or ``auto``.
        pre: name of the rule by which the tokenizer splits; nothing to find it.
        context: tokens of the longest text, where the model does not state it.

    Returns:
        What is not as it is in mlxlora, a sentence each.

    Raises:
        ModelError: what a GGUF file cannot hold.
        ResourceError: the disk is full.
    """
    config, vectors = _split(source.config)
    architecture = config[_ARCHITECTURE]
    longest = f"{architecture}.context_length"
    if config.get(longest) is None and context is None:
        raise ModelError(
            "does not say how long a text it was made for, which a GGUF file must",
            fix="add --set export.context_length=4096, or as many tokens as it was trained on",
        )
    config = {longest: context, **config} if context is not None else config
    keys, notes = tokenizer_keys(source, pre)
    cost = Cost()
    tensors = [small_tensor(name, values) for name, values in vectors.items()]
    tensors += [out_tensor(name, tensor, kind, cost) for name, tensor in source.tensors.items()]
    write_gguf(target / _FILE, {**_general(source, config, tensors, keys[TOKENS]), **config, **keys}, tensors)
    return [*notes, *_windows(config, architecture), *cost.notes()]


def _split(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The keys of a config, and what of it is a tensor there."""
    vectors = {key: list(value) for key, value in config.items() if key.endswith(".weight")}
    return {key: value for key, value in config.items() if key not in vectors}, vectors


def _general(
    source: ExportSource, config: Mapping[str, Any], tensors: list[OutTensor], tokens: Any
) -> dict[str, Value]:
    """What the file says of itself."""
    keys: dict[str, Value] = {
        _ARCHITECTURE: config[_ARCHITECTURE],
        "general.type": "model",
        "general.file_type": told_type(tensors),
        "general.alignment": 32,
        MARK: 1,
    }
    keys |= named(source, "general.name")
    called = any(part in str(keys.get("general.name")).lower() for part in _PHI_3)
    if called and not set(_TOKENS_OF_PHI_3) <= set(tokens):
        # llama.cpp goes by this name: it strips texts behind special tokens, and fails where one is missing.
        del keys["general.name"]
    if any(tensor.type.weights > 1 for tensor in tensors):
        keys["general.quantization_version"] = 2
    return keys


def named(source: ExportSource, key: str) -> dict[str, Value]:
    """What the base is called, without the place where it is, and how it was tuned."""
    name = source.base.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    keys: dict[str, Value] = {key: name} if name else {}
    return keys | ({"general.description": source.card} if source.card else {})


def _windows(config: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """What llama.cpp does not do with a window that a file states."""
    window = config.get(f"{architecture}.attention.sliding_window")
    if architecture == "phi3" and window and window < config[f"{architecture}.context_length"]:
        yield f"a token sees {window} tokens, as the file says; llama.cpp lets it see all"


def is_ours(path: Path) -> bool:
    """Whether a file is one that an exporter of this plugin has written; never raises."""
    try:
        return MARK in read_header(path).keys
    except MlxloraError:
        return False
