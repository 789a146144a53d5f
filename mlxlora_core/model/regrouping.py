"""Fused weights quantized again, and the group size in which the least of their change is rounded away."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import mlx.core as mx

from mlxlora_core.errors import UsageError
from mlxlora_core.model.linears import (
    Quantized,
    QuantizedEmbedding,
    QuantizedLinear,
    dense_weight,
    replace_modules,
)
from mlxlora_core.model.quantization import pack, packed_config
from mlxlora_core.model.several import AdapterSet
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice

_GROUP_SIZE = "group_size"


@dataclass(frozen=True)
class TriedGroupSize:
    """What quantizing the changed linears again in groups of one size comes to.

    Attributes:
        group_size: weights that share a scale.
        distance: ‖fused - adapted‖ / ‖adapted‖ of the logits.
        bytes: of the parts of all changed linears.
    """

    group_size: int
    distance: float
    bytes: int


@dataclass(frozen=True)
class Regrouped:
    """The group size that was taken.

    Attributes:
        choices: path of each changed linear that is quantized -> how it is quantized again.
        tried: what was compared.
    """

    choices: Mapping[str, Choice]
    tried: tuple[TriedGroupSize, ...]


def search(several: AdapterSet, types: Mapping[str, mx.Dtype], distance: Callable[[], float]) -> Regrouped:
    """Quantize the changed linears again in groups of each size that their quantizer has.

    Args:
        several: the adapters, of which shares are selected; the model is left as it was.
        types: path -> the floating type that each linear is stored in.
        distance: of the logits that the model gives now from those that it should give.

    Raises:
        UsageError: a quantizer without group sizes, or no linear that changes is quantized.
    """
    found = {path: several.linear(path) for path in several.paths()}
    packed = {path: linear for path, linear in found.items() if isinstance(linear, Quantized)}
    if not packed:
        raise UsageError("there is no group size to search: no linear that the adapter changes is quantized")
    held = dict(several.model.module.named_modules())
    before = {path: held[path] for path in packed}
    tried = dict[TriedGroupSize, dict[str, Choice]]()
    try:
        for size in _sizes(next(iter(packed.values())).quantization):
            choices = {path: _with_size(linear.quantization, size) for path, linear in packed.items()}
            made = {path: _made(several, path, types[path], choices[path]) for path in packed}
            if not _are_all(made):
                continue
            replace_modules(several.model.module, made)
            taken = sum(part.nbytes for module in made.values() for part in module.parts.values())
            tried[TriedGroupSize(size, distance(), taken)] = choices
    finally:
        replace_modules(several.model.module, before)
    nearest = min(tried, key=lambda one: (one.distance, one.bytes))
    return Regrouped(tried[nearest], tuple(tried))


def regrouped_config(packed: Mapping[str, Quantized], found: Regrouped) -> dict[str, Any]:
    """What config.json says of a model in which some linears are quantized otherwise.

    Args:
        packed: path -> each quantized linear and embedding, as it was.
        found: what was taken for those that changed.
    """
    choices = {path: found.choices.get(path, linear.quantization) for path, linear in packed.items()}
    quantizer = next(iter(choices.values())).component.spec.name
    return packed_config(quantizer, {path: plain(choice.options) for path, choice in choices.items()})


def _sizes(quantization: Choice) -> tuple[int, ...]:
    """The group sizes that a quantizer has, the largest first."""
    rules = [f.metadata for f in dataclasses.fields(quantization.options) if f.name == _GROUP_SIZE]
    choices = rules[0].get("choices") if rules else None
    if not choices:
        name = quantization.component.id
        raise UsageError(f"there is no group size to search: quantizer {name} has no {_GROUP_SIZE}")
    return tuple(sorted(choices, reverse=True))


def _with_size(quantization: Choice, size: int) -> Choice:
    """The same quantization in groups of another size."""
    return Choice(quantization.component, dataclasses.replace(quantization.options, **{_GROUP_SIZE: size}))


def _are_all(made: Mapping[str, Quantized | None]) -> TypeGuard[Mapping[str, Quantized]]:
    """Whether the quantizer has taken every linear."""
    return None not in made.values()


def _made(several: AdapterSet, path: str, dtype: mx.Dtype, quantization: Choice) -> Quantized | None:
    """A linear with the change in it, quantized again; None where it does not go in groups of this size."""
    linear: Any = several.linear(path)
    weight = several.fused_weight(path, dense_weight(linear).astype(mx.float32))
    packed = pack(weight.astype(dtype), quantization)
    if packed is None:
        return None
    if isinstance(linear, QuantizedLinear):
        return QuantizedLinear(quantization, packed.parts, linear.shape, linear.get("bias"))
    return QuantizedEmbedding(quantization, packed.parts, linear.shape)
