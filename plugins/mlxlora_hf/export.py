"""The folders that transformers and mlx-lm open, and whoever reads those: what the two exporters write."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.api import ExportSource, LazyTensor, ModelError, PackedTensor
from mlxlora_core.files import copy_file, file_bytes, parse_json, save_tensors, write_card, write_json
from mlxlora_hf.folder import CONFIG, HUGGING_FACE

#: of one weight file
SHARD_BYTES = 5 * 10**9

_TYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
_STORED, _FLOATS = "stored", tuple(_TYPES)
_AFFINE = "affine"  # the one quantizer whose parts are those of MLX itself
_GENERATION, _TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
_FAST, _PIECES = "tokenizer.json", "tokenizer.model"
_ENDS, _FILE_BYTES = "eos_token_id", 64 << 20
_LLAMA_TOKENIZER = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


def write_hugging_face(source: ExportSource, target: Path, dtype: str) -> None:
    """Write a folder as transformers saves one.

    Raises:
        ModelError: a weight that the type cannot hold.
        ResourceError: the disk is full.
    """
    tensors = {name: _as_type(name, tensor, dtype) for name, tensor in source.tensors.items()}
    named = dict(_shards(tensors))
    for shard, names in named.items():
        save_tensors(target / shard, {name: tensors[name] for name in names}, {"format": "pt"})
    if len(named) > 1:
        _write_index(target, named, tensors)
    _write_beside(source, target, tensors, {}, "transformers")


def write_mlx_lm(source: ExportSource, target: Path, dtype: str) -> None:
    """Write a folder as mlx-lm saves one; weights that are packed as MLX packs them stay so.

    Raises:
        ModelError: a weight that the type cannot hold.
        ResourceError: the disk is full.
    """
    packed: dict[str, PackedTensor] = {}
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        if tensor.packed is not None and tensor.packed.quantizer == _AFFINE:
            path = name.removesuffix(".weight")
            packed[path] = tensor.packed
            tensors |= {f"{path}.{part}": held for part, held in tensor.packed.parts.items()}
        else:
            tensors[name] = _as_type(name, tensor, dtype)
    named = dict(_shards(tensors))
    for shard, names in named.items():
        save_tensors(target / shard, {name: tensors[name] for name in names}, {"format": "mlx"})
    _write_index(target, named, tensors)
    _write_beside(source, target, tensors, _quantization(packed), "mlx-lm")


# --- weights ------------------------------------------------------------------


def _as_type(name: str, tensor: LazyTensor, dtype: str) -> LazyTensor:
    """A tensor in another type, or in its own."""
    if dtype in (_STORED, tensor.dtype) or tensor.dtype not in _FLOATS:
        return tensor
    return LazyTensor(tensor.shape, dtype, partial(_cast, name, tensor, dtype))


def _cast(name: str, tensor: LazyTensor, dtype: str) -> mx.array:
    value = tensor.read().astype(_TYPES[dtype])
    if not mx.isfinite(value).all().item():
        raise ModelError(f"{name} has values that {dtype} cannot hold", fix="add --set export.dtype=float32")
    return value


def _bytes(tensor: LazyTensor) -> int:
    size: int = getattr(mx, tensor.dtype).size
    for length in tensor.shape:
        size *= length
    return size


def _shards(tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[str, list[str]]]:
    """file -> names of its tensors, none of the files larger than one may be but by a single tensor."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        size = _bytes(tensor)
        if groups[-1] and held + size > SHARD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    for number, names in enumerate(groups, start=1):
        several = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        yield (several if len(groups) > 1 else HUGGING_FACE.whole), names


def _write_index(target: Path, named: Mapping[str, list[str]], tensors: Mapping[str, LazyTensor]) -> None:
    """The file that tells in which one each tensor is."""
    files = {name: shard for shard, names in named.items() for name in names}
    total = {"total_size": sum(map(_bytes, tensors.values()))}
    write_json(target / HUGGING_FACE.index, {"metadata": total, "weight_map": dict(sorted(files.items()))})


def _quantization(packed: Mapping[str, PackedTensor]) -> dict[str, Any]:
    """The table of packed weights, twice as mlx-lm has it: options of most, by path those of the others."""
    if not packed:
        return {}
    options = {path: {**weight.options, "mode": _AFFINE} for path, weight in packed.items()}
    texts = Counter(json.dumps(held, sort_keys=True) for held in options.values())
    common = json.loads(texts.most_common(1)[0][0])
    table = {**common, **{path: held for path, held in options.items() if held != common}}
    return {"quantization": table, "quantization_config": table}


# --- what stands beside them --------------------------------------------------


def _write_beside(
    source: ExportSource,
    target: Path,
    tensors: Mapping[str, LazyTensor],
    more: Mapping[str, Any],
    library: str,
) -> None:
    """config.json, the tokenizer's files, generation_config.json and the card."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in _FLOATS:
            sizes[tensor.dtype] += _bytes(tensor)
    dtype = sizes.most_common(1)[0][0]
    files = _tokenizer_files(source)
    stated = {**source.config, **_token_ids(source, files), "torch_dtype": dtype, "dtype": dtype}
    write_json(target / CONFIG, {**stated, **more})
    for name, file in files.items():
        copy_file(file, target / name)
    write_card(target, "Model", source.base, library, source.card)


def _token_ids(source: ExportSource, files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """The ids that config.json states; null where nobody does, for else those of another model are taken."""
    ends = sorted(source.stops)
    generation = _object(files, _GENERATION)
    found = {f"{name}_token_id": generation.get(f"{name}_token_id") for name in ("bos", "pad")}
    return {**found, _ENDS: ends[0] if len(ends) == 1 else ends or None}


def _tokenizer_files(source: ExportSource) -> dict[str, Path | bytes]:
    """The tokenizer's files as they are, and what those lack."""
    files = dict(source.tokenizer)
    generation = _object(files, _GENERATION)
    ends = generation.get(_ENDS)
    if source.stops and set(ends if isinstance(ends, list) else [ends]) != source.stops:
        files[_GENERATION] = _json({**generation, _ENDS: sorted(source.stops)})
    # A SentencePiece model by itself begins texts with its begin id; transformers has to be told.
    if _PIECES in files and _FAST not in files and not _is_ranks(files[_PIECES]):
        config = _object(files, _TOKENIZER_CONFIG)
        if "tokenizer_class" not in config:
            files[_TOKENIZER_CONFIG] = _json({**_LLAMA_TOKENIZER, **config})
    return files


def _is_ranks(file: Path | bytes) -> bool:
    """Whether a tokenizer.model is a list of ranks, as Llama 3 has it, and no SentencePiece model."""
    return bool(_RANKS.match(file_bytes(file, _FILE_BYTES, Path(_PIECES))))


def _object(files: Mapping[str, Path | bytes], name: str) -> dict[str, Any]:
    """The object in a JSON file of the tokenizer; nothing where it is absent."""
    if name not in files:
        return {}
    found = parse_json(file_bytes(files[name], _FILE_BYTES, Path(name)), Path(name))
    if not isinstance(found, dict):
        raise ModelError(f"holds a {type(found).__name__}, wanted an object", where=name)
    return found


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
