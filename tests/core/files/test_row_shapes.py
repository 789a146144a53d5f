"""The shapes that people's rows have, and the plain ones that come of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlxlora_core.files.row_messages import RowFault
from mlxlora_core.files.row_shapes import check_content, parse_columns, read_row

U, A, S = "user", "assistant", "system"


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def old(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """As ShareGPT writes messages."""
    return [{"from": role, "value": value} for role, value in turns]


TALK = {"messages": said((U, "hi"), (A, "ho"))}
NAMED = {"messages": said((S, "be brief"), (U, "hi"), (A, "ho"))}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = [
    *said((U, "hi")),
    {"role": A, "tool_calls": [CALL]},
    {"role": "tool", "content": "5", "name": "f", "tool_call_id": "1"},
    {"role": A, "content": "ho", "reasoning_content": "so"},
]
INSTRUCTED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
)
INSTRUCTED_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n"
)

READ: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": ({"text": ""}, {"text": ""}),
    "pair": ({"prompt": "", "completion": "é"}, {"prompt": "", "completion": "é"}),
    "talk": (TALK, TALK),
    "talk with system": (NAMED, NAMED),
    "system beside": ({**TALK, "system": "be brief"}, NAMED),
    "no system beside": ({**TALK, "system": ""}, TALK),
    "conversations": ({"id": 1, "conversations": old(("human", "hi"), ("gpt", "ho"))}, TALK),
    "conversations with system": (
        {"conversations": old(("system", "be brief"), ("human", "hi"), ("gpt", "ho"))},
        NAMED,
    ),
    "conversations beside system": (
        {"conversations": old(("user", "hi"), ("assistant", "ho")), "system": "be brief", "tools": ""},
        NAMED,
    ),
    "conversations of roles": ({"conversations": said((U, "hi"), (A, "ho"))}, TALK),
    "messages of from": ({"messages": old(("human", "hi"), ("gpt", "ho"))}, TALK),
    "roles as others call them": ({"messages": said(("Human", "hi"), ("model", "ho"))}, TALK),
    "developer": ({"messages": said(("developer", "be brief"), (U, "hi"), (A, "ho"))}, NAMED),
    "parts": (
        {"messages": said((U, [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]), (A, "ho"))},
        TALK,
    ),
    "prompt and completion as messages": (
        {"prompt": said((S, "be brief"), (U, "hi")), "completion": said((A, "ho"))},
        NAMED,
    ),
    "prompt with parts": (
        {"prompt": said((U, [{"type": "text", "text": "hi"}])), "completion": said((A, "ho"))},
        TALK,
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "", "output": "2"},
        {"prompt": INSTRUCTED, "completion": "2"},
    ),
    "alpaca without input": (
        {"instruction": "Add.", "output": "2"},
        {"prompt": INSTRUCTED, "completion": "2"},
    ),
    "alpaca with null": (
        {"instruction": "Add.", "input": None, "output": "2", "history": [], "system": None},
        {"prompt": INSTRUCTED, "completion": "2"},
    ),
    "alpaca with input": (
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"prompt": INSTRUCTED_WITH_INPUT, "completion": "2"},
    ),
    "null where another shape is": (
        {"text": None, "prompt": "a", "completion": "b", "messages": None},
        {"prompt": "a", "completion": "b"},
    ),
    "null keys of messages": (
        {
            "conversations": [
                {"from": "human", "value": "hi", "role": None, "content": None},
                {"role": "assistant", "content": "ho", "from": None, "value": None},
            ]
        },
        TALK,
    ),
    "calls": ({"messages": CALLED, "tools": [TOOL]}, {"messages": CALLED, "tools": [TOOL]}),
    "calls with null": (
        {"messages": [CALLED[0], {**CALLED[1], "content": None, "name": None}, *CALLED[2:]], "tools": []},
        {"messages": CALLED},
    ),
    "calls with content": (
        {"messages": [*said((U, "hi")), {"role": A, "content": "", "tool_calls": [CALL]}]},
        {"messages": [*said((U, "hi")), {"role": A, "content": "", "tool_calls": [CALL]}]},
    ),
    "tools as JSON": ({**TALK, "tools": json.dumps([TOOL])}, {**TALK, "tools": [TOOL]}),
    "tools of a pair": (
        {"prompt": said((U, "hi")), "completion": said((A, "ho")), "tools": [TOOL]},
        {**TALK, "tools": [TOOL]},
    ),
    "any order": (
        {"messages": said((A, "a"), (U, "b"), (U, "c"), (S, "d"), (A, "e"), (A, "f"))},
        {"messages": said((A, "a"), (U, "b"), (U, "c"), (S, "d"), (A, "e"), (A, "f"))},
    ),
    "no calls": (
        {"messages": [said((U, "hi"))[0], {"role": A, "content": "ho", "tool_calls": None}]},
        TALK,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_people_have_becomes_plain(name: str) -> None:
    given, plain = READ[name]
    assert read_row(given).content == plain
    assert check_content(given) is None
    assert read_row(plain).content == plain and read_row(plain).form == ""


def test_it_is_told_what_came_of_a_row_and_what_is_not_read() -> None:
    row = read_row({"id": 0, "none": None, "conversations": old(("human", "hi"), ("gpt", "ho"))})
    assert (row.form, row.unread) == ("conversations", ("id",))
    row = read_row({"messages": [{**message, "weight": 1} for message in TALK["messages"]]})
    assert (row.form, row.unread) == ("", ("weight of messages",))
    assert (
        read_row({"prompt": said((U, "hi")), "completion": said((A, "ho"))}).form == "prompt and completion"
    )


def calls(**more: Any) -> dict[str, Any]:
    return {"messages": [said((U, "hi"))[0], {"role": A, **more}]}


ODD: dict[str, tuple[Any, str]] = {
    "text and messages": ({"text": "a", **TALK}, "has text and messages, wanted only one of these"),
    "text and alpaca": (
        {"text": "a", "instruction": "a", "output": "b"},
        "has text and instruction/output, wanted only one of these",
    ),
    "three": (
        {"text": "a", "prompt": "b", "completion": "c", **TALK},
        "text and prompt/completion and messages",
    ),
    "nothing known": ({"question": "a", "answer": "b"}, "it has the keys question, answer"),
    "ends with user": (
        {"messages": said((U, "a"), (A, "b"), (U, "c"))},
        "the last message is of user, wanted an answer",
    ),
    "system within and beside": (
        {**NAMED, "system": "too"},
        "has system beside messages that begin with one",
    ),
    "system alone": ({"messages": said((S, "a"))}, "the last message is of system"),
    "a role of its own": (
        {"messages": said((U, "a"), ("narrator", "b"))},
        "role of message 2 is 'narrator', wanted system, user, assistant or tool",
    ),
    "ends with a tool": ({"messages": said((U, "a"), ("tool", "b"))}, "the last message is of tool, wanted"),
    "an old call": (calls(content="a", function_call={"name": "f"}), "message 2 has function_call, wanted"),
    "calls of user": (
        {"messages": [{**said((U, "hi"))[0], "tool_calls": [CALL]}, *said((A, "ho"))]},
        "message 1 has tool_calls and is of user, wanted them of assistant",
    ),
    "one call": (
        calls(tool_calls=CALL),
        "tool_calls of message 2 is an object, wanted a list",
    ),
    "calls as texts": (
        calls(tool_calls=["f()"]),
        "tool_calls of message 2 is a list, wanted",
    ),
    "half a pair in a call": (
        calls(tool_calls=[{"a": ["\ud800"]}]),
        "tool_calls of message 2 holds half",
    ),
    "a number for a name": (
        {"messages": [*said((U, "hi")), {"role": "tool", "content": "x", "name": 5}, *said((A, "ho"))]},
        "name of message 2 is a number, wanted a string",
    ),
    "tools as no list": ({**TALK, "tools": {"a": 1}}, "tools is an object, wanted a list of schemas"),
    "tools as texts": ({**TALK, "tools": ["f"]}, "tools is a list, wanted a list of schemas"),
    "tools as half a text": ({**TALK, "tools": "[{"}, "tools is a string that is no JSON"),
    "tools beside texts": (
        {"prompt": "a", "completion": "b", "tools": [TOOL]},
        "has tools beside prompt",
    ),
    "no content": (calls(), "message 2 has no content; it has the keys role"),
    "null": (calls(content=None), "content of message 2 is null, wanted a string"),
    "number": (calls(content=5), "content of message 2 is a number"),
    "picture": (
        {"messages": said((U, [{"type": "image_url", "image_url": {"url": "x"}}]), (A, "b"))},
        "content of message 1 has a part of type 'image_url', and only",
    ),
    "no parts": ({"messages": said((U, []), (A, "b"))}, "content of message 1 is an empty list"),
    "parts that are strings": ({"messages": said((U, ["a"]), (A, "b"))}, "has a part that is none of text"),
    "part without text": ({"messages": said((U, [{"type": "text"}]), (A, "b"))}, "that is none of text"),
    "part of a number": (
        {"messages": said((U, [{"type": "text", "text": 1}]), (A, "b"))},
        "a part of content of message 1 is a number",
    ),
    "value of from": ({"conversations": [{"from": "human"}]}, "message 1 has no value; it has the keys from"),
    "one list": ({"prompt": said((U, "a")), "completion": "b"}, "completion is a string, wanted a list"),
    "list of strings": (
        {"prompt": ["a"], "completion": ["b"]},
        "message 1 is a string, wanted {role, content}",
    ),
    "completion of user": (
        {"prompt": said((U, "a")), "completion": said((U, "b"))},
        "the last message is of user, wanted an answer of assistant",
    ),
    "history": (
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        "has history beside instruction and output",
    ),
    "instruction null": ({"instruction": None, "output": "b"}, "instruction is null"),
    "input number": ({"instruction": "a", "input": 1, "output": "b"}, "input is a number"),
    "messages as text": ({"messages": "[]"}, "messages is a string, wanted a list"),
    "surrogate in a part": (
        {"messages": said((U, [{"type": "text", "text": "\ud800"}]), (A, "b"))},
        "a part of content of message 1 holds half a surrogate pair",
    ),
    "list": ([], "is an empty list, wanted an object"),
    "null in all of two shapes": ({"text": None, "messages": None}, "has text and messages, wanted only one"),
    "none": (None, "is null, wanted an object"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_row_is_told(name: str) -> None:
    given, told = ODD[name]
    with pytest.raises(RowFault) as caught:
        read_row(given)
    assert told in str(caught.value)
    assert check_content(given) == str(caught.value)


COLUMNS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "question and answer": (
        "prompt=question,completion=answer",
        {"question": "a", "answer": "b"},
        {"prompt": "a", "completion": "b"},
    ),
    "one of two": (
        "completion=chosen",
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "completion": "b"},
    ),
    "one of two shapes": ("text=text", {"text": "a", "instruction": "b", "output": "c"}, {"text": "a"}),
    "messages": ("messages=dialogue", {"dialogue": TALK["messages"], "text": "x"}, TALK),
    "role and content": (
        "messages=turns,role=speaker,content=says",
        {"turns": [{"speaker": "user", "says": "hi"}, {"speaker": "bot", "says": "ho"}]},
        TALK,
    ),
    "dolly": (
        "input=context,output=response",
        {"instruction": "Add.", "context": "1 1", "response": "2"},
        {"prompt": INSTRUCTED_WITH_INPUT, "completion": "2"},
    ),
    "alpaca as a pair": (
        "prompt=instruction,completion=output",
        {"instruction": "a", "input": "", "output": "b"},
        {"prompt": "a", "completion": "b"},
    ),
    "swapped": (
        "prompt=completion,completion=prompt",
        {"prompt": "a", "completion": "b"},
        {"prompt": "b", "completion": "a"},
    ),
    "spaces in a name": ("text=full text", {"full text": "a"}, {"text": "a"}),
    "equals in a name": ("text=a=b", {"a=b": "c"}, {"text": "c"}),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_are_read_as_one_says(name: str) -> None:
    texts, given, plain = COLUMNS[name]
    assert read_row(given, parse_columns(texts.split(","))).content == plain


@pytest.mark.parametrize(
    ("texts", "given", "told"),
    [
        (
            "prompt=question,completion=answer",
            {"question": "a", "text": "b"},
            "has no column answer for completion",
        ),
        ("text=body", {"text": "a"}, "has no column body for text; it has the keys text"),
        ("prompt=question", {"question": "a"}, "needs prompt and completion; it has the keys question"),
        ("prompt=a,completion=b,text=c", {"a": "x", "b": "y", "c": "z"}, "has text and prompt/completion"),
        ("role=speaker", {"messages": TALK["messages"]}, "message 1 has no speaker"),
        (
            "prompt=question,completion=answer",
            {"question": "a", "answer": ["b"]},
            "prompt is a string, wanted a list",
        ),
    ],
)
def test_columns_that_are_not_there_are_told(texts: str, given: Any, told: str) -> None:
    with pytest.raises(RowFault) as caught:
        read_row(given, parse_columns(texts.split(",")))
    assert told in str(caught.value)


def test_what_columns_leave_over_is_told() -> None:
    columns = parse_columns(["prompt=instruction", "completion=output"])
    row = read_row({"instruction": "a", "input": "b", "output": "c"}, columns)
    assert row.unread == ("input",)
    assert read_row({"text": "a", "body": "b"}, {"text": "body"}).unread == ("text",)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["prompt"], "wanted NAME=COLUMN such as prompt=question, got 'prompt'"),
        (["prompt="], "wanted NAME=COLUMN"),
        (["=question"], "nothing is read as ''"),
        (["promt=question"], "did you mean 'prompt'?"),
        (["text=a", "text=b"], "text is read from two columns, a and b"),
    ],
)
def test_columns_that_mean_nothing_are_refused(texts: list[str], told: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_columns(texts)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("row", "guess"),
    [
        ({"question": 1, "answer": 2}, "prompt=question,completion=answer"),
        ({"Instruction": 1, "Response": 2}, "prompt=Instruction,completion=Response"),
        ({"instruction": 1, "response": 2, "context": 3}, "output=response,input=context"),
        ({"input": 1, "output": 2}, "prompt=input,completion=output"),
        ({"dialog": 1}, "messages=dialog"),
        ({"body": 1}, "text=body"),
        ({"Text": 1}, "text=Text"),
        ({"Prompt": 1, "Completion": 1}, "prompt=Prompt,completion=Completion"),
        ({"x": 1}, "prompt=question,completion=answer"),
    ],
)
def test_the_advice_names_the_columns_that_are_there(row: dict[str, Any], guess: str) -> None:
    with pytest.raises(RowFault) as caught:
        read_row(row)
    assert f"--columns {guess} (" in caught.value.fix
