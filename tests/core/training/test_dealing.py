"""Rows of a step dealt out to ranks, and the numbers that go round in a message."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import pytest

from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.errors import RankError
from mlxlora_core.training.batches import fixed_rows
from mlxlora_core.training.dealing import deal
from mlxlora_core.training.gradient import Sums
from mlxlora_core.training.loss import Loss
from mlxlora_core.training.message import add_up, checksum, require_same


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 33])
def test_every_row_is_dealt_once_and_no_rank_gets_more_than_its_share(ranks: int, rows: int) -> None:
    draw = random.Random(rows)
    lengths = [draw.randrange(2, 2000) for _ in range(rows)]
    numbers = list(range(100, 100 + rows))
    dealt = deal(numbers, lengths, ranks)
    assert len(dealt) == ranks and sorted(row for part in dealt for row in part) == numbers
    assert max(map(len, dealt)) == -(-rows // ranks)
    assert all(part == sorted(part) for part in dealt)


def test_ranks_get_about_as_many_tokens_however_the_rows_lie() -> None:
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randrange(2, 2000) for _ in range(16)]
        rows = list(range(16))
        draw.shuffle(rows)
        tokens = [sum(lengths[row] for row in part) for part in deal(rows, [lengths[r] for r in rows], 4)]
        # No more apart than the longest row of all, whoever gets it.
        assert max(tokens) - min(tokens) <= max(lengths)


def test_rows_to_measure_are_shared_out_by_length(make_examples: Any) -> None:
    examples = make_examples([5, 9, 2, 30, 7, 7, 12, 40, 3])
    alone = [row for part in fixed_rows(examples, 2, -1) for row in part]
    shared = [[r for part in fixed_rows(examples, 2, -1, Group(k, 3)) for r in part] for k in range(3)]
    assert shared == [alone[0::3], alone[1::3], alone[2::3]]
    few = [list(fixed_rows(examples, 2, 1, Group(rank, 3))) for rank in range(3)]
    assert [len(parts) for parts in few] == [1, 1, 0], "fewer rows than ranks"


def sums(tokens: int, gradient: Any) -> Sums:
    return Sums((mx.array(1.5), mx.array(2.0)), Loss(0.0, tokens, 5 * tokens, 3), gradient)


def test_counts_above_what_float32_holds_come_back_whole() -> None:
    parameters = {"a": mx.ones((2, 3)), "b": [mx.array([1.0], mx.bfloat16)]}
    total = add_up(ALONE, sums(2**31 + 1, parameters), parameters, None)
    assert total.loss == Loss(3.5, 2**31 + 1, 5 * (2**31 + 1), 3)
    assert float(total.tokens) == float(mx.array(float(2**31 + 1)))
    assert total.gradient["b"][0].dtype == mx.bfloat16 and mx.array_equal(
        total.gradient["a"], mx.ones((2, 3))
    )
    assert total.signum is None and add_up(ALONE, sums(1, parameters), parameters, 15).signum == 15


def test_a_rank_without_rows_adds_nothing() -> None:
    parameters = {"a": mx.ones((2, 3))}
    total = add_up(ALONE, Sums((), Loss(0.0, 0), None), parameters, None)
    assert total.loss == Loss(0.0, 0) and mx.array_equal(total.gradient["a"], mx.zeros((2, 3)))


def test_a_single_bit_changes_the_checksum() -> None:
    numbers = mx.random.normal((1000,), key=mx.random.key(0))
    words = numbers.view(mx.uint32)
    changed = mx.where(mx.arange(1000) == 7, words ^ 1, words).view(mx.float32)
    assert checksum({"a": numbers}).item() != checksum({"a": changed}).item()
    total = add_up(ALONE, sums(1, {"a": numbers}), {"a": numbers}, None)
    assert total.checksums == [checksum({"a": numbers}).item()]


@pytest.mark.parametrize(
    ("checksums", "words"),
    [
        ([7, 7, 7], ""),
        ([7, 9, 7, 7], "rank 1 has diverged: before step 5"),
        ([9, 7, 7, 8, 7, 7], "rank 0, 3 has diverged"),
        ([7, 9], "the ranks have diverged"),
        ([7, 7, 9, 9], "the ranks have diverged"),
    ],
)
def test_ranks_that_differ_from_most_are_named(checksums: list[int], words: str) -> None:
    if not words:
        require_same(checksums, 5)
        return
    with pytest.raises(RankError, match=words):
        require_same(checksums, 5)
