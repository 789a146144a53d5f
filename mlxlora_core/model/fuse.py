"""``model + adapter -> model folder``, and how far the result is from what it was made of."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.files import durable, tensor_file
from mlxlora_core.files.targets import check_output_folder
from mlxlora_core.machine.disk import require_disk
from mlxlora_core.model import adapters, loading
from mlxlora_core.model import folder as model_folder
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.casting import DTYPES, cast
from mlxlora_core.model.events import SpaceNeeded, TensorWritten
from mlxlora_core.model.folder import CONFIG, SOURCE
from mlxlora_core.model.linears import Quantized, dense_weight, parameters
from mlxlora_core.model.loading import Model
from mlxlora_core.model.memory import require_for
from mlxlora_core.model.quantization import pack, without_quantization
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
        linears: how many weights the adapter changed.
        rounded: how many of them were quantized again, which rounds the adapter's change.
        distance: ‖fused - adapted‖ / ‖adapted‖ of the logits.
        largest_difference: the largest single difference.
        base_distance: ‖base - adapted‖ / ‖adapted‖: what the adapter changes.
        same_argmax: share of probe positions with the same most likely token.
        notes: what was assumed of the adapter's file, and whether it is of another base.
    """

    folder: str
    linears: int
    rounded: int
    distance: float
    largest_difference: float
    base_distance: float
    same_argmax: float
    notes: tuple[str, ...]


def fuse(
    folder: Path,
    adapter: AdapterFile,
    target: Path,
    registry: Registry,
    *,
    quantization: Quantization | None = None,
    dequantize: bool = False,
    overwrite: bool = False,
) -> Iterator[SpaceNeeded | TensorWritten | FuseReport]:
    """Write a model folder whose linears do what base and adapter do together.

    Tensors that the adapter does not touch are copied byte for byte. A
    quantized linear is quantized again with the options that it had, which
    rounds the adapter's change too: the report says by how much. With
    ``dequantize`` every quantized linear becomes a dense one instead.

    Args:
        folder: the base.
        adapter: a file of one made for it, and what the caller insists on.
        target: model folder to make.
        registry: where plugins are looked up.
        quantization: how the base is quantized when it is opened, as it was when the adapter was trained.
        dequantize: whether the fused model is dense where the base is quantized.
        overwrite: whether a model folder that is there may be replaced.

    Yields:
        What the disk must hold, what memory, each tensor as it is written, and the report.

    Raises:
        UsageError: the target is the base, or holds the adapter.
        ModelError: the adapter does not fit the base.
        SafetyError: the target holds something else.
        ResourceError: disk or memory is too small.
    """
    ours = model_folder.holds_only_a_model
    check_output_folder(target, [folder, adapter.path], overwrite=overwrite, ours=ours)
    stored = open_stored(folder, registry, quantization=quantization)
    written = _need(stored, dequantize)
    yield SpaceNeeded(require_disk(written, target))
    model = loading.load(folder, registry, quantization)
    yield SpaceNeeded(_memory(model, stored, written if dequantize else written // 2))
    probe = _probe(model)
    base = _logits(model, probe)
    adapted = adapters.load_file(adapter, model, registry)
    tuned = _logits(model, probe)
    with durable.new_folder(target, overwrite=overwrite, ours=ours) as new:
        for name, path in model.tokenizer.files.items():
            durable.copy_file(path, new / name)
        weights = WEIGHTS["npz" if (folder / WEIGHTS["npz"]).is_file() else "safetensors"]
        yield from _write_weights(new / weights, model, adapted, stored, dequantize)
        config = without_quantization(model.config) if dequantize else model.config
        durable.write_json(new / CONFIG, {key: value for key, value in config.items() if key != SOURCE})
        fused = _logits(loading.load(new, registry), probe)
    rounded = 0 if dequantize else len(_quantized(model.module, adapted.paths).keys() & set(adapted.paths))
    yield _report(target, adapted, rounded, base, tuned, fused)


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
    path: Path, model: Model, adapted: adapters.Adapted, stored: StoredModel, dequantize: bool
) -> Iterator[TensorWritten]:
    """Write the weight file, and tell of each tensor."""
    packed = _quantized(model.module, adapted.paths).values() if dequantize else ()
    count = len(stored.tensors) - sum(len(linear.parts) - 1 for linear in packed)
    stream = _fused(model, adapted, stored, dequantize)
    for done, written in enumerate(tensor_file.saving(path, stream, {}, most=count), start=1):
        if isinstance(written, str):
            yield TensorWritten(written, done, count)


def _fused(
    model: Model, adapted: adapters.Adapted, stored: StoredModel, dequantize: bool
) -> Iterator[tuple[str, mx.array]]:
    """(name, tensor) as the weight file will hold them, made for one linear after another."""
    modules = dict(model.module.named_modules())
    quantized: Mapping[str, Quantized] = _quantized(model.module, adapted.paths) if dequantize else {}
    for path, parts in _by_path(stored.tensors):
        name, linear = f"{path}.weight", quantized.get(path)
        if path in adapted.paths:
            wrapped: Any = modules[path]
            name, linear = f"{name}, with the adapter in it,", wrapped.linear
            before = dense_weight(wrapped.linear).astype(mx.float32)
            weight = adapters.fused_weight(adapted.choice.component, wrapped, before)
            if "bias" in parts:
                parts["bias"] = adapters.fused_bias(adapted.choice.component, wrapped, parts["bias"])
        elif linear is not None:
            weight = linear.dequantize()
        if linear is not None:
            weight = cast(name, weight, _type(linear, parts), stored.path)
            parts = _with_weight(linear, weight, parts, path, dequantize)
        yield from ((f"{path}.{part}", parts[part]) for part in sorted(parts))


def _by_path(stored: Mapping[str, LazyTensor]) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """(path, part -> tensor) of the tensors of a model, read one path after another."""
    by_path: dict[str, list[str]] = {}
    for name in sorted(stored):
        by_path.setdefault(name.rpartition(".")[0], []).append(name)
    for path, names in by_path.items():
        yield path, {name.rpartition(".")[2]: stored[name].read() for name in names}


def _type(linear: nn.Module, parts: Mapping[str, mx.array]) -> mx.Dtype:
    """The floating type that a linear is stored in."""
    types = [parts[name].dtype for name in parameters(linear)]
    return next((found for found in types if mx.issubdtype(found, mx.floating)), mx.float32)


def _with_weight(
    linear: nn.Module, weight: mx.array, parts: Mapping[str, mx.array], path: str, dequantize: bool
) -> dict[str, mx.array]:
    """The parts of a linear with another weight: packed again where they are, unless it becomes dense."""
    if not isinstance(linear, Quantized):
        return {**parts, "weight": weight}
    others = {name: part for name, part in parts.items() if name not in linear.parts}
    return {**others, **({"weight": weight} if dequantize else _repacked(linear, weight, path))}


def _repacked(linear: Quantized, weight: mx.array, path: str) -> Mapping[str, mx.array]:
    """A weight quantized as that of ``linear`` was."""
    packed = pack(weight, linear.quantization)
    if packed is None:
        what = f"None for {path}, which it packed before"
        raise linear.quantization.component.breach("quantize", what, "its parts")
    return packed.parts


def _logits(model: Model, tokens: mx.array) -> mx.array:
    """Logits (B, T, V), float32, of token ids (B, T)."""
    logits = model.language_model(tokens).astype(mx.float32)
    mx.eval(logits)
    return logits


def _probe(model: Model) -> mx.array:
    """Token ids (1, T) drawn once and for all from the vocabulary."""
    length = min(PROBE_TOKENS, model.language_model.context_tokens or PROBE_TOKENS)
    return mx.random.randint(0, model.language_model.vocab_size, (1, length), key=mx.random.key(0))


def _report(
    target: Path, adapted: adapters.Adapted, rounded: int, base: mx.array, tuned: mx.array, fused: mx.array
) -> FuseReport:
    """What the logits of base, adapted and fused model say."""
    size = mx.linalg.norm(tuned.reshape(-1))

    def distance(logits: mx.array) -> float:
        return float(mx.linalg.norm((logits - tuned).reshape(-1)) / size)

    same = (mx.argmax(fused, axis=-1) == mx.argmax(tuned, axis=-1)).astype(mx.float32).mean()
    return FuseReport(
        folder=str(target),
        linears=len(adapted.paths),
        rounded=rounded,
        distance=distance(fused),
        largest_difference=float(mx.abs(fused - tuned).max()),
        base_distance=distance(base),
        same_argmax=float(same),
        notes=adapted.notes,
    )
