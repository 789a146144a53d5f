"""LoRA and its relatives: low-rank updates beside frozen linear layers and embeddings.

``lora``: Hu et al. 2021, arXiv:2106.09685. ``rslora``: Kalajdzievski 2023, arXiv:2312.03732.
``lora-plus``: Hayou et al. 2024, arXiv:2402.12354. ``dora``: Liu et al. 2024, arXiv:2402.09353.
``pissa``: Meng et al. 2024, arXiv:2404.02948.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxlora_core.api import Adapter, LowRank, Place, hookimpl, option

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


@dataclass(frozen=True)
class LoRAOptions:
    """How large the update is."""

    rank: int = option(8, help="rank of the update", minimum=1)
    scale: float = option(
        2.0, help="factor on the update, alpha / rank in the paper; not 0", minimum=-10_000, maximum=10_000
    )
    dropout: float = option(
        0.0, help="share of the inputs of the update dropped while training", minimum=0, below=1
    )

    def __post_init__(self) -> None:
        if self.scale == 0:
            raise ValueError("scale must not be 0: the update would have no effect and nothing would train")


@dataclass(frozen=True)
class RankStabilizedOptions:
    """How large the update is, with a factor that fits every rank."""

    rank: int = option(8, help="rank of the update", minimum=1)
    alpha: float = option(
        16.0, help="the update is multiplied by alpha / sqrt(rank); not 0", minimum=-10_000, maximum=10_000
    )
    dropout: float = option(
        0.0, help="share of the inputs of the update dropped while training", minimum=0, below=1
    )

    def __post_init__(self) -> None:
        if self.alpha == 0:
            raise ValueError("alpha must not be 0: the update would have no effect and nothing would train")


@dataclass(frozen=True)
class LoRAPlusOptions(LoRAOptions):
    """How large the update is, and how much faster its second matrix learns."""

    ratio: float = option(
        16.0, help="learning rate of lora_b, in multiples of that of lora_a", above=0, maximum=10_000
    )


@dataclass(frozen=True)
class PiSSAOptions:
    """How much of a weight trains."""

    rank: int = option(8, help="how many of the largest singular values train", minimum=1)
    scale: float = option(
        1.0, help="factor on the products, alpha / rank in the paper", above=0, maximum=10_000
    )
    iterations: int = option(
        0,
        help="steps of a power method in place of the whole singular value decomposition, 0 for the "
        "whole; 16 are near it, and faster for large weights",
        minimum=0,
        maximum=1000,
    )


def wrap(inner: nn.Module, place: Place, options: LoRAOptions) -> nn.Module | None:
    """A linear or an embedding with a low-rank update; a stack of linears is left alone."""
    return _beside(inner, place, options.rank, options.scale, options.dropout)


def wrap_stabilized(inner: nn.Module, place: Place, options: RankStabilizedOptions) -> nn.Module | None:
    """As :func:`wrap`, with a factor that keeps gradients as large at a high rank as at a low one."""
    return _beside(inner, place, options.rank, options.alpha / options.rank**0.5, options.dropout)


def _beside(inner: nn.Module, place: Place, rank: int, scale: float, dropout: float) -> nn.Module | None:
    """An update beside a linear or an embedding; None for a stack of linears."""
    from mlxlora_lora.embedding import LoRAEmbedding
    from mlxlora_lora.linear import LoRALinear

    if place.kind == "embedding":
        return LoRAEmbedding(inner, place.shape, rank, scale)
    return None if len(place.shape) != 2 else LoRALinear.from_linear(inner, rank, scale, dropout)


def wrap_dora(linear: nn.Module, place: Place, options: LoRAOptions) -> nn.Module | None:
    """See :class:`mlxlora_lora.dora.DoRALinear`; stacks and embeddings are left alone."""
    from mlxlora_lora.dora import DoRALinear

    if len(place.shape) != 2 or place.kind != "linear":
        return None
    return DoRALinear(linear, options.rank, options.scale, options.dropout)


def wrap_pissa(linear: nn.Module, place: Place, options: PiSSAOptions) -> nn.Module | None:
    """See :class:`mlxlora_lora.pissa.PiSSALinear`; stacks and embeddings are left alone."""
    from mlxlora_lora.pissa import PiSSALinear

    if len(place.shape) != 2 or place.kind != "linear":
        return None
    return PiSSALinear(linear, options.rank, options.scale, options.iterations)


def initialise_pissa(module: Any) -> None:
    """See :meth:`mlxlora_lora.pissa.PiSSALinear.initialise`."""
    module.initialise()


def fuse(module: Any, weight: mx.array) -> mx.array:
    """The weight that does what the module does; see the ``fuse`` of each."""
    fused: mx.array = module.fuse(weight)
    return fused


def low_rank(module: Any) -> LowRank:
    """The update of a module that has nothing else."""
    update: LowRank = module.low_rank()
    return update


def faster_second(options: LoRAPlusOptions) -> dict[str, float]:
    """The second matrix learns faster, for its gradients are smaller by the width of the layer."""
    return {"lora_b": options.ratio}


@hookimpl
def mlxlora_adapters() -> Iterable[Adapter]:
    """LoRA and its relatives."""
    return [
        Adapter(
            name="lora",
            summary="low-rank update beside a frozen linear layer",
            options=LoRAOptions,
            wrap=wrap,
            fuse=fuse,
            low_rank=low_rank,
        ),
        Adapter(
            name="rslora",
            summary="low-rank update whose factor fits every rank",
            options=RankStabilizedOptions,
            wrap=wrap_stabilized,
            fuse=fuse,
            low_rank=low_rank,
        ),
        Adapter(
            name="lora-plus",
            summary="low-rank update whose second matrix learns faster",
            options=LoRAPlusOptions,
            wrap=wrap,
            fuse=fuse,
            low_rank=low_rank,
            learning_rates=faster_second,
        ),
        Adapter(
            name="dora",
            summary="low-rank update of the direction of a weight, with a magnitude a row",
            options=LoRAOptions,
            wrap=wrap_dora,
            fuse=fuse,
        ),
        Adapter(
            name="pissa",
            summary="the largest singular values of a weight, trained",
            options=PiSSAOptions,
            wrap=wrap_pissa,
            initialise=initialise_pissa,
            fuse=fuse,
            low_rank=low_rank,
        ),
    ]
