"""Answers know where their question stands and how much of the row came back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.runs.grading import Expected, find_expected, first_sentence, grade, summarize
from mlxlora_core.training.settings import ChatConfig

RELU = " mlx.nn.ReLU Applies the Rectified Linear Unit.\n\nSimply ``mx.maximum(x, 0)``."


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (RELU, " mlx.nn.ReLU Applies the Rectified Linear Unit."),
        (" a.b.c Does it. And more.", " a.b.c Does it."),
        (" a.b.c Does it.\nAnd more.", " a.b.c Does it."),
        (" a.b.c Does it", " a.b.c Does it"),
        (" a.b.c Does it.", " a.b.c Does it."),
        (" a.b.c Does it  \n", " a.b.c Does it"),
        (" Heading\n\nText. More.", " Heading"),
        (" Heading\n  \nText.", " Heading"),
        (" one line\nand the next. More", " one line\nand the next."),
        ("\n\n Late. More.", "\n\n Late."),
        (" Is it? Yes.", " Is it?"),
        (" version 0.32.1 of it. More", " version 0.32.1 of it."),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_the_first_sentence_ends_where_it_says(text: str, first: str) -> None:
    assert first_sentence(text) == first


def write(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_question_is_found_in_rows_of_every_shape(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
    data = write(
        tmp_path / "data",
        train=[{"text": "Q: one\nA: 1 and on"}, {"prompt": "Q: two\nA:", "completion": " 2"}],
        valid=[{"messages": chat}],
        test=[{"text": "Q: three\nA: 3"}],
    )
    prompts = ["Q: one\nA:", "Q: two\nA:", "[INST] Hi? [/INST]", "Q: three\nA:", "Q: two", "Q: four\nA:", ""]
    assert find_expected(data, prompts, tokenizer) == {
        "Q: one\nA:": Expected("train", " 1 and on"),
        "Q: two\nA:": Expected("train", " 2"),
        "[INST] Hi? [/INST]": Expected("valid", " Ho."),
        "Q: three\nA:": Expected("test", " 3"),
    }


def test_a_question_is_found_by_what_a_conversation_begins_with(
    tmp_path: Path, tokenizer: CheckedTokenizer
) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    said = ("Be brief.", " Hi? ", "Ho.", "Why?", "So.")
    row = {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]}
    data = write(tmp_path / "data", test=[row])
    asked = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi?  [/INST]"
    others = ["Hi?", "[INST] Hi? [/INST]", "[INST] Why? [/INST]", asked + " Ho.", ""]
    assert find_expected(data, [asked, *others], tokenizer) == {asked: Expected("test", " Ho.")}


def test_a_question_that_ends_inside_a_token_of_its_row_was_not_told(
    tmp_path: Path, tokenizer: CheckedTokenizer
) -> None:
    """Of a text; prompts of rows have their own ids, white space at the end included."""
    rows = [{"text": "Q: one\nA: the mask"}, {"prompt": "Q: two\nA: ", "completion": "the mask"}]
    data = write(tmp_path / "data", train=rows)
    assert find_expected(data, ["Q: one\nA: ", "Q: one\nA:", "Q: two\nA: "], tokenizer) == {
        "Q: one\nA: ": Expected("train", "the mask", told=False),
        "Q: one\nA:": Expected("train", " the mask"),
        "Q: two\nA: ": Expected("train", "the mask"),
    }


def test_a_question_in_a_chat_is_found_in_conversations_alone(
    tmp_path: Path, tokenizer: CheckedTokenizer
) -> None:
    said = ({"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."})
    system = {"role": "system", "content": "Be brief."}
    data = write(
        tmp_path / "data",
        train=[{"messages": [*said]}, {"text": "Hi? Ho."}, {"prompt": "Hi?", "completion": " Ha."}],
        valid=[{"messages": [system, *said]}],
    )
    assert find_expected(data, ["Hi?"], tokenizer, ChatConfig(chat=True)) == {
        "Hi?": Expected("train", " Ho.")
    }
    briefly = ChatConfig(chat=True, system="Be brief.")
    assert find_expected(data, ["Hi?"], tokenizer, briefly) == {"Hi?": Expected("valid", " Ho.")}


def test_a_prompt_with_more_than_one_answer_has_none(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    data = write(tmp_path / "data", train=[{"text": "Q: a"}, {"text": "Q: b"}], valid=[])
    assert find_expected(data, ["Q:", "Q: a"], tokenizer) == {"Q: a": Expected("train", "")}


def test_a_row_that_is_in_two_splits_counts_as_one_to_train_on(
    tmp_path: Path, tokenizer: CheckedTokenizer
) -> None:
    data = write(tmp_path / "data", test=[{"text": "Q: a"}], train=[{"text": "Q: a"}])
    assert find_expected(data, ["Q:"], tokenizer) == {"Q:": Expected("train", " a")}


@pytest.mark.parametrize(
    ("text", "ended", "exact", "sentence"),
    [
        (RELU, True, True, True),
        (RELU, False, False, True),  # by chance the limit came where the row ends
        (RELU + " More.", True, False, True),
        (" mlx.nn.ReLU Applies the Rectified Linear Unit.", True, False, True),
        (" mlx.nn.ReLU Applies the Rectified Linear Unit", True, False, False),
        (" mlx.nn.ReLU Applies the Rectified Linear Unit.x", True, False, False),
        ("mlx.nn.ReLU Applies the Rectified Linear Unit.", True, False, False),
        (" mlx.nn.relu Applies the Rectified Linear Unit.", True, False, False),
        ("", True, False, False),
    ],
)
def test_what_counts_as_exact(text: str, ended: bool, exact: bool, sentence: bool) -> None:
    answer = grade("Q", text, ended, Expected("train", RELU))
    assert (answer["exact"], answer["first_sentence"]) == (exact, sentence)
    assert (answer["split"], answer["expected"], answer["ended"]) == ("train", RELU, ended)


def test_no_row_no_judgement() -> None:
    answer = grade("Q", RELU, True, None)
    assert answer == {
        "prompt": "Q",
        "text": RELU,
        "ended": True,
        "split": None,
        "expected": None,
        "exact": None,
        "first_sentence": None,
    }


def test_an_empty_row_is_no_sentence_that_came_back() -> None:
    answer = grade("Q", "", True, Expected("train", ""))
    assert answer["exact"] and not answer["first_sentence"]


def test_memory_and_held_out_rows_are_counted_apart() -> None:
    splits = ["train", "train", "train", "valid", "test", None]
    wanted = [Expected(split, " So. And so.") if split else None for split in splits]

    def result(loss: float, *texts: str) -> dict[str, Any]:
        answers = [grade("Q", text, True, one) for text, one in zip(texts, wanted, strict=True)]
        return {"losses": {"test": {"loss": loss}}, "answers": answers}

    before = result(4.0, " No.", " So.", " No.", " No.", " No.", " No.")
    after = result(3.0, " So. And so.", " So.", " No.", " So. And so.", " No.", " No.")
    assert summarize(before, after) == {
        "losses": {"test": {"before": 4.0, "after": 3.0, "change": -0.25}},
        "questions": {
            "memory": {
                "questions": 3,
                "first_sentence": {"before": 1, "after": 2},
                "exact": {"before": 0, "after": 1},
            },
            "held_out": {
                "questions": 2,
                "first_sentence": {"before": 0, "after": 1},
                "exact": {"before": 0, "after": 1},
            },
            "no_row": {"questions": 1},
        },
    }
