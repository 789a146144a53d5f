from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from itertools import islice, pairwise

import mlx.core as mx
import numpy as np

from mlxlora_core.training.batches import epoch_order, fixed_rows, make_batch, steps_from
from mlxlora_core.training.examples import Example

MakeExamples = Callable[..., tuple[Example, ...]]


# --- batches ------------------------------------------------------------------


def test_a_batch_asks_for_the_next_token_wherever_it_counts(make_examples: MakeExamples) -> None:
    examples = make_examples([5, 9, 2, 7])
    rows = (3, 1, 2)
    batch = make_batch(examples, rows)
    assert batch.inputs.shape == (3, 8)
    flat = batch.inputs.reshape(-1).tolist()
    asked = [
        (i, t)
        for i, row in enumerate(rows)
        for t in range(1, len(examples[row].tokens))
        if examples[row].mask[t]
    ]
    assert batch.counted_tokens == len(asked)
    got = zip(batch.positions.tolist(), batch.targets.tolist(), strict=True)
    for (i, t), (position, target) in zip(asked, got, strict=True):
        tokens = examples[rows[i]].tokens
        assert position == i * 8 + t - 1
        assert flat[position] == tokens[t - 1]
        assert target == tokens[t]


def test_the_last_token_is_a_target_and_padding_never_is(make_examples: MakeExamples) -> None:
    examples = make_examples([3, 40, 11])
    batch = make_batch(examples, [0, 1, 2])
    targets = batch.targets.tolist()
    assert 0 not in targets  # no example holds the id that pads
    assert len(targets) == sum(int(example.mask.sum()) for example in examples)
    for example in examples:
        assert int(example.tokens[-1]) in targets


# --- order --------------------------------------------------------------------


def skewed(count: int = 1000) -> list[int]:
    draw = random.Random(0)
    return [min(2000, 3 + int(draw.lognormvariate(4, 1))) for _ in range(count)]


def flat_examples(lengths: Iterable[int]) -> list[Example]:
    return [Example(np.zeros(length, np.uint32), np.ones(length, bool)) for length in lengths]


def waste(examples: list[Example], steps: Iterable[list[int]]) -> float:
    """Padding as a share of the tokens themselves."""
    padded = sum(len(rows) * max(len(examples[row].tokens) for row in rows) for rows in steps)
    return padded / sum(len(example.tokens) for example in examples) - 1


def test_an_epoch_has_every_row_once_also_when_the_last_step_is_short() -> None:
    for count, rows_a_step in ((1, 4), (3, 4), (4, 4), (1001, 8)):
        for by_length in (False, True):
            examples = flat_examples(skewed(count))
            steps = epoch_order(examples, rows_a_step, seed=0, epoch=0, by_length=by_length)
            assert sorted(row for step in steps for row in step) == list(range(count))
            assert len(steps) == -(-count // rows_a_step)
            assert max(map(len, steps)) <= rows_a_step


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    examples = flat_examples(skewed(200))
    orders = {}
    for seed in (0, 1, 2**32 - 1):
        for epoch in (0, 1, 1000):
            np.random.seed(epoch)
            mx.random.seed(epoch)
            orders[seed, epoch] = epoch_order(examples, 8, seed, epoch)
            np.random.random(7)
            assert epoch_order(examples, 8, seed, epoch) == orders[seed, epoch]
    assert len({json.dumps(order) for order in orders.values()}) == len(orders)


def test_any_two_rows_meet_in_a_step_equally_often_whatever_their_lengths() -> None:
    """Two of 16 rows in steps of 4 meet in one epoch of five; in a step they stand in order of length."""
    lengths = [3 + 40 * (row % 2) + row for row in range(16)]  # short and long ones in turns
    epochs = 2000
    meet = np.zeros((16, 16), int)
    for epoch in range(epochs):
        for step in epoch_order(flat_examples(lengths), 4, seed=5, epoch=epoch):
            assert [lengths[row] for row in step] == sorted(lengths[row] for row in step)
            meet[np.ix_(step, step)] += 1
    shares = meet[np.triu_indices(16, 1)] / epochs
    assert abs(shares.mean() - 0.2) < 1e-9
    assert abs(shares - 0.2).max() < 5 * math.sqrt(0.2 * 0.8 / epochs)


def test_rows_of_like_length_go_together_in_changing_company() -> None:
    lengths = skewed()
    examples = flat_examples(lengths)
    order = epoch_order(examples, 8, seed=0, epoch=0, by_length=True)
    draw = random.Random(0)
    shuffled = draw.sample(range(len(examples)), len(examples))
    in_steps = [shuffled[i : i + 8] for i in range(0, len(shuffled), 8)]
    assert waste(examples, in_steps) > 1.0
    assert waste(examples, order) < 0.12
    company = [
        {frozenset(step) for step in epoch_order(examples, 8, seed=0, epoch=epoch, by_length=True)}
        for epoch in (0, 1)
    ]
    assert len(company[0] & company[1]) < len(order) / 10
    # Short and long steps come in no order.
    widths = [max(lengths[row] for row in step) for step in order]
    assert 0.3 < sum(a < b for a, b in pairwise(widths)) / len(widths) < 0.7


def test_any_cursor_goes_on_where_the_whole_would_be() -> None:
    examples = flat_examples(skewed(50))
    whole = list(islice(steps_from(examples, 8, seed=3), 30))  # 7 steps an epoch
    for cursor in range(23):
        assert list(islice(steps_from(examples, 8, seed=3, cursor=cursor), 7)) == whole[cursor : cursor + 7]


def test_a_dataset_smaller_than_a_batch_makes_smaller_batches() -> None:
    examples = flat_examples([3, 5])
    assert [sorted(step) for step in islice(steps_from(examples, 8, seed=0), 3)] == [[0, 1]] * 3


# --- fixed rows ---------------------------------------------------------------


def test_fixed_rows_are_the_same_each_time_and_have_the_tail(make_examples: MakeExamples) -> None:
    examples = make_examples([9, 3, 7, 5, 2, 8, 4])
    for batch_size in (1, 2, 3, 7, 100):
        rows = list(fixed_rows(examples, batch_size, -1))
        assert sorted(row for part in rows for row in part) == list(range(7))
        assert rows == list(fixed_rows(examples, batch_size, -1))


def test_a_part_of_the_rows_is_taken_from_all_over_the_file(make_examples: MakeExamples) -> None:
    examples = make_examples([5] * 100)
    rows = sorted(row for part in fixed_rows(examples, 5, 2) for row in part)
    assert rows == list(range(0, 100, 10))
    assert sum(map(len, fixed_rows(examples, 5, 21))) == 100
    assert len(list(fixed_rows(examples[:3], 5, 2))) == 1
