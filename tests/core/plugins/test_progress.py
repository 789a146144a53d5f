from __future__ import annotations

import pytest

from mlxlora_core.plugins.progress import progress_shown, report_progress


def test_what_is_told_is_shown_in_the_context_and_nowhere_else() -> None:
    seen: list[tuple[str, int, int]] = []
    report_progress("outside", 1, 2)
    with progress_shown(lambda *told: seen.append(told)):
        report_progress("reading", 1, 2)
        with progress_shown(lambda *told: None):
            report_progress("within", 1, 2)
        report_progress("reading", 2, 2)
    report_progress("outside", 2, 2)
    assert seen == [("reading", 1, 2), ("reading", 2, 2)]


def test_a_context_that_ends_by_an_error_shows_nothing_more() -> None:
    seen: list[str] = []
    with pytest.raises(ValueError, match="stop"), progress_shown(lambda what, done, count: seen.append(what)):
        raise ValueError("stop")
    report_progress("reading", 1, 1)
    assert seen == []
