"""Adapter ``lora``: a low-rank update beside a frozen linear layer (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxlora_core.api import Adapter, FoundAdapter, LowRank, Place, hookimpl, option

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


def wrap(linear: nn.Module, place: Place, options: LoRAOptions) -> nn.Module | None:
    """See :meth:`mlxlora_lora.linear.LoRALinear.from_linear`; a stack of linears is left alone."""
    from mlxlora_lora.linear import LoRALinear

    if len(place.shape) != 2:
        return None
    return LoRALinear.from_linear(linear, options.rank, options.scale, options.dropout)


def fuse(module: nn.Module, weight: mx.array) -> mx.array:
    """See :meth:`mlxlora_lora.linear.LoRALinear.fuse`."""
    from mlxlora_lora.linear import LoRALinear

    assert isinstance(module, LoRALinear)
    return module.fuse(weight)


def low_rank(module: nn.Module) -> LowRank:
    """The update that a :class:`mlxlora_lora.linear.LoRALinear` adds to its linear."""
    from mlxlora_lora.linear import LoRALinear

    assert isinstance(module, LoRALinear)
    return LowRank(module.lora_a, module.lora_b, module.scale)


def recognise(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> FoundAdapter | None:
    """See :func:`mlxlora_lora.files.recognise`."""
    from mlxlora_lora.files import recognise

    return recognise(path, shapes)


@hookimpl
def mlxlora_adapters() -> Iterable[Adapter]:
    """The one adapter of this plugin."""
    summary = "low-rank update beside a frozen linear layer"
    return [
        Adapter(
            name="lora",
            summary=summary,
            options=LoRAOptions,
            wrap=wrap,
            fuse=fuse,
            recognise=recognise,
            low_rank=low_rank,
        )
    ]
