"""The conformance suite of evaluators.

Subclass :class:`EvaluatorSuite` in a test file and run it with pytest::

    class TestMyEvaluator(EvaluatorSuite):
        spec = my_plugin.EVALUATOR
        option_sets = ({}, {"form": "words"})
        bad_options = ({"form": "odd"},)
        known = ((answer("blue", "blue"), {}, 1.0), (answer("red", "blue"), {}, 0.0))
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mlxlora_core.errors import DataError, UsageError
from mlxlora_core.options import parse
from mlxlora_core.plugins import Component, Plugin
from mlxlora_core.plugins.checks import checked_score
from mlxlora_core.specs import Evaluator
from mlxlora_core.values import Answer


def answer(text: str, expected: str, *, prompt: str = "Which colour? ", ended: bool = True) -> Answer:
    """An answer to a ``{prompt, completion}`` row."""
    return Answer(prompt, expected, text, ended, {"prompt": prompt, "completion": expected})


_TALK = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "blue"}]

#: answers that an evaluator may meet, by what is special about them
ANSWERS: Mapping[str, Answer] = {
    "the row's own": answer("blue", "blue"),
    "another": answer("red", "blue"),
    "nothing": answer("", "blue"),
    "nothing wanted": answer("blue", ""),
    "nothing at all": answer("", ""),
    "white space": answer(" \n\t", "blue"),
    "cut at the limit": answer("blue", "blue", ended=False),
    "longer": answer("blue, as the sky is.\nAnd so on.", "blue"),
    "of a conversation": replace(answer("blue", "blue"), row={"messages": _TALK}),
    "other letters": answer("Größe 5 \U0001f600 \u200f\u05d0", "größe 5"),
    "marks of code": answer("```sql\nSELECT * FROM t WHERE a = '%s';\n```", "SELECT 1"),
    "control characters": answer("a\x00b\x1b[0m\r\n", "ab"),
    "half a surrogate pair": answer("\ud83d", "blue"),
    "long": answer("word " * 2000, "word"),
}


class EvaluatorSuite:
    """What every evaluator must do.

    Attributes:
        spec: the evaluator.
        option_sets: option values to try.
        bad_options: option values that must be refused, by the options or by ``prepare``.
        known: (answer, option values, the score that it must get).
    """

    spec: Evaluator
    option_sets: Sequence[Mapping[str, Any]] = ({},)
    bad_options: Sequence[Mapping[str, Any]] = ()
    known: Sequence[tuple[Answer, Mapping[str, Any], float]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try every set of options, and every score that is known."""
        if "options" in metafunc.fixturenames:
            ids = [str(dict(values)) for values in self.option_sets]
            metafunc.parametrize("options", [self.parsed(values) for values in self.option_sets], ids=ids)
        if "bad" in metafunc.fixturenames:
            metafunc.parametrize("bad", self.bad_options, ids=[str(dict(v)) for v in self.bad_options])
        if "example" in metafunc.fixturenames:
            ids = [f"{one.text[:20]!r} for {one.expected[:20]!r}" for one, _, _ in self.known]
            metafunc.parametrize("example", self.known, ids=ids)

    # --- what the tests are made of ---

    def parsed(self, values: Mapping[str, Any]) -> Any:
        """Options made of values."""
        return parse(self.spec.options, values, owner=self.spec.name)

    def score(self, one: Answer, options: Any) -> float:
        """The score of an answer, checked as mlxlora checks it."""
        component = Component("evaluator", self.spec, Plugin("tested", "tested", "", "file", ""))
        return checked_score(component, self.spec.score(one, options))

    def prepare(self, options: Any) -> None:
        """What mlxlora calls before any work."""
        if self.spec.prepare is not None:
            self.spec.prepare(options)

    def outcome(self, one: Answer, options: Any) -> float | None:
        """The score of an answer; None where the row is refused, as one that no answer could be right for."""
        try:
            return self.score(one, options)
        except DataError:
            return None

    # --- the tests ---

    def test_scores_are_numbers_from_0_to_1(self, options: Any) -> None:
        """Whatever a model says, and whatever the row says; or the row is refused, whatever a model says."""
        self.prepare(options)
        for what, one in copy.deepcopy(dict(ANSWERS)).items():
            asked = (one, *(replace(one, text=text) for text in ("", one.expected, "something else")))
            try:
                refused = [self.outcome(each, options) is None for each in asked]
            except Exception as fault:
                pytest.fail(f"{what} ({one.text[:40]!r} for {one.expected[:40]!r}): {fault!r}")
            if len(set(refused)) > 1:
                pytest.fail(
                    f"{what}: the row ({one.expected[:40]!r}) is refused for some answers to it alone"
                )

    def test_a_score_depends_on_the_answer_alone(self, options: Any) -> None:
        """The same answer gets the same score, whatever came before it."""
        self.prepare(options)
        answers = copy.deepcopy([*ANSWERS.items()])
        first = {what: self.outcome(one, options) for what, one in answers}
        again = {what: self.outcome(one, options) for what, one in reversed(answers)}
        assert again == first

    def test_answers_are_left_as_they_are(self, options: Any) -> None:
        """It changes nothing of the row, which other evaluators get too."""
        self.prepare(options)
        for one in ANSWERS.values():
            given = replace(one, row=copy.deepcopy(dict(one.row)))
            self.outcome(given, options)
            assert given == one

    def test_stdout_is_not_its_own(self, options: Any, capfd: pytest.CaptureFixture[str]) -> None:
        """It prints nothing where results go."""
        self.prepare(options)
        self.outcome(copy.deepcopy(ANSWERS["the row's own"]), options)
        assert capfd.readouterr().out == ""

    def test_known_scores(self, example: tuple[Answer, Mapping[str, Any], float]) -> None:
        """Scores that somebody has worked out."""
        one, values, wanted = example
        options = self.parsed(values)
        self.prepare(options)
        assert self.score(one, options) == pytest.approx(wanted, abs=1e-9)

    def test_bad_options_are_refused(self, bad: Mapping[str, Any]) -> None:
        """Before any work, in a sentence."""
        with pytest.raises(UsageError):
            self.prepare(self.parsed(bad))
