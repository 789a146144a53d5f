"""What the suite of architectures asks of a model that takes rows one after the other in a single one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxlora_core.model.language_model import LanguageModel, takes
from mlxlora_core.model.ops import LARGE
from mlxlora_core.testing.forward import gradients_of_loss

#: (model, rows) -> logits (T, V)
Logits: TypeAlias = Callable[[LanguageModel, Sequence[mx.array]], mx.array]


class PackingTests:
    """The part of :class:`mlxlora_core.testing.architecture.ArchitectureSuite` that is about packed rows.

    Left out where :meth:`~mlxlora_core.model.language_model.LanguageModel.run` takes no ``lengths``.
    """

    tokens: int
    tolerance: float

    def model(self) -> LanguageModel:
        """The model that is tried."""
        raise NotImplementedError

    def same(self, got: mx.array, want: mx.array) -> None:
        """Assert that two results are equal up to ``tolerance``."""
        raise NotImplementedError

    @pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
    def test_packed_rows_are_the_rows_alone(self, large: bool) -> None:
        """Each of the rows that stand one after the other has the logits that it has alone."""
        model = packing_model(self.model())
        rows = drawn_rows(model, self.lengths(model, large))
        self.same(packed_logits(model, rows), logits_alone(model, rows))
        self.same(packed_logits(model, rows[:1]), logits_alone(model, rows[:1]))

    def test_packed_rows_can_be_run_in_two_goes(self) -> None:
        """The layers of packed rows can be run in two goes, wherever they are cut."""
        model = packing_model(self.model())
        rows = drawn_rows(model, self.lengths(model, False))
        lengths = [len(row) for row in rows]
        whole, hidden = packed_logits(model, rows), model.embed(mx.concatenate(rows)[None])
        for cut in range(len(model.layers) + 1):
            low = model.run(hidden, 0, cut, lengths=lengths)
            self.same(model.head(model.run(low, cut, lengths=lengths))[0], whole)

    @pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
    def test_packed_rows_have_the_gradient_of_the_rows_alone(self, large: bool) -> None:
        """So has every parameter the gradient that it has of all rows, one by one."""
        model = packing_model(self.model())
        rows = drawn_rows(model, self.lengths(model, large))
        got, want = (
            gradients_of_loss(model, partial(loss_of_rows, model, rows, way))
            for way in (packed_logits, logits_alone)
        )
        for name, gradient in want.items():
            far = float(mx.abs(got[name] - gradient).max())
            assert far <= self.tolerance * float(mx.abs(gradient).max()), f"gradient of {name} is {far} apart"

    def lengths(self, model: LanguageModel, large: bool) -> list[int]:
        """Tokens of the rows that are tried: some of a token or two, and some longer than a window.

        ``large`` are as many as make the hidden states as large as those of a model in use.
        """
        most = min(model.context_tokens or 150, 150)
        lengths = [self.tokens, 1, 2, self.tokens - 1, 1, 3]
        if large:
            lengths += [most, most // 2, 1, 2, most - 1]
            width = model.embed(mx.zeros((1, 1), mx.uint32)).shape[-1]
            lengths += [most] * -(-2 * LARGE // (width * most))
        return lengths


def packing_model(model: LanguageModel) -> LanguageModel:
    """A model, where it takes packed rows."""
    if not takes(model, "lengths"):
        pytest.skip("the model's run takes no lengths: its rows are padded")
    return model


def drawn_rows(model: LanguageModel, lengths: Sequence[int]) -> list[mx.array]:
    """Rows of random ids (T,) of these lengths, the same every time."""
    draw = np.random.default_rng(9)
    return [mx.array(draw.integers(0, model.vocab_size, length)) for length in lengths]


def packed_logits(model: LanguageModel, rows: Sequence[mx.array]) -> mx.array:
    """Logits (T, V) of rows one after the other, run as such."""
    hidden = model.embed(mx.concatenate(list(rows))[None])
    return model.head(model.run(hidden, lengths=[len(row) for row in rows]))[0]


def logits_alone(model: LanguageModel, rows: Sequence[mx.array]) -> mx.array:
    """Logits (T, V) of rows one after the other, each run by itself."""
    return mx.concatenate([model(row[None])[0] for row in rows])


def loss_of_rows(model: LanguageModel, rows: Sequence[mx.array], way: Logits) -> mx.array:
    """Nats of each row's tokens after its first, summed."""
    logits, ids = way(model, rows), mx.concatenate(list(rows))
    ends = set(accumulate(len(row) for row in rows))
    places = mx.array([place for place in range(len(ids)) if place + 1 not in ends])
    return nn.losses.cross_entropy(logits[places], ids[places + 1], reduction="sum")
