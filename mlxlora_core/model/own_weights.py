"""The parameters of ``model + adapter``, unread, under their names here: dense, or packed as in the base.

The adapter's change is in the weights. One that is packed is quantized again, with the options that it
had; of those, no more than one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.model import adapters
from mlxlora_core.model.casting import DTYPES, cast
from mlxlora_core.model.fused_parameters import fused_bias, fused_weight
from mlxlora_core.model.linears import Quantized, linears
from mlxlora_core.model.loading import Model
from mlxlora_core.model.quantization import expanded, repacked
from mlxlora_core.options import plain
from mlxlora_core.values import LazyTensor, PackedTensor


@dataclass(frozen=True)
class Weight:
    """The weight of a linear or an embedding, the adapter's change in it.

    Attributes:
        name: of the parameter, ``PATH.weight``.
        linear: what holds it: dense, stacked or quantized.
        parts: what is stored of it, by the quantizer's names, or ``weight`` alone.
        model: that it is of.
        adapted: the adapter that is on the model.
        wrapped: the linear with the adapter on it, where it has one.
    """

    name: str
    linear: nn.Module
    parts: Mapping[str, LazyTensor]
    model: Model
    adapted: adapters.Adapted | None
    wrapped: nn.Module | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs, inputs), with the experts in front of a stack."""
        return self.linear.shape if isinstance(self.linear, Quantized) else self.parts["weight"].shape

    @property
    def dtype(self) -> str:
        """The floating type that it is stored in."""
        return next((part.dtype for part in self.parts.values() if part.dtype in DTYPES), "float32")

    @property
    def untouched(self) -> LazyTensor | None:
        """The tensor as it is stored, where it is dense and no adapter changes it."""
        return (
            None if self.wrapped is not None or isinstance(self.linear, Quantized) else self.parts["weight"]
        )

    def rounds(self, *, packed: bool, exact: bool) -> bool:
        """Whether it is rounded where it is written as :meth:`dense` or as a packed one has it."""
        if exact:
            return False
        if packed and isinstance(self.linear, Quantized):
            return self.wrapped is not None
        return self.untouched is None and self.dtype != "float32"

    def base(self) -> mx.array:
        """The weight of the base: float32 where it is packed, else as it is stored."""
        read = {name: part.read() for name, part in self.parts.items()}
        if isinstance(self.linear, Quantized):
            return expanded(read, self.linear.quantization, self.linear.shape)
        return read["weight"]

    def exact(self) -> mx.array:
        """The weight with the adapter's change in it, not rounded to the type that it is stored in."""
        weight = self.base()
        if self.adapted is None or self.wrapped is None:
            return weight
        component = self.adapted.choice.component
        return fused_weight(component, self.wrapped, weight.astype(mx.float32))

    def bias(self, stored: LazyTensor) -> LazyTensor:
        """The bias that goes with it, of the one that is stored."""
        adapted, wrapped = self.adapted, self.wrapped
        if adapted is None or wrapped is None or adapted.choice.component.spec.fuse_bias is None:
            return stored
        component = adapted.choice.component
        return replace(stored, read=lambda: fused_bias(component, wrapped, stored.read()))

    def dense(self, *, exact: bool = False) -> LazyTensor:
        """It as one tensor of the type that it is stored in; ``exact``: of float32 if it would be rounded."""
        untouched = self.untouched
        if untouched is not None:
            return untouched
        dtype = "float32" if exact else self.dtype

        def read() -> mx.array:
            return cast(self.name, self.exact(), DTYPES[dtype], self.model.folder)

        return LazyTensor(self.shape, dtype, read)


def own_tensors(
    model: Model,
    stored: Mapping[str, LazyTensor],
    adapted: adapters.Adapted | None,
    *,
    packed: bool = False,
    exact: bool = False,
    fused: bool = True,
) -> dict[str, LazyTensor]:
    """Every parameter of the model that a folder and an adapter are.

    Args:
        model: whose parameters hold nothing, the adapter on it.
        stored: the tensors of its files.
        adapted: the adapter, or None.
        packed: whether quantized weights stay packed; they are then given as float32, and their parts
            beside that.
        exact: whether weights that are expanded, or that an adapter changes, are float32, not rounded to
            the type that is stored.
        fused: whether the adapter's change is in the weights, or they are those of the base.
    """
    weights = weights_of(model, stored, adapted)
    if not fused:
        weights = {path: replace(weight, wrapped=None) for path, weight in weights.items()}
    again = _Requantizing()
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        path, _, part = name.rpartition(".")
        weight = weights.get(path)
        if weight is None:
            tensors[name] = tensor
        elif part == "bias":
            tensors[name] = weight.bias(tensor)
        elif weight.name not in tensors:
            keep = packed and isinstance(weight.linear, Quantized)
            tensors[weight.name] = again.packed(weight) if keep else weight.dense(exact=exact)
    return tensors


def weights_of(
    model: Model, stored: Mapping[str, LazyTensor], adapted: adapters.Adapted | None
) -> dict[str, Weight]:
    """path -> weight, of every linear and of each embedding that is packed or that the adapter changes."""
    modules = dict(model.module.named_modules())
    wrapped = {path: modules[path] for path in (adapted.paths if adapted else ())}
    found = dict(linears(model.module)) | {
        path: child for path, child in modules.items() if isinstance(child, Quantized)
    }
    found = {path: child for path, child in found.items() if path.removesuffix(".linear") not in wrapped}
    found |= {path: module.linear for path, module in wrapped.items()}
    weights = {}
    for path, linear in found.items():
        parts = {n: stored[f"{path}.{n}"] for n in linear if n != "bias" and f"{path}.{n}" in stored}
        weights[path] = Weight(f"{path}.weight", linear, parts, model, adapted, wrapped.get(path))
    return weights


class _Requantizing:
    """Weights that are packed, of which the last one that was quantized again is kept until the next is."""

    def __init__(self) -> None:
        self._last = ""
        self._parts: Mapping[str, mx.array] = {}

    def packed(self, weight: Weight) -> LazyTensor:
        """A packed weight: its parts as they are stored, or made anew where the adapter changes it."""
        assert isinstance(weight.linear, Quantized)
        quantization, parts = weight.linear.quantization, dict(weight.parts)
        if weight.wrapped is not None:
            parts = {n: replace(part, read=partial(self._part, weight, n)) for n, part in parts.items()}

        def read() -> mx.array:
            return expanded({n: part.read() for n, part in parts.items()}, quantization, weight.shape)

        how = PackedTensor(quantization.component.spec.name, plain(quantization.options), parts)
        return LazyTensor(weight.shape, "float32", read, how)

    def _part(self, weight: Weight, name: str) -> mx.array:
        """One part of a weight that is quantized again."""
        assert isinstance(weight.linear, Quantized)
        if self._last != weight.name:
            self._parts = {}
            quantization = weight.linear.quantization
            # In the type of its parts, as when the base itself was quantized.
            exact = cast(weight.name, weight.exact(), DTYPES[weight.dtype], weight.model.folder)
            self._parts = repacked(exact, quantization, weight.name)
            self._last = weight.name
            mx.eval(list(self._parts.values()))
        return self._parts[name]
