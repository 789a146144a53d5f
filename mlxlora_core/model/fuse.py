"""``model + adapter -> model folder``, and how far the result is from what it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from mlxlora_core.files import durable, tensor_file
from mlxlora_core.files.targets import check_output_folder
from mlxlora_core.machine.disk import require_disk
from mlxlora_core.model import adapters
from mlxlora_core.model import folder as model_folder
from mlxlora_core.model.convert import cast
from mlxlora_core.model.events import SpaceNeeded
from mlxlora_core.model.folder import CONFIG, Model
from mlxlora_core.model.linears import QuantizedLinear, dense_weight, parameters
from mlxlora_core.model.quantization import pack
from mlxlora_core.model.weights import WEIGHTS, read_weights
from mlxlora_core.plugins import Registry

PROBE_TOKENS = 64


@dataclass(frozen=True)
class FuseReport:
    """How near the fused model is to the adapted one, on logits of probe tokens.

    Attributes:
        folder: the fused model.
        linears: how many weights the adapter changed.
        distance: ‖fused - adapted‖ / ‖adapted‖ of the logits.
        largest_difference: the largest single difference.
        base_distance: ‖base - adapted‖ / ‖adapted‖: what the adapter changes.
        same_argmax: share of probe positions with the same most likely token.
    """

    folder: str
    linears: int
    distance: float
    largest_difference: float
    base_distance: float
    same_argmax: float


def fuse(
    folder: Path,
    adapter: Path,
    target: Path,
    registry: Registry,
    name: str | None = None,
    values: Mapping[str, Any] = MappingProxyType({}),
    overwrite: bool = False,
) -> Iterator[SpaceNeeded | FuseReport]:
    """Write a model folder whose linears do what base and adapter do together.

    Tensors that the adapter does not touch are copied byte for byte. A
    quantized linear is quantized again with the options that it had, which
    rounds the adapter's change too: the report says by how much.

    Args:
        folder: the base.
        adapter: adapter file made for it.
        target: model folder to make.
        registry: where plugins are looked up.
        name: the adapter that the caller insists on.
        values: options that the caller insists on, as for :func:`mlxlora_core.model.adapters.load`.
        overwrite: whether a model folder that is there may be replaced.

    Yields:
        What the disk must hold, and the report.

    Raises:
        UsageError: the target is the base, or holds the adapter.
        ModelError: the adapter does not fit the base.
        SafetyError: the target holds something else.
        ResourceError: the disk is too small.
    """
    ours = model_folder.holds_only_a_model
    check_output_folder(target, [folder, adapter], overwrite=overwrite, ours=ours)
    yield SpaceNeeded(require_disk(sum(path.stat().st_size for path in model_folder.files(folder)), target))
    model = model_folder.load(folder, registry)
    probe = _probe(model)
    base = _logits(model, probe)
    adapted = adapters.load(adapter, model, registry, name, values)
    tuned = _logits(model, probe)
    tensors, _ = read_weights(folder)
    tensors |= _fused(model, adapted, tensors, folder)
    weights = WEIGHTS["npz" if (folder / WEIGHTS["npz"]).is_file() else "safetensors"]
    with durable.new_folder(target, overwrite=overwrite, ours=ours) as new:
        for name, path in model.tokenizer.files.items():
            durable.copy_file(path, new / name)
        tensor_file.save(new / weights, sorted(tensors.items()), {}, len(tensors))
        durable.copy_file(folder / CONFIG, new / CONFIG)
        fused = _logits(model_folder.load(new, registry), probe)
    yield _report(target, len(adapted.paths), base, tuned, fused)


def _fused(
    model: Model, adapted: adapters.Adapted, stored: Mapping[str, mx.array], folder: Path
) -> dict[str, mx.array]:
    """The tensors of every adapted linear, in the types that the base stores."""
    modules = dict(model.module.named_modules())
    tensors: dict[str, mx.array] = {}
    for path in adapted.paths:
        wrapped: Any = modules[path]
        inner = wrapped.linear
        parts = [stored[f"{path}.{name}"].dtype for name in parameters(inner)]
        dtype = next((part for part in parts if mx.issubdtype(part, mx.floating)), mx.float32)
        before = dense_weight(inner).astype(mx.float32)
        weight = adapters.fused_weight(adapted.choice.component, wrapped, before)
        weight = cast(f"{path}.weight, with the adapter in it,", weight, dtype, folder)
        if isinstance(inner, QuantizedLinear):
            tensors |= {f"{path}.{name}": part for name, part in _repacked(inner, weight, path).items()}
        else:
            tensors[f"{path}.weight"] = weight
    return tensors


def _repacked(linear: QuantizedLinear, weight: mx.array, path: str) -> Mapping[str, mx.array]:
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


def _report(target: Path, linears: int, base: mx.array, adapted: mx.array, fused: mx.array) -> FuseReport:
    size = mx.linalg.norm(adapted.reshape(-1))

    def distance(logits: mx.array) -> float:
        return float(mx.linalg.norm((logits - adapted).reshape(-1)) / size)

    same = (mx.argmax(fused, axis=-1) == mx.argmax(adapted, axis=-1)).astype(mx.float32).mean()
    return FuseReport(
        folder=str(target),
        linears=linears,
        distance=distance(fused),
        largest_difference=float(mx.abs(fused - adapted).max()),
        base_distance=distance(base),
        same_argmax=float(same),
    )
