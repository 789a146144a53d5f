from __future__ import annotations

from typing import Any

import pytest

from mlxlora_core.training.findings import Finding, Findings, findings_in, is_blank, look


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [*([{"role": "system", "content": system}] if system is not None else []), *said]}


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "\t\r\n", "\u3000", "\u00a0", "\u200b", "\ufeff\u2060", "\0", "\x1f "]
)
def test_what_nobody_sees_is_blank(text: str) -> None:
    assert is_blank(text)


@pytest.mark.parametrize("text", [".", " x ", "\u2800", "😀", "\ue000", "\u0301", "0"])
def test_what_somebody_may_see_is_not(text: str) -> None:
    assert not is_blank(text)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"text": "a"}, []),
        ({"text": " \n"}, [Finding.BLANK]),
        ({"prompt": "a", "completion": "b"}, []),
        ({"prompt": "", "completion": "b"}, []),
        ({"prompt": "a", "completion": ""}, [Finding.NO_ANSWER]),
        ({"prompt": "a", "completion": " \u200b"}, [Finding.NO_ANSWER]),
        ({"prompt": " ", "completion": "\n"}, [Finding.BLANK]),
        (chat("a", "b"), []),
        (chat("a", "b", system=""), [Finding.NO_QUESTION]),
        (chat("a", ""), [Finding.NO_ANSWER]),
        (chat("a", "b", "c", "\n"), [Finding.NO_ANSWER]),
        (chat(" ", "b"), [Finding.NO_QUESTION]),
        (chat("a\n", "b"), [Finding.EDGES]),
        (chat(" a", "", "", " b"), [Finding.NO_ANSWER, Finding.NO_QUESTION, Finding.EDGES]),
    ],
)
def test_what_is_no_content_is_found(content: dict[str, Any], found: list[Finding]) -> None:
    assert look(content) == found


def test_rows_are_counted_and_the_first_is_named() -> None:
    rows = [chat("a", ""), {"text": "x"}, {"text": "</s> <s>"}, chat("a </s>", "b"), chat("a", " ")]
    found = findings_in((f"file:{number}", row) for number, row in enumerate(rows, start=1))
    assert list(found.sentences("train")) == [
        "warning: 2 train rows with </s>, <s> as text: letters, and not the tokens that models write so "
        "(the first: file:3)",
        "warning: 2 train rows with an answer without content, which teaches to end at once "
        "(the first: file:1)",
    ]


def test_one_row_is_one_row_and_sound_ones_are_no_warning() -> None:
    found = findings_in([("x:1", chat(" a", "b"))])
    assert list(found.sentences("test")) == [
        "1 test row with white space at the ends of messages, which is kept (the first: x:1)"
    ]


def test_names_are_told_on_one_line_and_not_without_end() -> None:
    found = Findings()
    found.add(Finding.TAKEN, "x:1", ["<\x1b[2J>", *(f"<{i}>" for i in range(99))])
    (line,) = found.sentences("train")
    assert line.isprintable() and len(line) < 300 and "and 94 more" in line
