"""Adapter ``ia3``: a factor on each key, value and inner activation (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxlora_core.api import Adapter, Place, hookimpl, option

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

#: the last linear of a feed-forward block, by the names of Meta, Hugging Face and GGUF
_LAST = ("w2", "down_proj", "ffn_down")


@dataclass(frozen=True)
class IA3Options:
    """What is scaled."""

    scales: str = option(
        "auto",
        help="what the factors are on; auto is the inputs of w2 (down_proj) and the outputs of all others",
        choices=("auto", "inputs", "outputs"),
    )


def wrap(linear: nn.Module, place: Place, options: IA3Options) -> nn.Module | None:
    """See :mod:`mlxlora_ia3.linear`; stacks and embeddings are left alone."""
    from mlxlora_ia3.linear import ScaledInputs, ScaledOutputs

    if len(place.shape) != 2 or place.kind != "linear":
        return None
    last = place.path.rpartition(".")[2] in _LAST
    inputs = last if options.scales == "auto" else options.scales == "inputs"
    return ScaledInputs(linear) if inputs else ScaledOutputs(linear)


def fuse(module: Any, weight: mx.array) -> mx.array:
    """The weight that does what the module does."""
    fused: mx.array = module.fuse(weight)
    return fused


def fuse_bias(module: Any, bias: mx.array) -> mx.array:
    """The bias that does what the module does."""
    fused: mx.array = module.fuse_bias(bias)
    return fused


@hookimpl
def mlxlora_adapters() -> Iterable[Adapter]:
    """The one adapter of this plugin."""
    return [
        Adapter(
            name="ia3",
            summary="a factor on each key, value and inner activation",
            options=IA3Options,
            wrap=wrap,
            fuse=fuse,
            fuse_bias=fuse_bias,
            default_targets=("k_proj", "v_proj", "down_proj"),
        )
    ]
