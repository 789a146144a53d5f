"""Which rows make neighbours of the halves of a head."""

from __future__ import annotations

import numpy as np
import pytest

from mlxlora_core.api import neighbour_rows


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
