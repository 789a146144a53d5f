"""Two texts compared: to the letter, word by word, or by what a regular expression finds in them."""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import lru_cache

from mlxlora_core.api import Answer, UsageError
from mlxlora_evaluators import MatchOptions, OverlapOptions, RegexOptions

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def in_form(text: str, form: str) -> str:
    """A text as it is compared.

    ``words`` is what the evaluation script of SQuAD 1.1 does (Rajpurkar et al. 2016): lower
    case, then without ASCII punctuation, then without articles, then white space made one.
    """
    if form == "exact":
        return text
    if form == "words":
        text = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(text.split())


def match(answer: Answer, options: MatchOptions) -> float:
    """1 where the model ended the answer, and it is what the row says."""
    same = in_form(answer.text, options.form) == in_form(answer.expected, options.form)
    return float(answer.ended and same)


def overlap(answer: Answer, options: OverlapOptions) -> float:
    """F1 of the words of the answer against those of the row, each as often as it comes (SQuAD 1.1).

    Two texts without words are the same; a text without words has nothing in common with one that has some.
    """
    said, wanted = (in_form(text, options.form).split() for text in (answer.text, answer.expected))
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def find(answer: Answer, options: RegexOptions) -> float:
    """1 where the pattern finds something in the answer, and, to compare, the same as in what the row says.

    A row in which it finds nothing has no answer that is the same.
    """
    pattern = compiled(options.pattern)
    if not options.compare:
        return float(pattern.search(answer.text) is not None)
    said, wanted = (_last(pattern, text) for text in (answer.text, answer.expected))
    return float(said is not None and said == wanted)


@lru_cache
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern to look for.

    Raises:
        UsageError: it is empty, or no regular expression.
    """
    if not pattern:
        raise UsageError("the evaluator regex has no pattern", fix="--set evaluator.pattern=REGEX")
    try:
        return re.compile(pattern)
    except re.error as fault:
        raise UsageError(f"{pattern!r} is no regular expression: {fault}") from fault


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    """The last that a pattern finds in a text: its first group where it has one."""
    found = list(pattern.finditer(text))
    return found[-1][1 if pattern.groups else 0] if found else None
