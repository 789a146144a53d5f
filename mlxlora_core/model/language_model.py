"""The base class of every model that an architecture builds."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.values import Cache


class LanguageModel(nn.Module):
    """A causal language model: an ``mlx.nn.Module`` with these members.

    A subclass sets the attributes and implements :meth:`embed`, :meth:`run`, :meth:`head` and
    :meth:`make_cache`.

    Attributes:
        layers: the blocks, bottom first; adapters go on the linears inside them.
        head_path: module path of the output head, or empty if it is tied to the embedding.
        vocab_size: V.
        context_tokens: the longest sequence that it was made for, or None.
        heads: query heads in a layer, to estimate memory; None if unknown.
        ragged: whether :meth:`run` can continue rows of different lengths together, by one token each.
            Its layers must then use a cache only through :func:`mlxlora_core.ops.positions` and
            :func:`mlxlora_core.ops.attend`, and :meth:`make_cache` must return a KVCache for each layer.
    """

    layers: list[nn.Module]
    head_path: str
    vocab_size: int
    context_tokens: int | None
    heads: int | None = None
    ragged: bool = False

    def __call__(self, tokens: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Logits (B, T, V) for token ids (B, T) that follow those in ``cache``."""
        return self.head(self.run(self.embed(tokens), cache=cache))

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings (B, T, D) of token ids (B, T)."""
        raise NotImplementedError

    def run(
        self,
        hidden: mx.array,
        first: int = 0,
        last: int | None = None,
        cache: Sequence[Cache] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> mx.array:
        """Hidden states (B, T, D) after layers ``first`` up to, not including, ``last``.

        An architecture may omit ``lengths``; core checks that with :func:`takes`.

        Args:
            hidden: the input of layer ``first``, (B, T, D).
            first: the lowest layer to run.
            last: the layer to stop before; None runs to the top.
            cache: one entry for each layer of the whole model.
            lengths: if rows are packed in (1, T, D), the tokens of each; a packed row has the same
                states as by itself. Never together with a cache.
        """
        raise NotImplementedError

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D); this includes the final norm."""
        raise NotImplementedError

    def make_cache(self) -> list[Cache]:
        """An empty cache, one entry per layer."""
        raise NotImplementedError


def takes(model: LanguageModel, *names: str) -> bool:
    """Whether the model's :meth:`LanguageModel.run` has parameters of these names."""
    return set(names) <= inspect.signature(model.run).parameters.keys()
