"""Keys and values of the beginnings of prompts, kept for requests that begin alike."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlxlora_core.model.cache import KVCache
from mlxlora_core.values import Cache

_Part = list[tuple[mx.array, mx.array]]  # of each layer (1, K, part, E)


class Prefixes:
    """What was read of prompts, in whole parts, the least recently used of which go first.

    A part is found by all ids from the beginning of the prompt to its end, and the adapter. It was
    computed in the same products as it would be again, so that it is the same to the last bit.

    Args:
        part: tokens of a part.
        most_bytes: how much may be kept.

    Attributes:
        held_bytes: how much is.
    """

    def __init__(self, part: int, most_bytes: int) -> None:
        self.part, self.most_bytes, self.held_bytes = part, most_bytes, 0
        self._parts: OrderedDict[bytes, _Part] = OrderedDict()

    def begin(self, adapter: str | None, prompt: Sequence[int], cache: Sequence[Cache]) -> int:
        """Fill an empty cache with what is known of a prompt but its last token; how many tokens that is."""
        found: list[_Part] = []
        for key in self._keys(adapter, prompt[:-1]):
            part = self._parts.get(key)
            if part is None:
                break
            self._parts.move_to_end(key)
            found.append(part)
        if found:
            for layer, entry in enumerate(cache):
                sides = zip(*(part[layer] for part in found), strict=True)
                entry.update(*(mx.concatenate(list(side), axis=2) for side in sides))
        return len(found) * self.part

    def keep(self, adapter: str | None, prompt: Sequence[int], cache: Sequence[Cache], stop: int) -> None:
        """Keep the part of a prompt that ends behind ``stop`` tokens, which have gone into a cache."""
        entries = [entry for entry in cache if isinstance(entry, KVCache)]
        if stop % self.part or len(entries) < len(cache):
            return
        *_, key = self._keys(adapter, prompt[:stop])
        if key in self._parts:
            return
        held = (entry.held() for entry in entries)
        part = [(self._end(keys, stop), self._end(values, stop)) for keys, values in held]
        mx.eval(part)
        self._parts[key] = part
        self.held_bytes += _bytes(part)
        while self.held_bytes > self.most_bytes:
            self.held_bytes -= _bytes(self._parts.popitem(last=False)[1])

    def __len__(self) -> int:
        return len(self._parts)

    def _end(self, x: mx.array, stop: int) -> mx.array:
        """A copy of the part that ends behind ``stop`` tokens."""
        return mx.contiguous(x[:, :, stop - self.part : stop])

    def _keys(self, adapter: str | None, tokens: Sequence[int]) -> Iterator[bytes]:
        """The name of each whole part of some tokens."""
        digest = hashlib.sha256(repr(adapter).encode() + b"\0")
        for stop in range(self.part, len(tokens) + 1, self.part):
            digest.update(array("Q", tokens[stop - self.part : stop]).tobytes())
            yield digest.digest()


def _bytes(part: _Part) -> int:
    return sum(side.nbytes for pair in part for side in pair)
