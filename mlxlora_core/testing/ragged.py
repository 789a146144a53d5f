"""What the suite of architectures asks of a model that continues rows of different lengths together."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.model.cache import KVCache
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.ragged_cache import Held, RaggedRows

_STEPS = 3


class RaggedTests:
    """The part of :class:`mlxlora_core.testing.architecture.ArchitectureSuite` that is about ragged rows.

    Left out where the model does not say that it is
    :attr:`~mlxlora_core.model.language_model.LanguageModel.ragged`.
    """

    tokens: int

    def model(self) -> LanguageModel:
        """The model that is tried."""
        raise NotImplementedError  # ArchitectureSuite has it

    def same(self, got: mx.array, want: mx.array) -> None:
        """Assert that two results are equal up to ``tolerance``."""
        raise NotImplementedError  # ArchitectureSuite has it

    def test_rows_of_different_lengths_are_continued_as_each_is_alone(self) -> None:
        """Each row of a batch has the logits that it has in one piece, whatever the lengths of the others."""
        model = ragged_model(self.model())
        for room in ([2, self.tokens - 1, 1], [self.tokens, long_row(model), 3]):
            rows = _drawn(model, [length + _STEPS for length in room])
            got = continued(model, rows, spare=1)
            for row, ids in enumerate(rows):
                self.same(got[row], model(mx.array(ids[None]))[0, -_STEPS:])

    def test_a_row_has_the_same_bits_whatever_its_neighbours_are(self) -> None:
        """In a batch of so many rows, a row does not change by a bit with what the others hold."""
        model = ragged_model(self.model())
        rows = _drawn(model, [self.tokens, 4, long_row(model), self.tokens - 1])
        got = continued(model, rows, spare=12)
        for row, ids in enumerate(rows):
            alone = continued(model, [ids], spare=15)[0]
            assert mx.array_equal(got[row], alone), f"row {row}"


def ragged_model(model: LanguageModel) -> LanguageModel:
    """A model, where it continues rows of different lengths together."""
    if not model.ragged:
        pytest.skip("the model does not say that it is ragged: its rows are continued one by one")
    return model


def long_row(model: LanguageModel) -> int:
    """Tokens of a row that outgrows the narrowest shelf, where the model takes so many."""
    return min(254, (model.context_tokens or 300) - _STEPS)


def continued(model: LanguageModel, rows: Sequence[np.ndarray], spare: int) -> list[mx.array]:
    """Logits (3, V) of the last tokens of each of some rows (T,), given to all of them together.

    Args:
        model: ragged.
        rows: ids.
        spare: rows of the batch that nobody needs.
    """
    cache = RaggedRows(len(model.layers))
    for row, ids in enumerate(rows):
        cache.add(row, _held(model, ids[:-_STEPS]))
    found: list[list[mx.array]] = [[] for _ in rows]
    for step in range(_STEPS, 0, -1):
        order, entries = cache.step(len(rows) + spare)
        tokens = mx.array([[int(rows[row][-step])] for row in order] + [[0]] * spare)
        logits = model.head(model.run(model.embed(tokens), cache=entries))[:, 0]
        for place, row in enumerate(order):
            found[row].append(logits[place])
    return [mx.stack(each) for each in found]


def _held(model: LanguageModel, ids: np.ndarray) -> Held:
    """Keys and values of what was read of a row, by a cache of the model's own."""
    cache = model.make_cache()
    model.run(model.embed(mx.array(ids[None])), cache=cache)
    assert all(isinstance(entry, KVCache) for entry in cache), "make_cache of a ragged model gives KVCaches"
    return [entry.held() for entry in cache if isinstance(entry, KVCache)]


def _drawn(model: LanguageModel, lengths: Sequence[int]) -> list[np.ndarray]:
    """Random ids, the same every time."""
    draw = np.random.default_rng(9)
    return [draw.integers(0, model.vocab_size, length) for length in lengths]
