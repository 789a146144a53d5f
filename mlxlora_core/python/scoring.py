"""Scores in Python: the answers of a model to test rows, and what evaluators say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxlora_core.errors import UsageError
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.blame import told
from mlxlora_core.python.generation import samplers_of
from mlxlora_core.python.model import Model, checked_seed, parsed
from mlxlora_core.runs.recipe import choose_beside
from mlxlora_core.runs.samplers import (
    ANSWER_SAMPLER,
    check_samplers,
    flat,
    labels,
    names,
    prepare_evaluators,
)
from mlxlora_core.training.events import value_of
from mlxlora_core.training.scoring import Scored, asking, scoring, words_on
from mlxlora_core.training.settings import AnswerConfig
from mlxlora_core.training.sources import Rows, columns_from, read_data
from mlxlora_core.values import Answer


@dataclass(frozen=True)
class Scores:
    """What evaluators say of answers.

    Attributes:
        means: name of each evaluator -> the mean of its scores, from 0 to 1.
        answers: to the rows, in their order, each with its score by each evaluator.
        notes: what there is to tell of rows that were not scored, a line each.
    """

    means: Mapping[str, float]
    answers: tuple[tuple[Answer, Mapping[str, float]], ...]
    notes: tuple[str, ...]


def score(
    model: Model,
    data: Rows,
    evaluator: str | Sequence[str] | Mapping[str, Any],
    *,
    split: str = "test",
    columns: Mapping[str, str] | Sequence[str] = (),
    score_rows: int | None = AnswerConfig().score_rows,
    sampler: str = ANSWER_SAMPLER,
    num_tokens: int = AnswerConfig().num_tokens,
    seed: int = 0,
    **options: Any,
) -> Scores:
    """Let a model, and its adapter where one is on it, answer rows, and evaluators score the answers.

    Args:
        model: to ask.
        data: a dataset folder, a file, rows, or the rows of each split.
        evaluator: one, or several, or with their options as the section ``[evaluator]`` of a recipe has
            them: ``{"use": "regex", "pattern": "#### (.*)"}``.
        split: which split of a folder or of several.
        columns: as for ``train``.
        score_rows: how many rows, at even distances; None is all.
        sampler: by which answers are drawn; or several in a row.
        num_tokens: of an answer at most.
        seed: of each answer.
        options: of the samplers.

    Returns:
        The ``means`` of the scores, and the ``answers`` with theirs.

    Raises:
        UsageError: an option that there is not or that is out of range; no evaluator; adapters that are
            selected for each row of a batch.
        DataError: rows that are not there or that cannot be used, or none that asks anything.
        PluginError: no such evaluator or sampler, or one that breaks its contract.
        DivergedError: the model's logits are not finite.
        ResourceError: too little memory.
    """
    given = {"score_rows": score_rows, "num_tokens": num_tokens}
    config, number = parsed(AnswerConfig, given, "score"), checked_seed(seed, "score")
    if model.has_rows_selected:
        raise UsageError("adapters are selected for each row of a batch", fix="select one, or a mix")
    evaluators, samplers = _evaluators(evaluator, model.registry), samplers_of(model, sampler, options)
    rows = read_data(data, (split,), columns=columns_from(columns))[split]
    with told(model.registry.plugins):
        prepare_evaluators(evaluators)
        check_samplers(samplers)
        asked, notes = asking(rows, config)
        how = {"num_tokens": config.num_tokens, "seed": number}
        work = scoring("", model.base, asked, evaluators, samplers, **how)
        return _by_name(value_of(work), evaluators, (*rows.notes, *notes))


def _by_name(scored: Scored, evaluators: Sequence[Choice], notes: Sequence[str]) -> Scores:
    """Scores under the names of their evaluators."""
    called = labels([choice.component for choice in evaluators])
    answers = ((answer, dict(zip(called, each, strict=True))) for answer, each in scored.answers)
    means = dict(zip(called, scored.means, strict=True))
    return Scores(means, tuple(answers), (*notes, *words_on(scored)))


def _evaluators(given: object, found: Registry) -> tuple[Choice, ...]:
    """The evaluators that an argument names, with their options.

    Raises:
        UsageError: it names none; options that there are not or that are out of range.
        PluginError: no such evaluator.
    """
    values = dict(given) if isinstance(given, Mapping) else {"use": given}
    use = values.pop("use", ())
    texts = [use] if isinstance(use, str) else use
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts) or not texts:
        raise UsageError(
            f"score: evaluator: wanted a name, several, or a mapping with use, got {given!r:.100}",
            fix='name one: score(model, rows, "exact-match")',
        )
    return choose_beside("evaluator", [name for text in texts for name in names(text)], flat(values), found)
