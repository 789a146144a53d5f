"""What an evaluator is told: an answer of a model, and what the row says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a model says to a test row, for evaluators.

    Attributes:
        prompt: what was asked: the prompt of a ``{prompt, completion}`` row, or the last that was
            said before the answer in a ``{messages}`` row.
        expected: what the row says, as the tokenizer can say it: what a model that has learned
            the row answers to the letter.
        text: what the model says.
        ended: whether the model ended it, rather than the limit on its tokens.
        row: the row, in one of the two shapes.
    """

    prompt: str
    expected: str
    text: str
    ended: bool
    row: Mapping[str, Any]
