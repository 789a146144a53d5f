"""When ranks that wait for one another are told from those that work, and for how long one may still end."""

from __future__ import annotations

import pytest

from mlxlora_core.distributed import watch
from mlxlora_core.distributed.watch import GRACE_SECONDS, MOST_GRACE_SECONDS, STALL_SECONDS, _Grace, _Pace


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> _Pace:
    monkeypatch.setattr(watch, "_on_cpu", lambda: True)
    pace = _Pace()
    pace.working = False
    return pace


def until(pace: _Pace, seconds: int, *, moves: int = 5, working: bool = False, phase: str = "step 6") -> int:
    """After how many seconds all wait for one another, or -1."""
    told = (second for second in range(1, seconds + 1) if pace.stalls(1.0, moves, working, phase))
    return next(told, -1)


def test_all_wait(pace: _Pace) -> None:
    assert until(pace, 60) == STALL_SECONDS + 2  # the first second only notes where they are


def test_long_steps_are_waited_for_longer(pace: _Pace) -> None:
    pace.took("step 5", 4.0)
    pace.took("step 6", 2.0)
    assert until(pace, 60) == STALL_SECONDS + 2 + 3 * 4


def test_a_gpu_computes_without_a_processor(pace: _Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_on_cpu", lambda: False)
    assert until(pace, 200) == -1


def test_one_works(pace: _Pace) -> None:
    assert until(pace, 60, working=True) == -1
    pace.working = True
    assert until(pace, 60) == -1


def test_they_get_on(pace: _Pace) -> None:
    assert not any(pace.stalls(1.0, moves, False, "step 6") for moves in range(60))


@pytest.mark.parametrize("phase", ["the start", "saving step 6", "the end"])
def test_phases_in_which_others_wait_for_one(pace: _Pace, phase: str) -> None:
    assert until(pace, 60, phase=phase) == -1


def test_processor_time_is_work() -> None:
    pace = _Pace()
    pace.look(1e6)
    assert not pace.working
    sum(range(2_000_000))
    pace.look(1e-3)
    assert pace.working


def seconds_of(grace: _Grace, *, working: bool, phase: str = "step 6") -> int:
    return next(second for second in range(1, 1000) if grace.is_over(1.0, working, phase))


def test_an_idle_rank_ends_soon_after_another() -> None:
    assert seconds_of(_Grace(), working=False) == GRACE_SECONDS + 1


def test_one_that_works_may_end_by_itself() -> None:
    assert seconds_of(_Grace(), working=True) == MOST_GRACE_SECONDS + 1


def test_what_is_saved_is_saved() -> None:
    grace = _Grace()
    assert not any(grace.is_over(1.0, False, "saving step 6") for _ in range(1000))
    assert seconds_of(grace, working=False) == GRACE_SECONDS + 1
