"""Rows in another order: which make neighbours of the halves of a head, and what stays with them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.api import LazyTensor, neighbour_rows
from mlxlora_core.files import ordered_rows, shifted, some_rows


@pytest.mark.parametrize(
    ("heads", "width", "turned"), [(1, 2, None), (3, 8, None), (2, 8, 6), (2, 8, 2), (2, 7, 4)]
)
def test_halves_of_what_is_turned_become_neighbours(heads: int, width: int, turned: int | None) -> None:
    turned = turned or width
    theirs = np.arange(heads * width).reshape(heads, width)
    ours = theirs.reshape(-1)[neighbour_rows(heads, width, turned)].reshape(heads, width)
    np.testing.assert_array_equal(ours[:, :turned:2], theirs[:, : turned // 2])
    np.testing.assert_array_equal(ours[:, 1:turned:2], theirs[:, turned // 2 : turned])
    np.testing.assert_array_equal(ours[:, turned:], theirs[:, turned:])


def test_all_of_a_head_is_turned_where_nobody_says_otherwise() -> None:
    assert neighbour_rows(2, 4) == neighbour_rows(2, 4, 4) == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_is_told_of_a_tensor_stays_with_its_rows() -> None:
    whole = LazyTensor((3, 2), "float32", lambda: mx.arange(6).reshape(3, 2), expanded=True)
    taken, turned = some_rows(whole, 1, 2), ordered_rows(whole, [2, 0, 1])
    assert taken.expanded and turned.expanded
    assert (taken.shape, taken.read().tolist()) == ((2, 2), [[2, 3], [4, 5]])
    assert (turned.shape, turned.read().tolist()) == ((3, 2), [[4, 5], [0, 1], [2, 3]])
    assert not shifted(whole, 1.0).expanded  # other numbers than those that the file has in few bits
