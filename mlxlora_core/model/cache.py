"""The key-value cache of one attention layer."""

from __future__ import annotations

import mlx.core as mx


class KVCache:
    """Keys and values (B, K, T, E) in buffers that grow by whole steps.

    A token is written into spare room at the end of the buffer, so that what
    is already there is copied once every ``step`` tokens and not for each one.

    Attributes:
        offset: tokens held.
    """

    step = 256

    def __init__(self) -> None:
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, K, T, E); return all that are held (B, K, offset, E)."""
        start, stop = self.offset, self.offset + keys.shape[2]
        self._keys = self._room(self._keys, keys, stop)
        self._values = self._room(self._values, values, stop)
        self._keys[:, :, start:stop] = keys
        self._values[:, :, start:stop] = values
        self.offset = stop
        return self._keys[:, :, :stop], self._values[:, :, :stop]

    def held(self) -> tuple[mx.array, mx.array]:
        """Keys and values (B, K, offset, E); there is a token at least."""
        assert self._keys is not None and self._values is not None
        return self._keys[:, :, : self.offset], self._values[:, :, : self.offset]

    def _room(self, held: mx.array | None, new: mx.array, stop: int) -> mx.array:
        """``held`` with space for ``stop`` tokens shaped like ``new``."""
        have = 0 if held is None else held.shape[2]
        if held is not None and stop <= have:
            return held
        want = -(-stop // self.step) * self.step
        batch, heads, _, width = new.shape
        spare = mx.zeros((batch, heads, want - have, width), dtype=new.dtype)
        return spare if held is None else mx.concatenate([held, spare], axis=2)
