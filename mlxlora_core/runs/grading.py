"""What an answer is worth: where its question stands in the rows, and how much of that row comes back.

A question about a row to train on tests memory; one about a held-out row tests
whether what was learned carries over. The two are counted apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.files.data_path import SPLITS
from mlxlora_core.files.rows import read_rows
from mlxlora_core.training.settings import ChatConfig
from mlxlora_core.values import Tokenizer

#: rows of another kind, in no split: their loss shows what was forgotten
GENERAL = "general"

#: what questions test -> the splits that their rows are in
TESTS: Mapping[str, tuple[str | None, ...]] = {
    "memory": ("train",),
    "held_out": ("valid", "test"),
    "no_row": (None,),
}

_FIRST_SENTENCE = re.compile(r"\s*\S.*?(?:[.!?](?=\s)|(?=\s*\n[^\S\n]*\n)|(?=\s*\Z))", re.DOTALL)


_MUCH = 100  # from this relative change on, per cent are no good measure


@dataclass(frozen=True)
class Expected:
    """What the rows say to a question.

    Attributes:
        split: where the row is.
        text: what it goes on with, as far as the tokenizer can say it.
        told: whether the row's ids begin with those of the question. They do not where the
            question ends inside a token of the row.
    """

    split: str
    text: str
    told: bool = True


def find_expected(
    folder: Path, prompts: Sequence[str], tokenizer: Tokenizer, ask: ChatConfig | None = None
) -> dict[str, Expected]:
    """prompt -> what the rows of a dataset folder go on with, for the prompts that begin one.

    A ``{text}`` row begins with the prompt; of ``{prompt, completion}`` and
    ``{messages}`` rows the (first) prompt is the prompt, which a question asks when
    it has the ids that the row begins with. A prompt that rows go on from in
    different ways has no one answer and is left out.

    Args:
        folder: dataset folder.
        prompts: what is asked.
        tokenizer: of the model that is asked.
        ask: how it is asked; as texts when left out.

    Raises:
        DataError: a split that cannot be read, or a prompt that the tokenizer's form cannot say.
    """
    from mlxlora_core.model.prompts import prompt_ids

    ask = ask or ChatConfig()
    questions = [
        _Question(prompt, tuple(prompt_ids(tokenizer, ask.asked(prompt))), not ask.chat) for prompt in prompts
    ]
    found: dict[str, list[Expected]] = {prompt: [] for prompt in prompts}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        if path.is_file() and path.stat().st_size > 0:
            for _, content in read_rows(path):
                for question, text, told in _continued(content, questions, tokenizer):
                    found[question.prompt].append(Expected(split, text, told))
    return {prompt: rows[0] for prompt, rows in found.items() if len({row.text for row in rows}) == 1}


@dataclass(frozen=True)
class _Question:
    """A prompt, the ids that it is asked with, and whether it is a text to continue."""

    prompt: str
    ids: tuple[int, ...]
    is_text: bool


def _continued(
    content: Mapping[str, Any], questions: Sequence[_Question], tokenizer: Tokenizer
) -> Iterator[tuple[_Question, str, bool]]:
    """(question, what follows it, whether it has the ids in front of that) where a row goes on from it."""
    if "text" in content:
        text: str = content["text"]
        for question in questions:
            if question.is_text and question.prompt and text.startswith(question.prompt):
                ids = tokenizer.encode(text)
                told = tuple(ids[: len(question.ids)]) == question.ids
                rest = "".join(tokenizer.stream(ids[len(question.ids) :]))
                yield question, rest if told else text[len(question.prompt) :], told
    elif "prompt" in content:
        for question in questions:
            if question.is_text and question.prompt == content["prompt"]:
                yield question, _completion(content, tokenizer), True
    else:
        yield from _answered(content["messages"], content.get("tools", ()), questions, tokenizer)


def _completion(content: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """What a model that has learned a row says to its prompt."""
    from mlxlora_core.model.prompts import continued

    return "".join(tokenizer.stream(continued(tokenizer, content["prompt"], content["completion"]).answered))


def _answered(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any],
    questions: Sequence[_Question],
    tokenizer: Tokenizer,
) -> Iterator[tuple[_Question, str, bool]]:
    """The same of a conversation, up to its first answer."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), 0)
    said = messages[first - 1].get("content", "").strip() if first else ""
    likely = [question for question in questions if first and said in question.prompt]
    if not likely:  # rendering every row takes long
        return
    pieces = tokenizer.render(messages[: first + 1], tools)
    asked = tuple(token for piece in pieces if not piece.answer for token in piece.ids)
    answer = tokenizer.decode([token for piece in pieces if piece.answer for token in piece.ids])
    yield from ((question, answer, True) for question in likely if question.ids == asked)


def first_sentence(text: str) -> str:
    """``text`` up to the first ``.``, ``!`` or ``?`` before white space, the first blank line, or its end.

    A name with dots in it ends nothing: the first sentence of `` mlx.nn.ReLU
    Applies the Rectified Linear Unit. …`` ends behind ``Unit.``. White space in
    front belongs to it, white space behind does not.
    """
    match = _FIRST_SENTENCE.match(text)
    return match[0] if match else ""


def grade(prompt: str, text: str, ended: bool, wanted: Expected | None) -> dict[str, Any]:
    """An answer as run.json keeps it.

    Args:
        prompt: the question.
        text: the answer.
        ended: whether the model ended it, rather than the limit on its tokens.
        wanted: what the rows say, if they do.
    """
    answer: dict[str, Any] = {"prompt": prompt, "text": text, "ended": ended}
    if wanted is None:
        return answer | {"split": None, "expected": None, "exact": None, "first_sentence": None}
    return answer | {
        "split": wanted.split,
        "expected": wanted.text,
        "exact": ended and text == wanted.text,
        "first_sentence": first_sentence(text) == first_sentence(wanted.text) != "",
    }


def summarize(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What a run has come to, from the results of its stages ``before`` and ``after``.

    Returns:
        ``losses`` (held-out: split -> nats a counted token ``before``, ``after``,
        and ``change``, relative to before, or None where that is no finite number),
        ``scores`` where there are evaluators (name -> ``rows``, and the mean ``before`` and ``after``) and
        ``questions`` (``memory`` about rows to train on, ``held_out`` about others,
        ``no_row``: how many there are, and how many were answered with the exact
        first sentence and exactly to the end).
    """
    losses = {}
    for split in (split for split in after["losses"] if split in before["losses"]):
        was, now = before["losses"][split]["loss"], after["losses"][split]["loss"]
        losses[split] = {"before": was, "after": now, "change": change(was, now)}
    stages = {"before": before["answers"], "after": after["answers"]}
    questions: dict[str, Any] = {}
    for test, splits in TESTS.items():
        asked = {
            name: [answer for answer in answers if answer["split"] in splits]
            for name, answers in stages.items()
        }
        questions[test] = {"questions": len(asked["after"])}
        if test != "no_row":
            for mark in ("first_sentence", "exact"):
                questions[test][mark] = {
                    name: sum(answer[mark] for answer in answers) for name, answers in asked.items()
                }
    found = {"losses": losses, "questions": questions}
    old, new = before.get("scores", {}), after.get("scores", {})
    scores = {
        name: {"rows": score["rows"], "before": old[name]["score"], "after": score["score"]}
        for name, score in new.items()
        if name in old
    }
    return found | ({"scores": scores} if scores else {})


def change(before: float, after: float) -> float | None:
    """How much a loss has changed, relative to before; None where that is no finite number."""
    relative = after / before - 1 if before else math.inf
    return relative if math.isfinite(relative) else None


def describe_rows(split: str) -> str:
    """Whose loss it is, in words, with a bracket that is still open."""
    return "general loss (rows of another kind" if split == GENERAL else f"held-out loss ({split}"


def describe_change(relative: float | None, form: str = "+.1%") -> str:
    """A relative change in words: per cent, or how many times where that is no good measure."""
    if relative is None:
        return "beyond measure"
    return f"{relative:{form}}" if abs(relative) < _MUCH else f"{relative + 1:.3g} times"
