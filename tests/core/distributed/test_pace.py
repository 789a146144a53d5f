"""When ranks that get on are told from those that hang, and for how long one may still end by itself."""

from __future__ import annotations

import pytest

from mlxlora_core.distributed.watch import GRACE_SECONDS, HANG_SECONDS, _Grace, _Pace

LONG = 3600


@pytest.fixture
def pace() -> _Pace:
    pace = _Pace()
    pace.took("step 1", 4.0)
    pace.took("step 2", 2.0)
    return pace


def until(pace: _Pace, phase: str = "step 6") -> int:
    """After how many seconds without a new phase all hang, or -1."""
    return next((second for second in range(1, LONG) if pace.hangs(1.0, 5, phase)), -1)


def test_a_step_may_take_longer_than_the_longest_so_far(pace: _Pace) -> None:
    assert until(pace) == HANG_SECONDS + 5 * 4 + 2  # the first second only notes where they are


def test_ranks_that_get_on(pace: _Pace) -> None:
    assert not any(pace.hangs(1.0, second // 600, "step 6") for second in range(LONG))


@pytest.mark.parametrize("phase", ["the start", "saving step 6", "the end"])
def test_phases_in_which_others_wait_for_one(pace: _Pace, phase: str) -> None:
    pace.took(phase, 1.0)
    assert until(pace, phase) == -1


def test_the_first_of_a_kind_may_take_any_time(pace: _Pace) -> None:
    assert until(pace, "validation after step 6") == -1


def seconds_of(grace: _Grace, phase: str = "step 6") -> int:
    return next(second for second in range(1, LONG) if grace.is_over(1.0, phase))


def test_a_rank_may_end_by_itself_for_a_while() -> None:
    assert seconds_of(_Grace()) == GRACE_SECONDS + 1


def test_what_is_saved_is_saved() -> None:
    grace = _Grace()
    assert not any(grace.is_over(1.0, "saving step 6") for _ in range(LONG))
    assert seconds_of(grace) == GRACE_SECONDS + 1
