"""The key-value cache of a text, reused for a prompt that begins the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import mlx.core as mx

from mlxlora_core.model.cache import KVCache
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.values import Cache


class PromptCache:
    """Keys and values of one text, for one model with one adapter; the next text reuses its common beginning.

    Attributes:
        tokens: ids of the text. The decoder appends the ids it draws; the cache may hold one id less,
            or one more.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._entries: list[Cache] = []

    def begin(self, model: LanguageModel, prompt: Sequence[int]) -> tuple[list[Cache], list[int]]:
        """Make ``prompt`` the text.

        Args:
            model: the one that computed the cache.
            prompt: at least one id.

        Returns:
            A cache of the first ids of the prompt, and the remaining ids, at least one.
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
        """Read a prompt except its last id, in parts; the caller may stop between two of them.

        Args:
            model: in any mode; it is put in evaluation mode.
            prompt: at least one id.
            part_tokens: how many tokens are read at a time.

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
    """Cut the cache of a layer to the first ``tokens``; returns whether that was possible."""
    if type(entry) is KVCache:  # the next tokens overwrite what is behind its offset
        entry.offset = tokens
    return entry.offset == tokens
