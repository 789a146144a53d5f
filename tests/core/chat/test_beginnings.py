"""What is kept of the beginnings of conversations: turns are the same, and few are rendered."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import small_templates
from small_templates import SPECIALS

from mlxlora_core.chat import ChatTemplate
from mlxlora_core.chat.beginnings import KnownBeginnings
from mlxlora_core.chat.program import Program
from mlxlora_core.errors import DataError

SOURCES = {
    name: source
    for name, source in vars(small_templates).items()
    if name.isupper() and isinstance(source, str) and name != "PARTS"
}
ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
SOME = ("CHATML", "MISTRAL", "LAST_THOUGHT", "MARKED", "LATE_END")
TAKEN = {name: source for name, source in SOURCES.items() if ALL or name in SOME}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def asked(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Question {number}?"}


def answered(number: int) -> dict[str, Any]:
    thought = "<think>\nHm.\n</think>\n\n" if number % 3 == 1 else ""
    return {"role": "assistant", "content": f"{thought}Answer {number}."}


def talk(turns: int) -> list[dict[str, Any]]:
    """A conversation of so many answers that waits for one more."""
    return [m for n in range(turns) for m in (asked(n), answered(n))] + [asked(turns)]


def turns(template: ChatTemplate, messages: list[dict[str, Any]], tools: list[Any]) -> Any:
    try:
        return template.turns(messages, tools)
    except DataError as fault:
        return str(fault)


def written(messages: list[dict[str, Any]], waits: bool) -> str | None:
    """A text whose front, and whose every turn, depend on what comes later; none of an odd few."""
    if len(messages) % 7 == 5:
        return None
    front = f"[{len(messages) // 4}]" * (len(messages) > 8)
    return front + "".join(m["content"][: 8 + len(messages) % 3] for m in messages) + "..." * waits


@pytest.mark.parametrize("seed", range(20))
def test_a_beginning_is_what_it_would_be_anew(seed: int) -> None:
    draw, known, messages = random.Random(seed), KnownBeginnings(), talk(3)
    for step in range(30):
        place = draw.randrange(len(messages))
        match draw.randrange(4):
            case 0 | 1:
                messages = [*messages, *talk(draw.randrange(3))]
            case 2:
                messages = messages[: max(6, place)]
            case _:
                messages = [
                    *messages[:place],
                    {"role": "user", "content": f"{step}."},
                    *messages[place + 1 :],
                ]
        whole = "".join(str(m["content"]) for m in messages) if len(messages) % 7 == 5 else ""
        found = known.of(messages, [], whole or str(written(messages, False)))
        for count in range(len(messages)):
            for waits in (False, True):
                wanted = written(messages[:count], waits)
                assert found.text(count, waits, lambda: wanted) == wanted  # noqa: B023 - called at once


@pytest.mark.parametrize("source", TAKEN.values(), ids=TAKEN)
def test_turns_are_those_of_a_template_that_has_seen_nothing(source: str) -> None:
    """Conversations that go on, are asked anew, lose turns, and change in the middle, side by side."""
    draw, seen = random.Random(0), ChatTemplate(source, SPECIALS)
    talks = [talk(2), talk(3)]
    for step in range(40 if ALL else 20):
        place = draw.randrange(len(talks))
        messages = list(talks[place])
        match draw.randrange(5):
            case 0 | 1:
                messages += [answered(draw.randrange(9)), asked(step)]
            case 2:
                messages[-1] = asked(100 + step)
            case 3:
                messages = messages[: 1 + 2 * draw.randrange(len(messages) // 2 + 1)]
            case _:
                changed = draw.randrange(len(messages))
                messages[changed] = {**messages[changed], "content": f"Changed {step}."}
        talks[place] = messages
        tools = [TOOL] if draw.random() < 0.3 else []
        whole = messages if draw.random() < 0.5 else messages[:-1] or messages
        assert turns(seen, whole, tools) == turns(ChatTemplate(source, SPECIALS), whole, tools)


@pytest.mark.parametrize("name", ["CHATML", "LLAMA_3", "LAST_THOUGHT", "MISTRAL"])
def test_a_further_question_takes_as_many_renderings_as_the_first(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, run = 0, Program.run

    def counted(*args: Any, **named: Any) -> str:
        nonlocal count
        count += 1
        return run(*args, **named)

    monkeypatch.setattr(Program, "run", counted)
    template, counts = ChatTemplate(SOURCES[name], SPECIALS), []
    for number in range(3, 30):
        before = count
        template.turns(talk(number))
        counts.append(count - before)
    assert max(counts[1:]) <= 6 and counts[1:] == [counts[1]] * (len(counts) - 1)


def test_what_a_caller_changes_afterwards_is_another_conversation() -> None:
    template, messages = ChatTemplate(small_templates.CHATML), talk(5)
    template.turns(messages)
    messages[1]["content"] = "Something else, and longer."
    assert template.turns(messages) == ChatTemplate(small_templates.CHATML).turns(messages)
