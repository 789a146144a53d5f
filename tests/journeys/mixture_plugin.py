"""A plugin with an architecture that no built-in has: a mixture of experts in stacked linears.

The tests name this file with ``-P``. The model has a cache of what is not
needed: each token is told by itself alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.api import Architecture, hookimpl, option
from mlxlora_core.ops import KVCache, LanguageModel, StackedLinear

TOP = 2


@dataclass(frozen=True)
class Args:
    """What config.json holds."""

    dim: int = option(help="D", minimum=1, maximum=1 << 20)
    hidden: int = option(help="F", minimum=1, maximum=1 << 20)
    experts: int = option(help="E", minimum=1, maximum=1 << 10)
    n_layers: int = option(help="L", minimum=1, maximum=1 << 10)
    vocab_size: int = option(help="V", minimum=1, maximum=1 << 20)


class Mixture(nn.Module):
    """The two experts that a router likes best, weighted with how much it likes them."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.router = nn.Linear(args.dim, args.experts, bias=False)
        self.up = StackedLinear(args.experts, args.dim, args.hidden)
        self.down = StackedLinear(args.experts, args.hidden, args.dim)

    def __call__(self, x: mx.array) -> mx.array:
        scores = self.router(x)  # (B, T, E)
        order = mx.argpartition(-scores, kth=TOP - 1, axis=-1)
        best = mx.stop_gradient(order[..., :TOP])  # (B, T, K)
        weights = mx.softmax(mx.take_along_axis(scores, best, axis=-1), axis=-1)
        y = self.down(nn.silu(self.up(x[..., None, :], best)), best)  # (B, T, K, D)
        return x + (y * weights[..., None]).sum(axis=-2)


class Model(LanguageModel):
    """Embedding, layers of experts, head."""

    head_path = "output"
    context_tokens = None

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.vocab_size = args.vocab_size
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.blocks = [Mixture(args) for _ in range(args.n_layers)]
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    @property
    def layers(self) -> list[Any]:
        """The blocks, which do not stand at a path called ``layers``."""
        return list(self.blocks)

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings (B, T, D) of token ids (B, T)."""
        return self.tok_embeddings(tokens)

    def run(self, hidden: mx.array, first: int = 0, last: int | None = None, cache: Any = None) -> mx.array:
        """Hidden states (B, T, D) after some of the layers."""
        for block in self.blocks[first:last]:
            hidden = block(hidden)
        for entry in cache or ():
            entry.update(hidden[:, None], hidden[:, None])
        return hidden

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D)."""
        return self.output(hidden)

    def make_cache(self) -> list[KVCache]:
        """An empty cache."""
        return [KVCache() for _ in self.blocks]


def read(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Args | None:
    """The arguments in a config of a mixture."""
    if raw.get("model_type") != "mixture":
        return None
    return Args(**{name: raw[name] for name in Args.__dataclass_fields__})


@hookimpl
def mlxlora_architectures() -> list[Architecture]:
    """The mixture."""
    return [
        Architecture(
            name="mixture",
            summary="experts in stacked linears",
            model_types=("mixture",),
            args=Args,
            read=read,
            tensors=lambda found, args: found,
            build=Model,
        )
    ]
