"""The key-value cache of a text, reused for a prompt that begins the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import mlx.core as mx

from mlxlora_core.model.cache import KVCache
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.values import Cache


class PromptCache:
    """Keys and values of one text, by one model under one adapter; one that begins alike goes on from them.

    Attributes:
        tokens: ids of the text. Who decodes appends to them what is drawn; the cache may hold one
            less, or one more.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._entries: list[Cache] = []

    def begin(self, model: LanguageModel, prompt: Sequence[int]) -> tuple[list[Cache], list[int]]:
        """Make ``prompt`` the text.

        Args:
            model: that has computed what is held.
            prompt: one id at least.

        Returns:
            A cache of the first ids of the prompt, and the ids that it lacks, one at least.
        """
        # After a fault some layers may have read more than others.
        held = min((entry.offset for entry in self._entries), default=0)
        pairs = zip(self.tokens[:held], prompt[:-1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if not same or not all(_cut(entry, same) for entry in self._entries):
            self._entries, same = model.make_cache(), 0
        self.tokens = list(prompt)
        return self._entries, self.tokens[same:]

    def read(self, model: LanguageModel, prompt: Sequence[int], part_tokens: int) -> Iterator[None]:
        """Read a prompt but for its last id, part after part; whoever iterates may stop between two.

        Args:
            model: in whatever state; it is put in evaluation mode.
            prompt: one id at least.
            part_tokens: how many are read at a time.

        Yields:
            Nothing, after each part.
        """
        model.eval()
        cache, unseen = self.begin(model, prompt)
        for start in range(0, len(unseen) - 1, part_tokens):
            part = unseen[start : min(start + part_tokens, len(unseen) - 1)]
            mx.eval(model.run(model.embed(mx.array([part])), cache=cache))
            yield


def _cut(entry: Cache, tokens: int) -> bool:
    """Leave only the first ``tokens`` in the cache of a layer; whether it can be done."""
    if type(entry) is KVCache:  # what is behind its offset is written over
        entry.offset = tokens
    return entry.offset == tokens
