"""The list of the protocol's fields, in the docs and in the code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from mlxlora_core.server import requests
from mlxlora_core.server.faults import ProtocolError
from mlxlora_core.server.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    IGNORED,
    REFUSED,
    SERVED,
    Field,
    check_fields,
)
from mlxlora_core.server.settings import ServeConfig

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": "m", "prompt": "x"}


def rows(heading: str) -> list[str]:
    """The rows of the table below a heading."""
    text = PAGE.read_text("utf-8").partition(f"### Fields of `{heading}`\n")[2]
    return re.findall(r"^\| `.*$", text.partition("\n## ")[0].partition("\n### ")[0], re.MULTILINE)


@pytest.mark.parametrize(
    ("heading", "fields"), [("/v1/chat/completions", CHAT_FIELDS), ("/v1/completions", COMPLETION_FIELDS)]
)
def test_the_page_has_every_field(heading: str, fields: Mapping[str, Field]) -> None:
    assert rows(heading) == [f"| `{name}` | {field.how} | {field.words} |" for name, field in fields.items()]


@pytest.mark.parametrize(
    ("fields", "body", "read"),
    [(CHAT_FIELDS, CHAT, requests.chat_asked), (COMPLETION_FIELDS, COMPLETION, requests.completion_asked)],
    ids=["chat", "completions"],
)
def test_what_is_served_ignored_and_refused(
    fields: Mapping[str, Field], body: dict[str, object], read: object
) -> None:
    plain = read(body)  # type: ignore[operator]  # one of two functions
    for name, field in fields.items():
        if field.how == SERVED:
            with pytest.raises(ProtocolError) as fault:
                read({**body, name: {"x": []}})  # type: ignore[operator]
            assert fault.value.param == name, "it is read"
        if field.how == IGNORED:
            assert read({**body, name: ["anything"]}) == plain  # type: ignore[operator]
        if field.how == REFUSED:
            for value in (None, *field.neutral):
                assert read({**body, name: value}) == plain  # type: ignore[operator]
            with pytest.raises(ProtocolError) as fault:
                check_fields({name: "anything"}, fields)
            assert (fault.value.param, fault.value.code) == (name, "unsupported_parameter")


def test_null_is_as_good_as_nothing() -> None:
    for body, fields, read in (
        (CHAT, CHAT_FIELDS, requests.chat_asked),
        (COMPLETION, COMPLETION_FIELDS, requests.completion_asked),
    ):
        assert read({**dict.fromkeys(fields), **body}) == read(body)  # type: ignore[operator]


def test_the_page_says_how_much_is_allowed() -> None:
    text = PAGE.read_text("utf-8")
    for option in ("places", "queue", "timeout", "stop_timeout", "max_body", "connections"):
        default = getattr(ServeConfig(), option)
        assert f"| `--{option.replace('_', '-')}` {default:g} |" in text, option
