"""The chat templates of llama.cpp's collection, rendered as transformers renders them, byte for byte."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.chat import ChatTemplate
from mlxlora_core.chat.template import DATE
from mlxlora_core.errors import MlxloraError

COUNT = 70
SPECIALS = {"bos_token": "<BOS>", "eos_token": "<EOS>", "pad_token": "<PAD>", "unk_token": "<UNK>"}
ODD = ("  Füße \U0001f600\n\n<b>&amp;\u2028 \t", '\n  日本語  «odd»\u00a0 "q" \\n\n ')
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Name"},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city"],
}
TOOL = {"name": "get_weather", "description": "Weather of a <city> & more", "parameters": SCHEMA}
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich"}},
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


CALLED = [
    user("Weather in Zürich?"),
    {**said(""), "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": '{"t": 21}'},
    said("It has 21 degrees."),
]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
    "single": ([user("What is 2+2?"), said("It is four.")], []),
    "several": ([user("Hi"), said("Hello there."), user("And again?"), said("Once more: hello.")], []),
    "system": ([{"role": "system", "content": "You are terse."}, user("Hi"), said("Yes.")], []),
    "tools": (CALLED, [{"type": "function", "function": TOOL}]),
    "asked": ([user("Hi"), said("Hello there."), user("And again?")], []),
    "odd": ([user(ODD[0]), said(ODD[1])], []),
}


@pytest.fixture(scope="module")
def templates(llama_cpp: Path) -> dict[str, str]:
    """Name -> source."""
    found = {path.stem: path.read_text("utf-8") for path in sorted((llama_cpp / "templates").glob("*.jinja"))}
    assert len(found) == COUNT
    return found


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    """The module of transformers that renders templates, on the date that they are told here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers.utils.chat_template_utils")

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(DATE.year, DATE.month, DATE.day, tzinfo=tz)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "datetime", Fixed)
        yield module


def expected(reference: Any, source: str, name: str) -> str | None:
    """What transformers makes of a conversation, or None where it raises."""
    messages, tools = copy.deepcopy(CONVERSATIONS[name])
    try:
        (text,), _ = reference.render_jinja_template(
            [messages],
            tools=tools or None,
            chat_template=source,
            add_generation_prompt=messages[-1]["role"] != "assistant",
            **SPECIALS,
        )
    except Exception:
        return None
    return str(text)


def rendered(source: str, name: str) -> str | None:
    """What we make of it, or None where that is refused in one line."""
    messages, tools = CONVERSATIONS[name]
    try:
        return ChatTemplate(source, SPECIALS).render(messages, tools, messages[-1]["role"] != "assistant")
    except MlxloraError as fault:
        assert str(fault).isprintable() and len(str(fault)) < 2000
        return None


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_text_is_that_of_transformers(name: str, templates: dict[str, str], reference: Any) -> None:
    wanted = {template: expected(reference, source, name) for template, source in templates.items()}
    found = {template: rendered(source, name) for template, source in templates.items()}
    assert found == wanted
    assert sum(text is not None for text in wanted.values()) > COUNT * 3 // 4


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_are_what_the_assistant_says(name: str, templates: dict[str, str]) -> None:
    """Each is there, in order; nothing that somebody else says is in one; no template is refused."""
    messages, tools = CONVERSATIONS[name]
    others = [message["content"].strip() for message in messages if message["role"] != "assistant"]
    seen = 0
    for template, source in templates.items():
        whole = rendered(source, name)
        if whole is None:
            continue
        turns = ChatTemplate(source, SPECIALS).turns(messages, tools)
        assert whole.startswith("".join(turn.text for turn in turns)), template
        answers = [turn.text for turn in turns if turn.answer]
        wanted = [message for message in messages if message["role"] == "assistant"]
        if template == "llama-cpp-rwkv-world":  # leaves calls of tools out
            wanted = [message for message in wanted if message["content"]]
        assert len(answers) == len(wanted), template
        for answer, message in zip(answers, wanted, strict=True):
            assert message["content"].strip() in answer, template
            assert not any(text in answer for text in others), template
        assert turns[-1].answer is (messages[-1]["role"] == "assistant"), template
        seen += 1
    assert seen > COUNT * 3 // 4


def test_most_templates_end_a_turn_with_a_token(templates: dict[str, str]) -> None:
    found = {name: ChatTemplate(source, SPECIALS) for name, source in templates.items()}
    no_end = {name for name, template in found.items() if not template.turn_ends()}
    assert no_end == {
        *("GLM-4.6", "GLM-4.7-Flash", "llama-cpp-rwkv-world"),
        *("MiniMax-M2", "MiniMax-M3"),  # their token is [e~[, which a tokenizer knows
        "fireworks-ai-llama-3-firefunction-v2",  # it needs a date of its own, and renders nothing
    }
    warned = {name for name, template in found.items() if template.warning()}
    assert warned - no_end == {"Apertus-8B-Instruct", "Apriel-1.6-15b-Thinker-fixed", "tencent-Hy3"}


def test_most_templates_ask_as_they_train(templates: dict[str, str]) -> None:
    """What stands in front of the answer is what is asked; elsewhere a prompt opens a thought."""
    messages, _ = CONVERSATIONS["several"]
    otherwise = set()
    for name, source in templates.items():
        template = ChatTemplate(source, SPECIALS)
        try:
            turns, asked = template.turns(messages), template.turns(messages[:-1])
        except MlxloraError:
            continue
        if "".join(turn.text for turn in turns[:-1]) != "".join(turn.text for turn in asked):
            otherwise.add(name)
    assert len(otherwise) < 20, sorted(otherwise)
    assert "Qwen-QwQ-32B" in otherwise and "Qwen-Qwen2.5-7B-Instruct" not in otherwise
