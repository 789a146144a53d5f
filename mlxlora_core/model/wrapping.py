"""Have an adapter wrap linears and embeddings, and hold what it gives against its contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import is_linear, layers_by_path, weight_shape
from mlxlora_core.plugins import Component
from mlxlora_core.values import Place


def wrap_each(
    model: LanguageModel, component: Component, inner: Mapping[str, nn.Module], options: Mapping[str, Any]
) -> dict[str, nn.Module]:
    """path -> what an adapter wraps around the module there; without those that it leaves alone.

    Args:
        model: that the paths are of.
        component: the adapter.
        inner: path -> linear or embedding.
        options: path -> those of the adapter there.

    Raises:
        PluginError: the adapter gives something else than its contract says.
    """
    layer_of = layers_by_path(model)
    wrapped = {}
    for path, held in inner.items():
        kind = "linear" if is_linear(held) else "embedding"
        place = Place(path, layer_of(path), weight_shape(held), kind)
        module = component.spec.wrap(held, place, options[path])
        if module is not None:
            wrapped[path] = _checked(component, held, module)
    return wrapped


def _checked(component: Component, linear: nn.Module, module: Any) -> nn.Module:
    """What ``wrap`` has given for a linear or an embedding, if it is what the contract says."""
    wrapped = component.checked("wrap", module, nn.Module)
    if wrapped.get("linear") is not linear:
        got = f"a {type(wrapped).__name__} without the linear"
        raise component.breach("wrap", got, "a module that keeps it as its child 'linear'")
    for name, tensor in dict(tree_flatten(wrapped.trainable_parameters())).items():
        if name.startswith("linear."):
            raise component.breach("wrap", f"a module in which {name} trains", "the linear frozen")
        if not mx.issubdtype(tensor.dtype, mx.floating):
            raise component.breach("wrap", f"{name} of type {tensor.dtype} to train", "a floating one")
    return wrapped
