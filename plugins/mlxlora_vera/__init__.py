"""Adapter ``vera``: vectors that train between shared random projections (Kopiczko et al. 2023).

Source: arXiv:2310.11454.
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
class VeRAOptions:
    """How large the projections are, and where the vectors begin."""

    rank: int = option(256, help="rank of the projections, which do not train", minimum=1, maximum=65_536)
    d_initial: float = option(
        0.1, help="where the vector between the projections begins; not 0", minimum=-10_000, maximum=10_000
    )
    dropout: float = option(
        0.0, help="share of the inputs of the update dropped while training", minimum=0, below=1
    )
    projection_seed: int = option(0, help="seed of the projections, whatever that of the run", minimum=0)

    def __post_init__(self) -> None:
        if self.d_initial == 0:
            raise ValueError("d_initial must not be 0: nothing would train")


def wrap(linear: nn.Module, place: Place, options: VeRAOptions) -> nn.Module | None:
    """See :class:`mlxlora_vera.linear.VeRALinear`; stacks and embeddings are left alone."""
    from mlxlora_vera.linear import VeRALinear

    if len(place.shape) != 2 or place.kind != "linear":
        return None
    return VeRALinear(linear, options.rank, options.d_initial, options.dropout, options.projection_seed)


def fuse(module: Any, weight: mx.array) -> mx.array:
    """The weight that does what the module does."""
    fused: mx.array = module.fuse(weight)
    return fused


def low_rank(module: Any) -> LowRank:
    """The update of a module."""
    update: LowRank = module.low_rank()
    return update


@hookimpl
def mlxlora_adapters() -> Iterable[Adapter]:
    """The one adapter of this plugin."""
    return [
        Adapter(
            name="vera",
            summary="vectors that train between shared random projections",
            options=VeRAOptions,
            wrap=wrap,
            fuse=fuse,
            low_rank=low_rank,
        )
    ]
