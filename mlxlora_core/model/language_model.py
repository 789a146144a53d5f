"""The base class of every model that an architecture builds."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.values import Cache


class LanguageModel(nn.Module):
    """A causal language model: an ``mlx.nn.Module`` with these members.

    A subclass sets the attributes and writes :meth:`embed`, :meth:`run`,
    :meth:`head` and :meth:`make_cache`.

    Attributes:
        layers: the blocks, bottom first; adapters go into the linears inside them.
        head_path: module path of the output head, or nothing when it is tied
            to the embedding.
        vocab_size: V.
        context_tokens: longest sequence it was made for, or None.
        heads: of queries in a layer, for estimates of memory; None where it does not tell.
        ragged: whether :meth:`run` continues rows of different lengths together, by a token each: its layers
            then use nothing of a cache but what :func:`mlxlora_core.ops.positions` and
            :func:`mlxlora_core.ops.attend` do, and :meth:`make_cache` gives a KVCache for each.
    """

    layers: list[nn.Module]
    head_path: str
    vocab_size: int
    context_tokens: int | None
    heads: int | None = None
    ragged: bool = False

    def __call__(self, tokens: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Logits (B, T, V) of token ids (B, T) that follow those in ``cache``."""
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

        An architecture may leave ``lengths`` out; core asks with :func:`takes`.

        Args:
            hidden: what enters layer ``first``, (B, T, D).
            first: the lowest layer to run.
            last: where to stop; None is the top.
            cache: one entry for each layer of the whole model.
            lengths: tokens of each of the rows that stand one after the other in (1, T, D);
                each has the states that it has alone. Never together with a cache.
        """
        raise NotImplementedError

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D), final norm included."""
        raise NotImplementedError

    def make_cache(self) -> list[Cache]:
        """An empty cache, one entry a layer."""
        raise NotImplementedError


def takes(model: LanguageModel, *names: str) -> bool:
    """Whether :meth:`LanguageModel.run`, as a model has it, takes arguments of these names."""
    return set(names) <= inspect.signature(model.run).parameters.keys()
