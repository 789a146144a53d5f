"""Linear layers: MLX's dense ones, stacks of them, and quantized ones of any kind.

On a CPU the compute type is float32, and a quantized weight is expanded before it is multiplied
unless its quantizer has a product for the packed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core.machine.device import compute_dtype, on_cpu
from mlxlora_core.model.bound_products import BoundProduct
from mlxlora_core.model.expansion import times_chosen, times_expanded
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.plugins import Choice


class StackedLinear(nn.Module):
    """Linears of one shape in one tensor, one of which each row of inputs uses: the experts of a mixture.

    ``weight`` is (experts, outputs, inputs) and ``bias`` (experts, outputs).

    Args:
        experts: the number of linears.
        inputs: of each.
        outputs: of each.
        bias: whether they have a bias.
    """

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        edge = inputs**-0.5
        self.weight = mx.random.uniform(-edge, edge, (experts, outputs, inputs))
        if bias:
            self.bias = mx.zeros((experts, outputs))

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type of the inputs.

        Args:
            x: inputs.
            indices: which linear each row uses; broadcast against the axes of ``x`` before its last,
                so that (B, T, 1, D) and (B, T, K) give (B, T, K, F).
        """
        chosen = mx.stop_gradient(indices)
        y = self._product(x, chosen)
        return (y + self.bias[chosen] if "bias" in self else y).astype(x.dtype)

    def _product(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Each row times the weight that it uses."""
        return times_chosen(x, self.weight, chosen)


class Quantized(nn.Module):
    """A module with a packed weight, which does not train.

    The parts are its parameters, under the names that the quantizer gives them.

    Args:
        quantization: the quantizer, and the options that the parts were made with.
        parts: the arrays that stand for the weight.
        shape: of the weight: (outputs, inputs) or (experts, outputs, inputs).
    """

    def __init__(self, quantization: Choice, parts: Mapping[str, mx.array], shape: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.quantization = quantization
        self._shape = tuple(shape)
        self._bound: BoundProduct | None = None
        for name, part in parts.items():
            self[name] = part
        self.freeze()

    def __setitem__(self, name: str, value: Any) -> None:
        """Replace a part, and drop the product that was bound to the old ones."""
        super().__setitem__(name, value)
        self._bound = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (outputs, inputs), or (experts, outputs, inputs) for a stack."""
        return self._shape

    @property
    def parts(self) -> dict[str, mx.array]:
        """The arrays that stand for the weight, by the quantizer's names."""
        return {name: self[name] for name in self.quantization.component.spec.parts}

    def dequantize(self) -> mx.array:
        """The weight that the parts stand for, float32."""
        weight: mx.array = self.quantization.component.spec.dequantize(self.parts, self.quantization.options)
        return weight

    @property
    def stays_packed(self) -> bool:
        """Whether no product, nor the gradient of one, expands the weight."""
        return len(self._shape) == 2 and self.bind().for_all

    def bind(self) -> BoundProduct:
        """What the quantizer binds to the parts; made on first use."""
        self._bound = self._bound or BoundProduct(self.quantization, self.parts, self._shape[-1])
        return self._bound

    def _times(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), packed or expanded, whichever is faster."""
        bound = self.bind().product(x, self.training)
        if bound is not None:
            return self._checked("bind", bound(x), x)
        matmul = self.quantization.component.spec.matmul
        if matmul is None or (on_cpu() and x.size > self._shape[-1]):
            # 2048 x 2048 at 4 bits: one row takes 3.7 ms packed and 7 ms expanded, 8 rows 29 and 8 ms.
            return times_expanded(x, self.dequantize)
        return self._checked("matmul", matmul(x, self.parts, self.quantization.options), x)

    def _checked(self, function: str, y: mx.array, x: mx.array) -> mx.array:
        """``y``, which the quantizer returned for ``x``; PluginError if its type or shape is wrong."""
        shape = (*x.shape[:-1], self._shape[-2])
        if isinstance(y, mx.array) and y.shape == shape:
            return y
        component = self.quantization.component
        checked: mx.array = component.checked(function, y, mx.array)
        if checked.shape != shape:
            raise component.breach(function, f"{checked.shape}", f"{shape}")
        return checked

    def _extra_repr(self) -> str:
        return f"shape={self._shape}, {self.quantization.component.id} {self.quantization.options}"


class QuantizedLinear(Quantized):
    """A linear, or a stack of them, whose weight a quantizer packed; see :class:`Quantized`.

    Args:
        quantization: the quantizer, and the options that the parts were made with.
        parts: the arrays that stand for the weight.
        shape: of the weight: (outputs, inputs) or (experts, outputs, inputs).
        bias: of the linear, if it has one.
    """

    def __init__(
        self,
        quantization: Choice,
        parts: Mapping[str, mx.array],
        shape: tuple[int, ...],
        bias: mx.array | None = None,
    ) -> None:
        super().__init__(quantization, parts, shape)
        if bias is not None:
            self.bias = bias
            self.freeze()

    def __call__(self, x: mx.array, indices: mx.array | None = None) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type of the inputs.

        Args:
            x: inputs.
            indices: as for :class:`StackedLinear`, if this is a stack.
        """
        if indices is not None:
            indices = mx.stop_gradient(indices)
            y = times_expanded(x, self.dequantize, indices)
        else:
            y = self._times(x)
        if "bias" in self:
            y = y + (self.bias if indices is None else self.bias[indices])
        return y.astype(x.dtype)


class QuantizedEmbedding(Quantized):
    """An embedding with a packed weight (V, D), packed row by row."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """Embeddings (..., D) of token ids (...), in the type to compute in."""
        ids = tokens.reshape(-1)
        rows = {name: part[ids] for name, part in self.parts.items()}
        weight: mx.array = self.quantization.component.spec.dequantize(rows, self.quantization.options)
        types = (part.dtype for part in rows.values() if mx.issubdtype(part.dtype, mx.floating))
        weight = weight.astype(compute_dtype(next(types, mx.float16)))  # that of the rest of the model
        return weight.reshape(*tokens.shape, self._shape[-1])

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D), for a tied output head."""
        return self._times(x).astype(x.dtype)


class StoredLinear(nn.Linear):
    """A dense linear whose weight stays as it is stored and is expanded for each product.

    It computes the same as a linear that was expanded on loading, in less memory and more time.

    Args:
        linear: gives its parameters.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.weight = linear.weight
        if "bias" in linear:
            self.bias = linear.bias

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type of the inputs."""
        y = times_expanded(x, self._stored)
        if "bias" in self:
            y = y + self.bias
        return y.astype(x.dtype)

    def _stored(self) -> mx.array:
        """The weight as it is stored."""
        weight: mx.array = self.weight
        return weight


class StoredStackedLinear(StackedLinear):
    """A stack of linears that stays as it is stored; see :class:`StoredLinear`.

    Args:
        linear: gives its parameters.
    """

    def __init__(self, linear: StackedLinear) -> None:
        nn.Module.__init__(self)
        self.weight = linear.weight
        if "bias" in linear:
            self.bias = linear.bias

    def _product(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Each row times the weight that it uses, expanded."""
        return times_expanded(x, lambda: self.weight, chosen)


class StoredEmbedding(nn.Embedding):
    """An embedding that stays as it is stored; see :class:`StoredLinear`.

    Args:
        embedding: gives its parameters.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.weight = embedding.weight

    def __call__(self, tokens: mx.array) -> mx.array:
        """Embeddings (..., D) of token ids (...), in the type to compute in."""
        rows: mx.array = self.weight[tokens]
        return rows.astype(compute_dtype(rows.dtype))

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D), for a tied output head."""
        return times_expanded(x, self._stored).astype(x.dtype)

    def _stored(self) -> mx.array:
        """The weight as it is stored."""
        weight: mx.array = self.weight
        return weight


def bind_products(module: nn.Module) -> None:
    """Bind the products of all packed weights now, since that cannot be done inside a compiled function."""
    for _, child in module.named_modules():
        if isinstance(child, Quantized) and len(child.shape) == 2:
            child.bind()


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a dense, stacked or quantized linear."""
    return isinstance(module, (nn.Linear, StackedLinear, QuantizedLinear, nn.QuantizedLinear))


def is_packed(module: nn.Module) -> bool:
    """Whether ``module`` has a packed weight."""
    return isinstance(module, (Quantized, nn.QuantizedLinear))


def is_stored(module: nn.Module) -> bool:
    """Whether ``module`` is a dense linear or embedding that is expanded for each product."""
    return isinstance(module, (StoredLinear, StoredStackedLinear, StoredEmbedding))


def is_expanded(module: nn.Module) -> bool:
    """Whether products with ``module`` expand its weight temporarily, which takes memory; only on a CPU."""
    packed = is_packed(module) and not (isinstance(module, Quantized) and module.stays_packed)
    return on_cpu() and (packed or is_stored(module))


def linear_shape(linear: nn.Module) -> tuple[int, ...]:
    """(outputs, inputs) of a dense or quantized linear, (experts, outputs, inputs) of a stack.

    Raises:
        TypeError: it is not a linear.
    """
    if not is_linear(linear):
        raise TypeError(f"wanted a dense or quantized linear, got {type(linear).__name__}")
    if isinstance(linear, QuantizedLinear):
        return linear.shape
    shape: tuple[int, ...] = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        return shape[0], shape[1] * 32 // linear.bits
    return shape


def packed_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the weight of a quantized linear or embedding."""
    return module.shape if isinstance(module, Quantized) else linear_shape(module)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the weight of a linear, as :func:`linear_shape`, or (V, D) of an embedding."""
    if isinstance(module, nn.Embedding):
        shape: tuple[int, ...] = module.weight.shape
        return shape
    return packed_shape(module)


def dense_weight(linear: nn.Module) -> mx.array:
    """The weight of a linear or embedding, expanded if it is packed, in the shape of :func:`weight_shape`.

    A dense weight has the type that it is stored in. A quantized one is float32, since the product
    ``scale * q`` would be rounded in half precision, and might overflow.
    """
    if isinstance(linear, Quantized):
        return linear.dequantize()
    if isinstance(linear, nn.QuantizedLinear):
        scales, biases = linear.scales, linear.biases
        if biases is not None:  # the affine mode; the others scale by powers of two
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(
            linear.weight,
            scales,
            biases,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
            dtype=mx.float32,
        )
    weight: mx.array = linear.weight
    return weight


def embeddings(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, embedding) of every dense or quantized embedding in ``module``."""
    kinds = (nn.Embedding, QuantizedEmbedding)
    return ((path, child) for path, child in module.named_modules() if isinstance(child, kinds))


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, linear) of every dense, stacked or quantized linear in ``module``."""
    return ((path, child) for path, child in module.named_modules() if is_linear(child))


def layers_by_path(model: LanguageModel) -> Callable[[str], int | None]:
    """A function from a path to the index of the layer that it is in, or None if it is in no layer."""
    module: Any = model
    numbers = {id(layer): number for number, layer in enumerate(model.layers)}
    places = {path: numbers[id(child)] for path, child in module.named_modules() if id(child) in numbers}

    def layer_of(path: str) -> int | None:
        parts = path.split(".")
        above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((places[start] for start in above if start in places), None)

    return layer_of


def replace_modules(module: nn.Module, children: Mapping[str, nn.Module]) -> None:
    """Put ``children`` at their paths inside ``module``."""
    if children:
        module.update_modules(tree_unflatten(list(children.items())))


def parameters(module: nn.Module) -> dict[str, mx.array]:
    """Every parameter by its path."""
    return dict(tree_flatten(module.parameters()))
