"""``model [+ adapter] -> answers to the test rows -> what evaluators say of them``.

A row is asked as it is trained on: with the ids that stand before its (last) answer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlxlora_core.errors import DataError
from mlxlora_core.plugins import Choice
from mlxlora_core.plugins.checks import checked_score
from mlxlora_core.training.events import Advanced
from mlxlora_core.training.settings import ScoreConfig
from mlxlora_core.training.sources import SplitRows
from mlxlora_core.values import Answer, Tokenizer

if TYPE_CHECKING:
    from mlxlora_core.model.loading import Model


@dataclass(frozen=True)
class Question:
    """What a test row asks, and what it says to that.

    Attributes:
        ids: that the model is asked with.
        prompt: the same in words, as :class:`~mlxlora_core.api.Answer` has it.
        expected: as there.
        row: as there.
    """

    ids: tuple[int, ...]
    prompt: str
    expected: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Scored:
    """What came of it.

    Attributes:
        answers: to the rows, each with the score that each evaluator has given it, in their order.
        too_long: how many more rows there were whose prompt does not fit into the context of the model.
        empty: how many whose prompt is empty, where texts of the model have no begin token.
    """

    answers: tuple[tuple[Answer, tuple[float, ...]], ...]
    too_long: int = 0
    empty: int = 0

    @property
    def rows(self) -> int:
        """How many were scored."""
        return len(self.answers)

    @property
    def means(self) -> tuple[float, ...]:
        """Of each evaluator: the mean of its scores over the rows."""
        columns = zip(*(scores for _, scores in self.answers), strict=True)
        return tuple(math.fsum(column) / self.rows for column in columns)


def asking(rows: SplitRows, config: ScoreConfig) -> tuple[list[tuple[str, Mapping[str, Any]]], list[str]]:
    """The rows that ask something, as many as are wanted, and what there is to tell of the others.

    Light, so that it is known before a model is loaded.

    Args:
        rows: of the test set.
        config: how many of them are wanted; these stand at even distances.

    Returns:
        (place, content) of each, and words.

    Raises:
        DataError: none asks anything.
    """
    all_rows = list(rows.rows)
    found = [(place, row) for place, row in all_rows if _asks(row)]
    if not found:
        raise DataError(
            f"no row of {len(all_rows)} asks anything, so that there is no answer to score",
            where=rows.name,
            fix="use {prompt, completion} or {messages} rows, or name no evaluator",
        )
    left_out = len(all_rows) - len(found)
    words = [f"warning: {left_out} of {len(all_rows)} test rows ask nothing and are not scored"]
    count = min(config.score_rows or len(found), len(found))
    chosen = [found[i * len(found) // count] for i in range(count)]
    return chosen, words if left_out else []


def scoring(
    what: str,
    model: Model,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    evaluators: Sequence[Choice],
    samplers: Sequence[Choice],
    *,
    num_tokens: int,
    seed: int,
) -> Generator[Advanced, None, Scored]:
    """The scores of a model, as the value of the generator; how far it is after each answer, in their order.

    Rows are answered many at once; what each gets is what it gets alone.

    Args:
        what: what the events call it.
        model: whose answers are scored.
        rows: as :func:`asking` gives them.
        evaluators: with their options, one at least.
        samplers: by which answers are drawn, with their options.
        num_tokens: of an answer at most.
        seed: of each answer.

    Raises:
        DataError: a row that the tokenizer's form cannot say, or none that fits into the model's context.
        PluginError: an evaluator, or a sampler, gives what it should not.
        MlxloraError: as generating and evaluators raise.
    """
    from mlxlora_core.model.generate import STOP
    from mlxlora_core.serving.together import follow_all

    asked = _Asked(rows, model)
    answers: list[tuple[Answer, tuple[float, ...]]] = []
    number = 0
    for said in follow_all(
        *(model.language_model, model.tokenizer, asked.prompts()),
        [(sampler.component, sampler.options) for sampler in samplers],
        num_tokens=num_tokens,
        seed=seed,
    ):
        number, question = asked.waiting.popleft()
        answer = Answer(question.prompt, question.expected, said.text, said.finish == STOP, question.row)
        answers.append((answer, tuple(_score(evaluator, answer) for evaluator in evaluators)))
        yield Advanced(what, number, len(rows))
    if number < len(rows):
        yield Advanced(what, len(rows), len(rows))
    if not answers:
        fits = "has a token and fits" if asked.empty else "fits"
        raise DataError(f"none of the {len(rows)} prompts of test rows {fits} into the context of the model")
    return Scored(tuple(answers), asked.too_long, asked.empty)


def question_of(row: Mapping[str, Any], tokenizer: Tokenizer, place: str) -> Question:
    """What a row asks: a ``{prompt, completion}`` row, or one of messages with something before its answer.

    Raises:
        DataError: the tokenizer's form cannot say it.
    """
    from mlxlora_core.model.prompts import continued, prompt_ids

    try:
        if "prompt" in row:
            both = continued(tokenizer, row["prompt"], row["completion"])
            asked, answered, prompt = both.asked, both.answered, row["prompt"]
        else:
            messages, tools = row["messages"], row.get("tools", ())
            asked = prompt_ids(tokenizer, messages[:-1], tools)
            answered = list(tokenizer.render(messages, tools)[-1].ids)
            prompt = messages[-2].get("content") or ""
    except DataError as fault:
        raise DataError(fault.what, where=fault.where or place, fix=fault.fix) from fault
    return Question(tuple(asked), prompt, "".join(tokenizer.stream(answered)), row)


def words_on(scored: Scored) -> Iterator[str]:
    """What there is to tell of the rows that were not scored."""
    count = scored.rows + scored.too_long + scored.empty
    of = f"of {count} prompts of test rows"
    if scored.too_long:
        yield (f"warning: {scored.too_long} {of} do not fit into the context of the model and are not scored")
    if scored.empty:
        yield f"warning: {scored.empty} {of} are empty, where this model needs a token, and are not scored"


def _asks(row: Mapping[str, Any]) -> bool:
    return "prompt" in row or len(row.get("messages", ())) > 1


class _Asked:
    """What rows ask a model, as far as it was asked.

    Attributes:
        waiting: number and question of each row that is not answered yet.
        too_long: as of :class:`Scored`.
        empty: as there.
    """

    def __init__(self, rows: Sequence[tuple[str, Mapping[str, Any]]], model: Model) -> None:
        self._rows, self._model = rows, model
        self.waiting: deque[tuple[int, Question]] = deque()
        self.too_long = self.empty = 0

    def prompts(self) -> Iterator[tuple[int, ...]]:
        """The ids of each question that the model can be asked."""
        for number, (place, row) in enumerate(self._rows, start=1):
            question = question_of(row, self._model.tokenizer, place)
            if not question.ids:
                self.empty += 1
            elif not _fits(question, self._model):
                self.too_long += 1
            else:
                self.waiting.append((number, question))
                yield question.ids


def _fits(question: Question, model: Model) -> bool:
    """Whether the context of a model has room for a question and a token of its answer."""
    from mlxlora_core.model.generate import PromptTooLong, require_fit

    try:
        require_fit(model.language_model, len(question.ids))
    except PromptTooLong:
        return False
    return True


def _score(evaluator: Choice, answer: Answer) -> float:
    own = replace(answer, row=deepcopy(answer.row))  # what one does to it is nothing to the others
    score = evaluator.component.spec.score(own, evaluator.options)
    return checked_score(evaluator.component, score)
