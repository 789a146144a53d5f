"""The key-value cache of rows of different lengths, each continued by one token a step.

Rows are grouped on shelves by their length. All rows on a shelf have room for the same number of
tokens, so that one product serves all of them. The width of a row's shelf depends only on the length of
the row, and so do all sums in its attention: other rows change no bit of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import cast

import mlx.core as mx

from mlxlora_core.model.ops.ragged import Positions, RaggedCache, attention_to_seen
from mlxlora_core.values import Cache

NARROWEST = 64  # tokens of the narrowest shelf
_MORE_TOKENS = 256  # by which a shelf grows, in whole rows, or by one row if that has more
_SPARE_ROWS = 4  # a shelf shrinks once so many rows are free

#: keys and values (1, K, T, E) of each layer
Held = Sequence[tuple[mx.array, mx.array]]


def room_for(tokens: int) -> int:
    """The width of the shelf for a row of so many tokens: 64, 128, 256, 512, 768, 1024, 1536 ..."""
    steps = -(-tokens // (4 * NARROWEST))
    if steps == 1:
        return NARROWEST << max(0, (tokens - 1).bit_length() - (NARROWEST - 1).bit_length())
    power = 1 << (steps.bit_length() - 2)
    return -(-steps // power) * power * 4 * NARROWEST


class _Shelf:
    """Rows that there is the same room for.

    Attributes:
        room: tokens of a row, C.
        rows: the names of the rows, in their order.
        keys: of each layer (at least as many rows, K, C, E).
        values: the same.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.rows: list[int] = []
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []

    def add(self, row: int, held: Held) -> None:
        """Append a row."""
        self._grow(held)
        place, length = len(self.rows), held[0][0].shape[2]
        for arrays, side in ((self.keys, 0), (self.values, 1)):
            for layer, pair in enumerate(held):
                arrays[layer][place : place + 1, :, :length] = pair[side]
        self.rows.append(row)
        mx.eval(self.keys, self.values)

    def _grow(self, held: Held) -> None:
        """Make room for one more row with the shapes of ``held``."""
        have = self.keys[0].shape[0] if self.keys else 0
        if have > len(self.rows):
            return
        for side, arrays in enumerate((self.keys, self.values)):
            for layer, pair in enumerate(held):
                _, heads, _, width = pair[side].shape
                spare = mx.zeros(
                    (max(1, _MORE_TOKENS // self.room), heads, self.room, width), pair[side].dtype
                )
                grown = mx.concatenate([arrays[layer], spare]) if have else spare
                mx.eval(grown)
                arrays[layer : layer + 1] = [grown]

    def held(self, row: int, length: int) -> Held:
        """A copy of the first tokens of a row."""
        place = self.rows.index(row)
        copies = [
            (
                mx.contiguous(keys[place : place + 1, :, :length]),
                mx.contiguous(values[place : place + 1, :, :length]),
            )
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
        mx.eval(copies)
        return copies

    def remove(self, row: int) -> None:
        """Remove a row and move the last one to its place."""
        place, last = self.rows.index(row), self.rows[-1]
        if last != row:
            moved = self.held(last, self.room)
            for layer, (keys, values) in enumerate(moved):
                self.keys[layer][place : place + 1] = keys
                self.values[layer][place : place + 1] = values
            mx.eval(self.keys, self.values)
            self.rows[place] = last
        self.rows.pop()
        if not self.rows:
            self.keys, self.values = [], []
        elif self.keys[0].shape[0] - len(self.rows) >= _SPARE_ROWS:
            for arrays in (self.keys, self.values):
                for layer, array in enumerate(arrays):
                    arrays[layer] = mx.contiguous(array[: len(self.rows)])
                    mx.eval(arrays[layer])


class RaggedRows:
    """The cache of all layers for rows of different lengths.

    Args:
        layers: of the model.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._shelves: dict[int, _Shelf] = {}
        self._lengths: dict[int, int] = {}
        self._rooms: dict[int, int] = {}  # of the shelf that each row is on

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, row: int, held: Held) -> None:
        """Take in a row under a name of its own, with the keys and values of what was read of it."""
        self._lengths[row] = held[0][0].shape[2]
        self._put(row, held, room_for(self._lengths[row] + 1))

    def remove(self, row: int) -> None:
        """Let go of a row."""
        del self._lengths[row]
        self._take(row)

    def held(self, row: int) -> Held:
        """A copy of the keys and values of a row."""
        return self._shelves[self._rooms[row]].held(row, self._lengths[row])

    def step(self, count: int) -> tuple[list[int], list[Cache]]:
        """What one token of each row goes through the model with, once; the rows are longer by it then.

        Args:
            count: rows of the batch, of which those behind the last are nothing that is kept.

        Returns:
            In which order the rows stand in the batch, and a cache for each layer.
        """
        for row, length in self._lengths.items():
            if self._rooms[row] < length + 1:
                held = self.held(row)
                self._take(row)
                self._put(row, held, room_for(length + 1))
        shelves = [self._shelves[room] for room in sorted(self._shelves)]
        lengths = [[self._lengths[row] for row in shelf.rows] for shelf in shelves]
        step = _Step([_Written(*pair) for pair in zip(shelves, lengths, strict=True)], count)
        self._lengths = {row: length + 1 for row, length in self._lengths.items()}
        # Only what knows a RaggedCache, which is no Cache by its types, takes one.
        entries = [cast(Cache, _Layer(step, layer)) for layer in range(self._layers)]
        return [row for shelf in shelves for row in shelf.rows], entries

    def _put(self, row: int, held: Held, room: int) -> None:
        self._rooms[row] = room
        self._shelves.setdefault(room, _Shelf(room)).add(row, held)

    def _take(self, row: int) -> None:
        room = self._rooms.pop(row)
        self._shelves[room].remove(row)
        if not self._shelves[room].rows:
            del self._shelves[room]


class _Written:
    """A shelf in a step: where the token of each row is written, and what it sees."""

    def __init__(self, shelf: _Shelf, lengths: Sequence[int]) -> None:
        self.shelf, self.lengths = shelf, lengths
        self._seen: dict[int | None, mx.array] = {}

    @cached_property
    def places(self) -> tuple[mx.array, mx.array]:
        """The number of each row, and of its token."""
        return mx.arange(len(self.lengths)), mx.array(list(self.lengths))

    def write(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take in keys and values (n, K, 1, E); all that are held, (n, K, C, E)."""
        rows, at = self.places
        count = len(self.lengths)
        found = []
        for arrays, new in ((self.shelf.keys, keys), (self.shelf.values, values)):
            arrays[layer][rows, :, at] = new[:, :, 0]
            found.append(arrays[layer][:count])
        return found[0], found[1]

    def seen(self, window: int | None) -> mx.array:
        """Which keys the new token of each row sees, (n, 1, 1, C)."""
        if window not in self._seen:
            key, place = mx.arange(self.shelf.room), self.places[1][:, None]
            seen = key <= place
            if window is not None:
                seen = seen & (key > place - window)
            self._seen[window] = seen[:, None, None]
        return self._seen[window]


class _Step:
    """What all layers of a step share."""

    def __init__(self, shelves: Sequence[_Written], count: int) -> None:
        self.shelves = shelves
        lengths = [length for written in shelves for length in written.lengths]
        self.ends = _running(len(written.lengths) for written in shelves)
        self.spare = count - len(lengths)
        self.offset = Positions((*lengths, *[0] * self.spare))


class _Layer(RaggedCache):
    """The cache of one layer in a step."""

    def __init__(self, step: _Step, layer: int) -> None:
        self._step, self._layer = step, layer

    @property
    def offset(self) -> Positions:
        """Tokens that are held of each row before the step."""
        return self._step.offset

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> mx.array:
        """As :func:`mlxlora_core.model.ops.attend` of a token of each row; 0 for rows that are nothing."""
        parts = [mx.split(x, self._step.ends) for x in (queries, keys, values)]
        outputs = []
        for written, (q, k, v) in zip(self._step.shelves, zip(*parts, strict=True), strict=False):
            outputs.append(
                attention_to_seen(q, *written.write(self._layer, k, v), scale, written.seen(window), cap)
            )
        if self._step.spare:
            outputs.append(mx.zeros_like(parts[0][-1][..., : values.shape[-1]]))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _running(counts: Iterable[int]) -> list[int]:
    """Sums of all counts up to each."""
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums[1:]
