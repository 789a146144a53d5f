"""``model + adapters -> model folder``, and how far the result is from what it was made of."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.errors import UsageError
from mlxlora_core.files import durable, tensor_file
from mlxlora_core.files.targets import check_output_folder
from mlxlora_core.machine.disk import require_disk
from mlxlora_core.model import folder as model_folder
from mlxlora_core.model import loading
from mlxlora_core.model.casting import DTYPES, cast
from mlxlora_core.model.events import SpaceNeeded, TensorWritten
from mlxlora_core.model.folder import CONFIG, SOURCE
from mlxlora_core.model.linears import Quantized, dense_weight, parameters
from mlxlora_core.model.loading import Model
from mlxlora_core.model.memory import require_for
from mlxlora_core.model.quantization import repacked, without_quantization
from mlxlora_core.model.regrouping import Regrouped, TriedGroupSize, regrouped_config, search
from mlxlora_core.model.several import AdapterSet, AdapterShare
from mlxlora_core.model.stored import StoredModel, bytes_of, open_stored
from mlxlora_core.model.weights import SMALLER, WEIGHTS
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.values import LazyTensor

PROBE_TOKENS = 64


@dataclass(frozen=True)
class FuseReport:
    """How near the fused model is to the adapted one, on logits of probe tokens.

    Attributes:
        folder: the fused model.
        linears: how many weights the adapters changed.
        rounded: how many of them were quantized again, which rounds the change.
        distance: ‖fused - adapted‖ / ‖adapted‖ of the logits.
        largest_difference: the largest single difference.
        base_distance: ‖base - adapted‖ / ‖adapted‖: what the adapters change.
        same_argmax: share of probe positions with the same most likely token.
        notes: what was assumed of adapter files, and whether they are of another base.
        tried: the group sizes that were compared, where they were; the nearest was taken.
    """

    folder: str
    linears: int
    rounded: int
    distance: float
    largest_difference: float
    base_distance: float
    same_argmax: float
    notes: tuple[str, ...]
    tried: tuple[TriedGroupSize, ...] = ()


def fuse(
    folder: Path,
    shares: Sequence[AdapterShare],
    target: Path,
    registry: Registry,
    *,
    quantization: Quantization | None = None,
    dequantize: bool = False,
    search_group_size: bool = False,
    overwrite: bool = False,
) -> Iterator[SpaceNeeded | TensorWritten | FuseReport]:
    """Write a model folder whose linears do what base and adapters do together.

    Tensors that no adapter touches are copied byte for byte. A quantized linear is quantized
    again as it was, which rounds the change too: the report says by how much.

    Args:
        folder: the base.
        shares: files of adapters made for it, and how much of the change of each goes in.
        target: model folder to make.
        registry: where plugins are looked up.
        quantization: how the base is quantized when it is opened, as the adapters were trained on it.
        dequantize: whether the fused model is dense where the base is quantized.
        search_group_size: whether what changes is quantized again in the group size that keeps most of it.
        overwrite: whether a model folder that is there may be replaced.

    Yields:
        What the disk must hold, what memory, each tensor as it is written, and the report.

    Raises:
        UsageError: the target is the base, or holds an adapter; no group sizes to search.
        ModelError: an adapter does not fit the base.
        SafetyError: the target holds something else.
        ResourceError: disk or memory is too small.
    """
    ours = model_folder.holds_only_a_model
    read = [folder, *(share.file.path for share in shares)]
    check_output_folder(target, read, overwrite=overwrite, ours=ours)
    stored = open_stored(folder, registry, quantization=quantization)
    packed = _quantized(stored.module)
    if search_group_size and not packed:
        raise UsageError("there is no group size to search: the base is not quantized", where=folder)
    written = _need(stored, dequantize)
    yield SpaceNeeded(require_disk(written, target))
    model = loading.load(folder, registry, quantization)
    yield SpaceNeeded(_memory(model, stored, written if dequantize else written // 2))
    probe, several = _probe(model), AdapterSet(model)
    base = _logits(model, probe)
    notes = several.load_shares(shares, registry)
    tuned = _logits(model, probe)
    found = None
    if search_group_size:
        types = {path: _type(linear, path, stored) for path, linear in packed.items()}
        found = search(several, types, lambda: _distance(_logits(model, probe), tuned))
    with durable.new_folder(target, overwrite=overwrite, ours=ours) as new:
        yield from _write(new, several, stored, dequantize, found)
        fused = _logits(loading.load(new, registry), probe)
    rounded = 0 if dequantize else len(packed.keys() & set(several.paths()))
    tried = found.tried if found else ()
    yield _report(target, len(several.paths()), rounded, (base, tuned, fused), notes, tried)


def _write(
    new: Path, several: AdapterSet, stored: StoredModel, dequantize: bool, found: Regrouped | None
) -> Iterator[TensorWritten]:
    """Write the model folder, and tell of each tensor."""
    for name, path in several.model.tokenizer.files.items():
        durable.copy_file(path, new / name)
    weights = WEIGHTS["npz" if (stored.path / WEIGHTS["npz"]).is_file() else "safetensors"]
    yield from _write_weights(new / weights, several, stored, dequantize, found)
    durable.write_json(new / CONFIG, _config(several.model, stored, dequantize, found))


def _config(model: Model, stored: StoredModel, dequantize: bool, found: Regrouped | None) -> dict[str, Any]:
    """config.json of the fused model."""
    config = without_quantization(model.config) if dequantize else dict(model.config)
    if found is not None:
        config |= regrouped_config(_quantized(stored.module), found)
    return {key: value for key, value in config.items() if key != SOURCE}


def _need(stored: StoredModel, dequantize: bool) -> int:
    """Bytes that the fused model will take."""
    need = sum(map(bytes_of, stored.tensors.values())) + tensor_file.header_bytes(len(stored.tensors))
    if not dequantize:
        return need
    for path, packed in _quantized(stored.module).items():
        parts = [stored.tensors[f"{path}.{name}"] for name in packed.parts]
        dtype = next((part.dtype for part in parts if part.dtype in DTYPES), "float32")
        need += DTYPES[dtype].size * math.prod(packed.shape) - sum(map(bytes_of, parts))
    return need


def _quantized(module: nn.Module, adapted: Collection[str] = ()) -> dict[str, Quantized]:
    """path in the weight file -> quantized linear or embedding, those inside of an adapter too."""
    inside = {f"{path}.linear": path for path in adapted}
    return {
        inside.get(path, path): child
        for path, child in module.named_modules()
        if isinstance(child, Quantized)
    }


def _memory(model: Model, stored: StoredModel, made: int) -> str:
    """What fusing needs of memory beside the base, in words: its tensors as stored, and those that are made.

    Raises:
        ResourceError: less is free.
    """
    held = sum(tensor.nbytes for tensor in parameters(model.module).values())
    read = sum(map(bytes_of, stored.tensors.values()))
    return require_for(held + read + made, "fusing", SMALLER)


def _write_weights(
    path: Path, several: AdapterSet, stored: StoredModel, dequantize: bool, found: Regrouped | None
) -> Iterator[TensorWritten]:
    """Write the weight file, and tell of each tensor."""
    packed = _quantized(stored.module).values() if dequantize else ()
    count = len(stored.tensors) - sum(len(linear.parts) - 1 for linear in packed)
    stream = _fused(several, stored, dequantize, found)
    for done, written in enumerate(tensor_file.saving(path, stream, {}, most=count), start=1):
        if isinstance(written, str):
            yield TensorWritten(written, done, count)


def _fused(
    several: AdapterSet, stored: StoredModel, dequantize: bool, found: Regrouped | None
) -> Iterator[tuple[str, mx.array]]:
    """(name, tensor) as the weight file will hold them, made for one linear after another."""
    adapted = set(several.paths())
    quantized = _quantized(several.model.module, adapted) if dequantize else {}
    for path, parts in _by_path(stored.tensors):
        name = f"{path}.weight"
        linear: nn.Module | None = several.linear(path) if path in adapted else quantized.get(path)
        if linear is not None:
            weight = dense_weight(linear)
            if path in adapted:
                name = f"{name}, with the adapter in it,"
                weight = several.fused_weight(path, weight.astype(mx.float32))
                if "bias" in parts:
                    parts["bias"] = several.fused_bias(path, parts["bias"])
            weight = cast(name, weight, _type(linear, path, stored), stored.path)
            parts = _with_weight(linear, weight, parts, path, dequantize, found)
        yield from ((f"{path}.{part}", parts[part]) for part in sorted(parts))


def _by_path(stored: Mapping[str, LazyTensor]) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """(path, part -> tensor) of the tensors of a model, read one path after another."""
    by_path: dict[str, list[str]] = {}
    for name in sorted(stored):
        by_path.setdefault(name.rpartition(".")[0], []).append(name)
    for path, names in by_path.items():
        yield path, {name.rpartition(".")[2]: stored[name].read() for name in names}


def _type(linear: nn.Module, path: str, stored: StoredModel) -> mx.Dtype:
    """The floating type that a linear is stored in."""
    types = [stored.tensors[f"{path}.{name}"].dtype for name in parameters(linear)]
    return next((DTYPES[found] for found in types if found in DTYPES), mx.float32)


def _with_weight(
    linear: nn.Module,
    weight: mx.array,
    parts: Mapping[str, mx.array],
    path: str,
    dequantize: bool,
    found: Regrouped | None,
) -> dict[str, mx.array]:
    """The parts of a linear with another weight: packed again where they are, unless it becomes dense."""
    if not isinstance(linear, Quantized):
        return {**parts, "weight": weight}
    others = {name: part for name, part in parts.items() if name not in linear.parts}
    if dequantize:
        return {**others, "weight": weight}
    quantization = found.choices[path] if found is not None else linear.quantization
    return {**others, **repacked(weight, quantization, path)}


def _logits(model: Model, tokens: mx.array) -> mx.array:
    """Logits (B, T, V), float32, of token ids (B, T)."""
    logits = model.language_model(tokens).astype(mx.float32)
    mx.eval(logits)
    return logits


def _probe(model: Model) -> mx.array:
    """Token ids (1, T) drawn once and for all from the vocabulary."""
    length = min(PROBE_TOKENS, model.language_model.context_tokens or PROBE_TOKENS)
    return mx.random.randint(0, model.language_model.vocab_size, (1, length), key=mx.random.key(0))


def _distance(logits: mx.array, tuned: mx.array) -> float:
    """‖logits - tuned‖ / ‖tuned‖."""
    return float(mx.linalg.norm((logits - tuned).reshape(-1)) / mx.linalg.norm(tuned.reshape(-1)))


def _report(
    target: Path,
    changed: int,
    rounded: int,
    logits: tuple[mx.array, mx.array, mx.array],
    notes: Sequence[str],
    tried: tuple[TriedGroupSize, ...],
) -> FuseReport:
    """What the logits of base, adapted and fused model say."""
    base, tuned, fused = logits
    same = (mx.argmax(fused, axis=-1) == mx.argmax(tuned, axis=-1)).astype(mx.float32).mean()
    return FuseReport(
        folder=str(target),
        linears=changed,
        rounded=rounded,
        distance=_distance(fused, tuned),
        largest_difference=float(mx.abs(fused - tuned).max()),
        base_distance=_distance(base, tuned),
        same_argmax=float(same),
        notes=tuple(notes),
        tried=tried,
    )
