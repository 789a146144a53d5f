"""A model that need not fit in memory: each weight is read for its product and then released.

It computes in float32, whatever the weights are stored in, so that what two models differ by is
told from what a type rounds. It is slow, and meant for one short text.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxlora_core.model.linears import Quantized, StackedLinear, is_linear, parameters, replace_modules
from mlxlora_core.values import LazyTensor

_NUMBERS = 1 << 23  # of a weight that are expanded at a time


class StreamingLinear(nn.Linear):
    """A linear whose weight is read whenever it is asked for.

    Args:
        tensor: (outputs, inputs).
        bias: (outputs,), or None.
    """

    def __init__(self, tensor: LazyTensor, bias: LazyTensor | None) -> None:
        nn.Module.__init__(self)
        self._tensor = tensor
        if bias is not None:
            self.bias = _read(bias)

    @property
    def weight(self) -> mx.array:  # type: ignore[override]  # it is never set
        """The weight, float32."""
        return _read(self._tensor)

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), computed before this returns."""
        y = _times(x, self._tensor)
        return _done(y + self.bias if "bias" in self else y)


class StreamingStackedLinear(StackedLinear):
    """A stack of linears whose weights are read whenever they are asked for.

    Args:
        tensor: (experts, outputs, inputs).
        bias: (experts, outputs), or None.
    """

    def __init__(self, tensor: LazyTensor, bias: LazyTensor | None) -> None:
        nn.Module.__init__(self)
        self._tensor = tensor
        if bias is not None:
            self.bias = _read(bias)

    @property
    def weight(self) -> mx.array:  # type: ignore[override]  # it is never set
        """The weights, float32."""
        return _read(self._tensor)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """As that of :class:`StackedLinear`, computed before this returns."""
        return _done(super().__call__(x, indices))


class StreamingEmbedding(nn.Embedding):
    """An embedding that is read whenever it is asked for.

    Args:
        tensor: (V, D).
    """

    def __init__(self, tensor: LazyTensor) -> None:
        nn.Module.__init__(self)
        self._tensor = tensor

    @property
    def weight(self) -> mx.array:  # type: ignore[override]  # it is never set
        """The embedding, float32."""
        return _read(self._tensor)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Embeddings (..., D) of token ids (...)."""
        mx.clear_cache()
        return _done(self._tensor.read()[tokens].astype(mx.float32))

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D), where the embedding is the output head too."""
        return _times(x, self._tensor)


def stream(module: nn.Module, tensors: Mapping[str, LazyTensor], adapted: tuple[str, ...] = ()) -> None:
    """Let a model compute from tensors that stay unread until they are needed.

    Args:
        module: whose parameters hold nothing but those of adapters; changed in place.
        tensors: every parameter under its name, dense.
        adapted: paths of modules that keep the linear of the model as their child ``linear``.
    """
    inside = {f"{path}.linear": path for path in adapted}
    children: dict[str, nn.Module] = {}
    for path, child in module.named_modules():
        own = inside.get(path, path)
        weight, bias = tensors.get(f"{own}.weight"), tensors.get(f"{own}.bias")
        if weight is None or path in adapted:
            continue
        if is_linear(child):
            kind = StreamingLinear if len(weight.shape) == 2 else StreamingStackedLinear
            children[path] = kind(weight, bias)
        elif isinstance(child, (nn.Embedding, Quantized)):
            children[path] = StreamingEmbedding(weight)
    replace_modules(module, children)
    rest = {name: tensors[name] for name in parameters(module) if name in tensors}
    module.update(tree_unflatten([(name, _read(tensor)) for name, tensor in rest.items()]))
    module.freeze()
    module.eval()


def _times(x: mx.array, tensor: LazyTensor) -> mx.array:
    """Outputs (..., outputs) of inputs (..., inputs), the weight made float32 some rows at a time."""
    mx.clear_cache()
    weight = tensor.read()
    mx.eval(weight)
    rows = max(1, _NUMBERS // weight.shape[1])
    parts = []
    for start in range(0, weight.shape[0], rows):
        parts.append(_done(x @ weight[start : start + rows].astype(mx.float32).T))
    return _done(mx.concatenate(parts, axis=-1))


def _read(tensor: LazyTensor) -> mx.array:
    mx.clear_cache()  # of the weight before
    return tensor.read().astype(mx.float32)


def _done(y: mx.array) -> mx.array:
    mx.eval(y)
    return y
