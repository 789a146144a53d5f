from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest

from mlxlora_core.errors import UsageError
from mlxlora_core.model.stop_texts import StopTexts, checked_stops


def shown(parts: Iterable[str], stop: Sequence[str]) -> tuple[list[str], str | None]:
    """What is shown after each part, the rest included, and the stop text that was found."""
    stops = StopTexts(stop)
    told = []
    for part in parts:
        told.append(stops.add(part))
        if stops.found is not None:
            return told, stops.found
    return [*told, stops.rest()], None


def by_letters(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The text before the first stop text to be complete, of several the longest; a letter at a time."""
    for end in range(1, len(text) + 1):
        complete = [each for each in stop if text[:end].endswith(each)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_a_text_ends_before_a_stop_text_however_it_comes_in_parts() -> None:
    draw = random.Random(3)
    for _ in range(3000):
        text = "".join(draw.choices("ab\n", k=draw.randint(0, 12)))
        stop = ["".join(draw.choices("ab\n", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 5)))
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        told, found = shown(parts, stop)
        assert ("".join(told), found) == by_letters(text, stop), (parts, stop)


def test_what_may_begin_a_stop_text_waits_and_comes_once_it_does_not() -> None:
    told, found = shown(["A", " U", "se", "r", "s", ": U", "ser"], ["User:"])
    assert told == ["A", " ", "", "", "Users", ": ", "", "User"] and found is None
    assert shown(["A U", "ser", ": more"], ["User:"]) == (["A ", "", ""], "User:")


def test_nothing_is_held_back_without_stop_texts() -> None:
    assert shown(["a", "", "b\n"], []) == (["a", "", "b\n", ""], None)


@pytest.mark.parametrize("stop", [[""], ["a", ""], [3]])
def test_what_cannot_stop_a_text_is_refused(stop: list[str]) -> None:
    with pytest.raises(UsageError, match="a text to stop at is"):
        checked_stops(stop)
    assert checked_stops(iter(["a", "\n"])) == ("a", "\n")
