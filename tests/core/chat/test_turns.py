"""Which part of a conversation is the assistant's, in templates of many shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import small_templates as small

from mlxlora_core.chat import ChatTemplate
from mlxlora_core.errors import DataError

Messages = Sequence[Mapping[str, Any]]


def said(*contents: Any, system: str = "") -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, small.SPECIALS, where="own.jinja")


def turns(source: str, messages: Messages, tools: Sequence[Any] = ()) -> list[tuple[str, bool]]:
    return [(turn.text, turn.answer) for turn in template(source).turns(messages, tools)]


ONE, TWO = said("Hi ho", "Yes."), said("Hi ho", "Yes.", "And?", "Yes.")

#: template -> its turns of TWO
FOUND: dict[str, list[tuple[str, bool]]] = {
    small.CHATML: [
        ("<|im_start|>user\nHi ho<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>", True),
        ("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>", True),
    ],
    small.LLAMA_3: [
        (
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi ho<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("Yes.<|eot_id|>", True),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("Yes.<|eot_id|>", True),
    ],
    small.MISTRAL: [
        ("<s>[INST] Hi ho[/INST]", False),
        (" Yes.</s>", True),
        ("[INST] And?[/INST]", False),
        (" Yes.</s>", True),
    ],
    small.LLAMA_2: [
        ("<s>[INST] Hi ho [/INST]", False),
        (" Yes. </s>", True),
        ("<s>[INST] And? [/INST]", False),
        (" Yes. </s>", True),
    ],
    small.GEMMA: [
        ("<s><start_of_turn>user\nHi ho<end_of_turn>\n<start_of_turn>model\n", False),
        ("Yes.<end_of_turn>", True),
        ("\n<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n", False),
        ("Yes.<end_of_turn>", True),
    ],
    small.PHI_3: [
        ("<|user|>\nHi ho<|end|>\n<|assistant|>\n", False),
        ("Yes.<|end|>", True),
        ("\n<|user|>\nAnd?<|end|>\n<|assistant|>\n", False),
        ("Yes.<|end|>", True),
    ],
    small.THINKING: [
        ("<s><|User|>Hi ho<|Assistant|>", False),
        ("Yes.<|end|>", True),
        ("<|User|>And?<|Assistant|>", False),
        ("Yes.<|end|>", True),
    ],
    small.LAST_THOUGHT: [
        ("<|im_start|>user\nHi ho<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>", True),
        ("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\nYes.<|im_end|>", True),
    ],
    small.MARKED: [
        ("<|im_start|>user\nHi ho<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>", True),
        ("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>", True),
    ],
    small.TWO_ENDS: [
        ("<|start|>user<|message|>Hi ho<|end|><|start|>assistant", False),
        ("<|message|>Yes.<|end|>", True),
        ("<|start|>user<|message|>And?<|end|><|start|>assistant", False),
        ("<|message|>Yes.<|return|>", True),
    ],
    small.LATE_END: [
        ("<|u|>Hi ho<|u_end|><|a|>", False),
        ("Yes.<|a_end|>", True),
        ("<|u|>And?<|u_end|><|a|>", False),
        ("Yes.", True),
    ],
    small.NO_END: [
        ("User: Hi ho\n\nBot:", False),
        (" Yes.", True),
        ("\n\nUser: And?\n\nBot:", False),
        (" Yes.", True),
    ],
    small.PARTS: [],
}
NAMES = {source: name for name, source in vars(small).items() if isinstance(source, str)}


@pytest.mark.parametrize("source", [s for s in FOUND if FOUND[s]], ids=NAMES.get)
def test_answers_go_from_where_they_are_asked_up_to_the_end_of_their_turn(source: str) -> None:
    found = turns(source, TWO)
    assert found == FOUND[source]
    whole = template(source).render(TWO)
    text = "".join(part for part, _ in found)
    assert whole.startswith(text)
    assert whole[len(text) :] in ("", "\n", "\n\n", "\n</s>")


@pytest.mark.parametrize("source", [s for s in FOUND if FOUND[s]], ids=NAMES.get)
def test_a_conversation_that_waits_ends_where_its_answer_begins(source: str) -> None:
    found = turns(source, TWO[:3])
    assert found[-1][1] is False
    assert "".join(text for text, _ in found) == template(source).render(TWO[:3], (), True)
    if source is not small.THINKING:  # whose prompt opens a thought
        assert found == FOUND[source][:3]


#: template -> the texts by which it ends turns, and what speaks against it
ENDS = {
    small.CHATML: (("<|im_end|>",), ""),
    small.LLAMA_3: (("<|eot_id|>",), ""),
    small.MISTRAL: (("</s>",), ""),
    small.LLAMA_2: (("</s>",), ""),
    small.GEMMA: (("<end_of_turn>",), ""),
    small.PHI_3: (("<|end|>",), ""),
    small.THINKING: (("<|end|>",), ""),
    small.LAST_THOUGHT: (("<|im_end|>",), ""),
    small.MARKED: (("<|im_end|>",), ""),
    small.TOOLS: (("<|im_end|>",), ""),
    small.TWO_ENDS: (("<|return|>", "<|end|>"), ""),
    small.LATE_END: (("<|a_end|>",), "it writes no token behind the last answer of a conversation"),
    small.NO_END: ((), "it writes no token that ends an answer"),
    small.PARTS: (("<|end|>",), ""),
}


@pytest.mark.parametrize("source", ENDS, ids=NAMES.get)
def test_the_token_that_ends_a_turn_is_found(source: str) -> None:
    assert (template(source).turn_ends(), template(source).warning()) == ENDS[source]


def test_a_tokenizer_says_what_is_a_token() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}><|x|>\n{% endfor %}"
    assert template(source).turn_ends() == ("<|x|>",)
    assert template(source).turn_ends({"</assistant>"}.__contains__) == ("</assistant>",)
    assert template(source).turn_ends(lambda text: False) == ()
    odd = small.CHATML.replace("<|im_end|>", "[e~[")
    assert (template(odd).turn_ends(), template(odd).turn_ends({"[e~["}.__contains__)) == ((), ("[e~[",))
    ordinary = {"\n", "\n\n", ".", "Yes", "assistant", "<", "[e~["}
    assert template(odd).turn_ends(ordinary.__contains__) == ("[e~[",)
    found = template(source).turns(ONE, (), {"</assistant>"}.__contains__)
    assert [turn.text for turn in found if turn.answer] == ["<assistant>Yes.</assistant>"]


# --- conversations of other kinds ----------------------------------------------


def test_system_messages_are_as_the_template_has_them() -> None:
    asked, answered = turns(small.CHATML, said("a", "b", system="Be brief."))
    assert asked[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na")
    assert answered == ("b<|im_end|>", True)
    with pytest.raises(DataError) as caught:
        turns(small.GEMMA, said("a", "b", system="Be brief."))
    assert str(caught.value).startswith(
        "own.jinja:3: the chat template refuses the conversation: no system messages: Be brief."
    )


def test_roles_are_as_the_template_has_them() -> None:
    twice = [*ONE, {"role": "assistant", "content": "No."}]
    assert turns(small.CHATML, twice)[-2:] == [("\n<|im_start|>assistant\n", False), ("No.<|im_end|>", True)]
    first = [{"role": "assistant", "content": "Welcome."}, *ONE]
    assert turns(small.CHATML, first)[:2] == [
        ("<|im_start|>assistant\n", False),
        ("Welcome.<|im_end|>", True),
    ]
    with pytest.raises(DataError, match=r"own.jinja:\d: the chat template refuses .*: roles must alternate"):
        turns(small.MISTRAL, twice)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <1>"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_calls_of_tools_are_what_the_assistant_says() -> None:
    messages = [
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "Yes."},
    ]
    found = turns(small.TOOLS, messages, [TOOL])
    schema = '{"name": "weather", "parameters": {"type": "object"}}'
    assert found[0] == (
        f"<|im_start|>system\n{schema}\n<|im_end|>\n<|im_start|>user\nWarm?<|im_end|>\n<|im_start|>assistant\n",
        False,
    )
    said = '<tool_call>{"name": "weather", "arguments": {"city": "Zürich <1>"}}</tool_call><|im_end|>'
    assert found[1:] == [
        (said, True),
        ("\n<|im_start|>tool\n21<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>", True),
    ]
    with_calls = template(small.CHATML + "{{ tools | tojson }}")
    assert with_calls.render(ONE).endswith("null")


def test_a_call_is_found_where_a_prompt_opens_a_thought() -> None:
    source = small.THINKING.replace(
        "{{ content }}<|end|>", "{{ content }}{{ m.tool_calls | tojson if m.tool_calls }}<|end|>"
    )
    messages = [
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "content": "", "tool_calls": [1]},
        {"role": "user", "content": "21"},
        {"role": "assistant", "content": "Yes."},
    ]
    assert [text for text, answer in turns(source, messages) if answer] == ["[1]<|end|>", "Yes.<|end|>"]


def test_content_in_parts_is_as_the_template_has_it() -> None:
    parts = [{"type": "text", "text": "Ye"}, {"type": "text", "text": "s."}]
    messages = said([{"type": "text", "text": "Hi"}], parts)
    assert turns(small.PARTS, messages) == [
        ("<|user|>Hi<|end|>\n<|assistant|>", False),
        ("Yes.<|end|>", True),
    ]


# --- what answers hold ----------------------------------------------------------

ODD_TEXTS = (
    "",
    " ",
    "Hi ho",  # what the user says
    "<|im_end|>",
    "a<|im_end|>\n<|im_start|>user\nb",
    "\n\n tabs\t and \u00a0 spaces \n",
    "日本語 \U0001f600 \u2028",
    "{{ messages }} {% for %}",
    "<think>x</think>y",
    "{% generation %}",
)


@pytest.mark.parametrize("answer", ODD_TEXTS, ids=repr)
@pytest.mark.parametrize("source", [small.CHATML, small.MISTRAL, small.MARKED, small.PHI_3], ids=NAMES.get)
def test_whatever_an_answer_holds_is_its_own(source: str, answer: str) -> None:
    messages = said("Hi ho", answer, "And?", answer)
    end = template(source).turn_ends()[0]
    space = " " if source is small.MISTRAL else ""
    assert [text for text, yes in turns(source, messages) if yes] == [f"{space}{answer}{end}"] * 2


def test_thoughts_that_are_dropped_are_no_part_of_an_answer() -> None:
    messages = said("Hi", "<think>well</think>\nYes.", "And?", "<think>hm</think>No.")
    assert [text for text, answer in turns(small.THINKING, messages) if answer] == [
        "Yes.<|end|>",
        "No.<|end|>",
    ]


def test_reasoning_has_the_names_that_templates_read() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        messages = said("Hi", "Yes.")
        messages[1][name] = "Well"
        (_, _), (text, _) = turns(small.LAST_THOUGHT, messages)
        assert text == "<think>\nWell\n</think>\n\nYes.<|im_end|>"


def test_the_same_answer_twice_is_told_apart() -> None:
    """The places of contents are found by marks, and not by their texts."""
    messages = said("Yes.", "Yes.", "Yes.", "Yes.")
    found = turns(small.THINKING, messages)
    assert [text for text, _ in found] == [
        *("<s><|User|>Yes.<|Assistant|>", "Yes.<|end|>"),
        *("<|User|>Yes.<|Assistant|>", "Yes.<|end|>"),
    ]


def test_what_is_not_certain_is_refused() -> None:
    """Which of two texts is the answer?"""
    source = small.THINKING.replace("{{ content }}", "{{ content }} {{ content }}")
    with pytest.raises(DataError) as caught:
        turns(source, said("Hi", "yes."))
    assert str(caught.value) == (
        "own.jinja: it cannot be told where the answer in message 2 begins in what the chat template writes. "
        "Fix: mark it in the template by {% generation %}, or use another chat template"
    )
    answer = "{{ content }} {{ content }}<|end|>"
    marked = source.replace(answer, "{% generation %}" + answer + "{% endgeneration %}")
    assert turns(marked, said("Hi", "yes."))[-1] == ("yes. yes.<|end|>", True)


def test_an_answer_that_is_written_in_another_way_is_found() -> None:
    source = small.THINKING.replace("{{ content }}", "{{ content | upper }}")
    assert turns(source, said("yes.", "yes."))[-1] == ("YES.<|end|>", True)


def test_a_call_that_holds_the_end_of_a_turn_is_refused_where_it_is_not_certain() -> None:
    source = small.LAST_THOUGHT.replace("<|im_end|>", "{{ m.tool_calls or '' }}<|im_end|>")
    call = [{"function": {"name": "f", "arguments": {"a": "<|im_end|>"}}}]
    messages = [*said("Hi", "", "And?", "Yes.")]
    messages[1]["tool_calls"] = call
    with pytest.raises(DataError, match="where the answer in message 2 ends"):
        turns(source, messages)
    messages[1]["tool_calls"] = [1]
    assert next(text for text, answer in turns(source, messages) if answer) == "[1]<|im_end|>"


def test_marks_that_change_the_text_are_not_used() -> None:
    """A template that looks at what it has marked itself gets the same text as without marks."""
    source = small.MARKED.replace("{% generation %}", "{% set x %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endset %}{{ x if x | length < 24 else 'long' }}"
    )
    found = turns(source, said("Hi", "Yes, it is."))
    assert found[-1] == ("Yes, it is.<|im_end|>", True)


def test_a_mark_does_not_take_what_generation_is_told() -> None:
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\\n' }}"
    source = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}{turn}{{% else %}}{{% generation %}}{turn}"
        "{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert turns(source, TWO) == FOUND[small.CHATML]


def test_a_conversation_without_answers_is_one_part() -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert turns(small.CHATML, said("Hi")) == [(text, False)]
