"""The conformance suite over every evaluator that is registered, and what it must find."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core import plugins as registry
from mlxlora_core.errors import DataError, UsageError
from mlxlora_core.specs import Evaluator
from mlxlora_core.testing.evaluator import ANSWERS, EvaluatorSuite, answer

EVALUATORS = {c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("evaluator")}


class TestExactMatch(EvaluatorSuite):
    spec = EVALUATORS["exact-match"]
    option_sets = ({}, {"form": "exact"}, {"form": "words"})
    bad_options = ({"form": "odd"},)
    known = (
        (answer("blue", "blue"), {}, 1.0),
        (answer(" blue\n sky ", "blue sky"), {}, 1.0),
        (answer(" blue", "blue"), {"form": "exact"}, 0.0),
        (answer("Blue", "blue"), {}, 0.0),
        (answer("The  Sky, is blue!", "sky is blue"), {"form": "words"}, 1.0),
        (answer("theatre", "atre"), {"form": "words"}, 0.0),
        (answer("blue", "blue", ended=False), {}, 0.0),
    )


class TestTokenF1(EvaluatorSuite):
    spec = EVALUATORS["token-f1"]
    option_sets = ({}, {"form": "space"})
    known = (
        (answer("The cat sat", "a cat sat down"), {}, 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
        (answer("b b b", "b b"), {}, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        (answer("", "the"), {}, 1.0),
        (answer("", "blue"), {}, 0.0),
        (answer("Blue", "blue"), {"form": "space"}, 0.0),
        (answer("blue", "blue", ended=False), {}, 1.0),
    )


class TestRegex(EvaluatorSuite):
    spec = EVALUATORS["regex"]
    option_sets = ({"pattern": "blue"}, {"pattern": r"(\d+)", "compare": True})
    bad_options = ({}, {"pattern": "("}, {"pattern": 3})
    known = (
        (answer("so blue!", "red"), {"pattern": "bl.e"}, 1.0),
        (answer("red", "blue"), {"pattern": "bl.e"}, 0.0),
        (answer("3 and 4, so #### 7", "1 + 6 #### 7"), {"pattern": r"#### (\d+)", "compare": True}, 1.0),
        (answer("#### 7 or #### 8", "#### 7"), {"pattern": r"#### (\d+)", "compare": True}, 0.0),
        (answer("7", "none"), {"pattern": r"\d", "compare": True}, 0.0),
    )


ENDED = """awk '{ print /"ended": true/ }'"""


class TestProgram(EvaluatorSuite):
    spec = EVALUATORS["command"]
    option_sets = ({"program": ENDED, "seconds": 60},)
    bad_options = ({}, {"program": "no-such-program-here"}, {"program": "cat '"}, {"seconds": 0})
    known = (
        (answer("", "", ended=False), option_sets[0], 0.0),
        (answer("", ""), {"program": "echo 0.25"}, 0.25),
    )


def test_every_evaluator_is_tested() -> None:
    assert {value.spec.name for name, value in globals().items() if name.startswith("Test")} == set(
        EVALUATORS
    )


# --- the program of one's own -------------------------------------------------


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("sh -c 'echo no good >&2; exit 3'", "the program 'sh' ended with 3: no good"),
        ("false", "the program 'false' ended with 1: without a word"),
        ("echo 1.5", "the program 'echo' printed '1.5', wanted a number from 0 to 1"),
        ("echo nan", "the program 'echo' printed 'nan', wanted"),
        ("true", "the program 'true' printed '', wanted"),
    ],
)
def test_a_program_that_gives_no_score(program: str, said: str) -> None:
    made = TestProgram()
    with pytest.raises(UsageError) as fault:
        made.score(answer("a", "b"), made.parsed({"program": program}))
    assert str(fault.value).startswith(said)


def test_a_program_that_takes_too_long_ends_with_what_it_has_started(tmp_path: Path) -> None:
    made, child = TestProgram(), tmp_path / "child"
    program = f"sh -c 'sleep 60 & echo $! > {child}; sleep 60'"
    with pytest.raises(UsageError, match=r"took more than 0\.5 s for an answer"):
        made.score(answer("a", "b"), made.parsed({"program": program, "seconds": 0.5}))
    state = Path(f"/proc/{child.read_text().strip()}/stat")
    for _ in range(200):  # a kill takes a moment
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what the program has started is still at work")


# --- numbers ------------------------------------------------------------------


def test_f1_is_that_of_another_program() -> None:
    """Held against the formula as awk reckons it: precision and recall of words."""
    words = ("red", "blue", "a")
    texts = [" ".join(picked) for n in range(4) for picked in itertools.product(words, repeat=n)]
    pairs = [(said, wanted) for said in texts[::3] for wanted in texts[::2]]
    program = (
        '{ split($1, s, " "); split($2, w, " "); delete c; n = m = k = 0; '
        'for (i in w) if (w[i] != "a") { c[w[i]]++; m++ } '
        'for (i in s) if (s[i] != "a") { n++; if (c[s[i]]-- > 0) k++ } '
        "if (n == 0 || m == 0) print (n == m); else if (k == 0) print 0; "
        'else { p = k / n; r = k / m; printf "%.12f\\n", 2 * p * r / (p + r) } }'
    )
    lines = "".join(f"{said}\t{wanted}\n" for said, wanted in pairs)
    done = subprocess.run(
        ["awk", "-F", "\t", program], input=lines, capture_output=True, text=True, check=True
    )
    made = TestTokenF1()
    options = made.parsed({})
    assert [made.score(answer(*pair), options) for pair in pairs] == pytest.approx(
        [float(line) for line in done.stdout.split()], abs=1e-9
    )


# --- what the suite must find -------------------------------------------------


class Suite(EvaluatorSuite):
    """The suite as a tool, for evaluators that are broken on purpose."""

    __test__ = False


def suite(score: Any) -> Suite:
    made = Suite()
    made.spec = Evaluator(name="bad", summary="s", score=score)
    return made


def test_faults_are_found(capfd: pytest.CaptureFixture[str]) -> None:
    for score in (lambda one, _: len(one.text), lambda one, _: None, lambda one, _: one.text[0] == "b"):
        with pytest.raises(pytest.fail.Exception):
            suite(score).test_scores_are_numbers_from_0_to_1(None)
    count = itertools.count()
    with pytest.raises(AssertionError):
        suite(lambda one, _: next(count) % 2).test_a_score_depends_on_the_answer_alone(None)
    with pytest.raises(AssertionError):
        suite(lambda one, _: one.row.clear() or 1).test_answers_are_left_as_they_are(None)
    with pytest.raises(AssertionError):
        suite(lambda one, _: print(one) or 1).test_stdout_is_not_its_own(None, capfd)  # noqa: T201 - the fault
    with pytest.raises(AssertionError):
        suite(lambda one, _: 1).test_known_scores((answer("red", "blue"), {}, 0.0))
    with pytest.raises(pytest.fail.Exception):
        suite(lambda one, _: 1).test_bad_options_are_refused({})


def test_a_row_may_be_refused_but_not_for_what_is_answered() -> None:
    def refuse_rows(one: Any, _: Any) -> float:
        if one.expected != "blue":
            raise DataError("no colour")
        return one.text == "blue"

    def refuse_answers(one: Any, _: Any) -> float:
        if one.text != "blue":
            raise DataError("no colour")
        return 1

    made = suite(refuse_rows)
    made.test_scores_are_numbers_from_0_to_1(None)
    made.test_a_score_depends_on_the_answer_alone(None)
    made.test_answers_are_left_as_they_are(None)
    with pytest.raises(pytest.fail.Exception, match="is refused for some answers"):
        suite(refuse_answers).test_scores_are_numbers_from_0_to_1(None)


def test_answers_of_the_suite_are_of_both_shapes() -> None:
    assert {("prompt" in one.row, "messages" in one.row) for one in ANSWERS.values()} == {
        (True, False),
        (False, True),
    }
    json.dumps([one.row for one in ANSWERS.values()])
