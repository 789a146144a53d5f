"""Evaluators: exact match, token F1, a regular expression, and a program of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlxlora_core.api import Answer, Evaluator, hookimpl, option

FORMS = ("exact", "space", "words")
_FORM = (
    "what is compared: exact, texts to the letter; space, with white space made one space; words, as SQuAD "
)


@dataclass(frozen=True)
class MatchOptions:
    """How two texts are compared."""

    form: str = option(
        "space", help=f"{_FORM}does, lower case without punctuation and articles", choices=FORMS
    )


@dataclass(frozen=True)
class OverlapOptions:
    """How two texts are divided into words."""

    form: str = option(
        "words", help=f"{_FORM}does, lower case without punctuation and articles", choices=FORMS
    )


@dataclass(frozen=True)
class RegexOptions:
    """What is looked for in an answer."""

    pattern: str = option("", help="regular expression of Python's re, looked for anywhere in the answer")
    compare: bool = option(
        False, help="the last that it finds (its first group, if it has one) must be that in the row too"
    )


@dataclass(frozen=True)
class ProgramOptions:
    """The program that scores."""

    program: str = option(
        "", help="command line without a shell: gets a line of JSON on stdin, prints a number from 0 to 1"
    )
    seconds: float = option(
        10.0, help="time that it may take for an answer", unit="seconds", above=0, maximum=86400
    )


def match(answer: Answer, options: MatchOptions) -> float:
    """See :func:`mlxlora_evaluators.texts.match`."""
    from mlxlora_evaluators.texts import match as matched

    return matched(answer, options)


def overlap(answer: Answer, options: OverlapOptions) -> float:
    """See :func:`mlxlora_evaluators.texts.overlap`."""
    from mlxlora_evaluators.texts import overlap as overlapping

    return overlapping(answer, options)


def find(answer: Answer, options: RegexOptions) -> float:
    """See :func:`mlxlora_evaluators.texts.find`."""
    from mlxlora_evaluators.texts import find as found

    return found(answer, options)


def check_pattern(options: RegexOptions) -> None:
    """See :func:`mlxlora_evaluators.texts.compiled`."""
    from mlxlora_evaluators.texts import compiled

    compiled(options.pattern)


def ask_program(answer: Answer, options: ProgramOptions) -> float:
    """See :func:`mlxlora_evaluators.program.score`."""
    from mlxlora_evaluators.program import score

    return score(answer, options)


def check_program(options: ProgramOptions) -> None:
    """See :func:`mlxlora_evaluators.program.words_of`."""
    from mlxlora_evaluators.program import words_of

    words_of(options.program)


def program_inputs(options: ProgramOptions) -> Mapping[str, str]:
    """See :func:`mlxlora_evaluators.program.inputs`."""
    from mlxlora_evaluators.program import inputs

    return inputs(options.program)


@hookimpl
def mlxlora_evaluators() -> Iterable[Evaluator]:
    """The evaluators of this plugin."""
    return [
        Evaluator(
            name="exact-match",
            summary="1 for the answer that the row says",
            options=MatchOptions,
            score=match,
        ),
        Evaluator(
            name="token-f1",
            summary="how many words the answer and the row have in common, as F1",
            options=OverlapOptions,
            score=overlap,
        ),
        Evaluator(
            name="regex",
            summary="1 for an answer that a regular expression finds something in",
            options=RegexOptions,
            score=find,
            prepare=check_pattern,
        ),
        Evaluator(
            name="command",
            summary="what a program of your own says of an answer",
            options=ProgramOptions,
            score=ask_program,
            prepare=check_program,
            inputs=program_inputs,
        ),
    ]
