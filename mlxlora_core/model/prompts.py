"""What a model is asked, in token ids: the same for training and for generation.

A prompt is a text, or a conversation that waits for an answer. It has the ids that
it has alone, whatever follows: a tokenizer that would join the end of a prompt and
the beginning of its completion in one token (``"A: "`` and ``"blue"``) gets the two
apart, since the completion is not there yet when the prompt is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxlora_core.values import Tokenizer

#: a text, or ``{"role": …, "content": …}`` messages of which the last one waits for an answer
Prompt = str | Sequence[Mapping[str, Any]]

# What a completion is put behind, to see which ids it has where it does not begin a text.
_BEFORE = ("\n", "x", ".", "0", "\u00e9", "A: ")


@dataclass(frozen=True)
class Continued:
    """A prompt and what follows it.

    Attributes:
        asked: the ids of the prompt, as :func:`prompt_ids` gives them.
        answered: the ids behind them, an end id included.
        apart: whether the tokenizer would have joined the two.
    """

    asked: list[int]
    answered: list[int]
    apart: bool


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The ids of what a model is asked, begin id in front.

    Raises:
        DataError: half a surrogate pair, or a conversation that the tokenizer's form cannot say.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return [token for piece in tokenizer.render(prompt) for token in piece.ids]


def chat_prompt(question: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of one question, behind a system message where there is one."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": question}]


def continued(tokenizer: Tokenizer, prompt: str, completion: str) -> Continued:
    """The ids of a prompt and of the completion behind it, end id included.

    Where the prompt keeps its ids in front of the completion, both are encoded as
    one text, as they would be read.

    Raises:
        DataError: half a surrogate pair.
    """
    asked = prompt_ids(tokenizer, prompt)
    whole = tokenizer.encode(prompt + completion, eos=True)
    if whole[: len(asked)] == asked:
        return Continued(asked, whole[len(asked) :], apart=False)
    wanted = (prompt + completion, tokenizer.decode(whole))
    found = list(_behind_others(tokenizer, completion))
    right = (ids for ids in found if tokenizer.decode([*asked, *ids]) in wanted)
    return Continued(asked, next(right, found[0]), apart=True)


def _behind_others(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """Ids that a text may have behind others, end id included; last those of a text of its own."""
    for before in _BEFORE:
        ids = tokenizer.encode(before, bos=False)
        both = tokenizer.encode(before + text, bos=False, eos=True)
        if both[: len(ids)] == ids:
            yield both[len(ids) :]
    yield tokenizer.encode(text, bos=False, eos=True)
