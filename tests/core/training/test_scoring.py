"""What test rows ask, which of them are scored, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core import plugins
from mlxlora_core.errors import DataError
from mlxlora_core.model.loading import Model, load
from mlxlora_core.model.prompts import prompt_ids
from mlxlora_core.plugins import Choice, Component, Plugin
from mlxlora_core.specs import Evaluator, NoOptions
from mlxlora_core.training.events import Advanced
from mlxlora_core.training.scoring import Scored, asking, question_of, scoring, words_on
from mlxlora_core.training.settings import ScoreConfig
from mlxlora_core.training.sources import read_data
from mlxlora_core.values import Answer

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What does a layer do?"},
    {"role": "assistant", "content": "It scales."},
    {"role": "user", "content": "And an optimizer?"},
    {"role": "assistant", "content": "It applies a gradient."},
]


@pytest.fixture(scope="module")
def registry() -> plugins.Registry:
    return plugins.load(environ={plugins.ALLOW_LIST: ""})


@pytest.fixture(scope="module")
def model(tiny_model: Path, registry: plugins.Registry) -> Model:
    return load(tiny_model, registry)


def rows_of(*rows: dict[str, Any]) -> Any:
    return read_data(rows, ("test",))["test"]


def evaluator(score: Callable[[Answer], float]) -> Choice:
    spec = Evaluator(name="tested", summary="s", score=lambda answer, options: score(answer))
    return Choice(Component("evaluator", spec, Plugin("t", "t", "1", "file", "t")), NoOptions())


def scored(model: Model, registry: plugins.Registry, rows: Any, *evaluators: Choice) -> Scored:
    greedy = Choice(registry.find("sampler", "greedy"), NoOptions())
    work = scoring("rows", model, rows, evaluators, [greedy], num_tokens=3, seed=0)
    told = []
    while True:
        try:
            told.append(next(work))
        except StopIteration as end:
            result: Scored = end.value
            assert told[-1] == Advanced("rows", len(rows), len(rows)) and len(told) >= result.rows
            assert [event.done for event in told] == sorted({event.done for event in told})
            return result


def test_a_conversation_is_asked_up_to_its_last_answer(model: Model) -> None:
    question = question_of({"messages": TALK}, model.tokenizer, "here")
    assert list(question.ids) == prompt_ids(model.tokenizer, TALK[:-1])
    assert question.prompt == "And an optimizer?"
    assert question.expected.strip() == "It applies a gradient."
    assert question.row == {"messages": TALK}


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("A layer", " scales."), ("A: ", "it keeps the mask"), ("x", "\n\nGröße \U0001f600")],
)
def test_a_prompt_is_asked_as_it_stands_and_the_completion_expected(
    model: Model, prompt: str, completion: str
) -> None:
    question = question_of({"prompt": prompt, "completion": completion}, model.tokenizer, "here")
    assert list(question.ids) == prompt_ids(model.tokenizer, prompt)
    assert (question.prompt, question.expected) == (prompt, completion)


def test_a_row_that_the_form_cannot_say_is_told_with_its_place(model: Model) -> None:
    odd = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, *TALK[-1:]]
    with pytest.raises(DataError) as fault:
        question_of({"messages": odd}, model.tokenizer, "rows.jsonl:3")
    assert "rows.jsonl:3" in str(fault.value)


def test_rows_that_ask_something_at_even_distances() -> None:
    texts = [{"text": "a"}, {"messages": TALK[-1:]}]
    pairs = [{"prompt": str(n), "completion": "c"} for n in range(10)]
    rows = rows_of(*texts, *pairs, {"messages": TALK})
    found, words = asking(rows, ScoreConfig())
    assert [row for _, row in found] == [*pairs, {"messages": TALK}]
    assert words == ["warning: 2 of 13 test rows ask nothing and are not scored"]
    assert [place for place, _ in found][:2] == ["test row 3", "test row 4"]
    for count, wanted in ((1, "0"), (4, "0258"), (11, "0123456789"), (99, "0123456789")):
        few, _ = asking(rows, ScoreConfig(score_rows=count))
        assert "".join(row.get("prompt", "") for _, row in few) == wanted
    assert asking(rows_of(*pairs), ScoreConfig())[1] == []
    with pytest.raises(DataError, match="no row of 2 asks anything"):
        asking(rows_of(*texts), ScoreConfig())


def test_means_over_the_rows(model: Model, registry: plugins.Registry) -> None:
    rows, _ = asking(rows_of(*({"prompt": "ab"[n % 2], "completion": "c"} for n in range(3))), ScoreConfig())
    told: list[Answer] = []
    keep = evaluator(lambda answer: told.append(answer) or 0.1)
    result = scored(model, registry, rows, keep, evaluator(lambda answer: answer.prompt == "b"))
    assert result.means == pytest.approx((0.1, 1 / 3), abs=1e-15) and result.rows == 3
    assert [scores for _, scores in result.answers] == [(0.1, 0.0), (0.1, 1.0), (0.1, 0.0)]
    assert [answer for answer, _ in result.answers] == told
    assert [answer.prompt for answer in told] == ["a", "b", "a"] and told[0] == told[2]
    assert list(words_on(result)) == []


def test_what_an_evaluator_does_to_a_row_is_nothing_to_the_others(
    model: Model, registry: plugins.Registry
) -> None:
    rows, _ = asking(rows_of({"messages": TALK}), ScoreConfig())

    def spoil(answer: Answer) -> float:
        held: Any = answer.row
        held["messages"].clear()
        return 0.0

    seen = evaluator(lambda answer: answer.row == {"messages": TALK})
    assert scored(model, registry, rows, evaluator(spoil), seen).means == (0.0, 1.0)


def test_prompts_that_do_not_fit_are_left_out_and_counted(
    model: Model, registry: plugins.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.language_model, "context_tokens", 12)
    long = {"prompt": "word " * 50, "completion": "c"}
    rows, _ = asking(rows_of({"prompt": "a", "completion": "c"}, long), ScoreConfig())
    result = scored(model, registry, rows, evaluator(lambda answer: answer.prompt == "a"))
    assert (result.means, result.rows, result.too_long) == ((1.0,), 1, 1)
    (words,) = words_on(result)
    assert words.startswith("warning: 1 of 2 prompts of test rows do not fit into the context of the model")
    with pytest.raises(DataError, match="none of the 1 prompts of test rows fits into"):
        scored(model, registry, rows[1:], evaluator(lambda answer: 1))


def test_empty_prompts_are_left_out_where_no_token_begins_a_text(
    model: Model, registry: plugins.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = asking(rows_of(*({"prompt": p, "completion": "c"} for p in ("", "a"))), ScoreConfig())
    assert scored(model, registry, rows, evaluator(lambda answer: 1)).rows == 2, "the begin token is one"
    encode = model.tokenizer.encode

    def without_begin(text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        return encode(text, bos=False, eos=eos)

    monkeypatch.setattr(model.tokenizer, "encode", without_begin)
    result = scored(model, registry, rows, evaluator(lambda answer: answer.prompt == "a"))
    assert (result.means, result.rows, result.too_long, result.empty) == ((1.0,), 1, 0, 1)
    (words,) = words_on(result)
    assert words.startswith("warning: 1 of 2 prompts of test rows are empty")
    with pytest.raises(DataError, match="none of the 1 prompts of test rows has a token and fits"):
        scored(model, registry, rows[:1], evaluator(lambda answer: 1))
