"""``encode -> prefill -> (decode one -> draw)* -> text``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import DataError, UsageError
from mlxlora_core.model.drawing import Drawing
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.prompts import Prompt, prompt_ids
from mlxlora_core.plugins import Component
from mlxlora_core.values import Cache, Tokenizer

PREFILL_TOKENS = 512

#: what ended a text: an end token, or the limit on its tokens
STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Segment:
    """A part of a generated text.

    Attributes:
        text: it; of the last one nothing.
        finish: what ended the text, ``stop`` (an end token) or ``length`` (as many
            tokens as were asked for, or a full context); None while it goes on.
    """

    text: str
    finish: str | None = None


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Prompt,
    samplers: Iterable[tuple[Component, Any]],
    *,
    num_tokens: int,
    seed: int,
    write_every: int = 1,
) -> Iterator[Segment]:
    """The text that follows ``prompt``; the same seed gives the same text, however long.

    Args:
        model: in whatever state; it is put in evaluation mode.
        tokenizer: of the model.
        prompt: text, with a begin token put in front, or messages in the form of the tokenizer.
        samplers: (component, its options) of each, in the order in which they
            change the logits.
        num_tokens: how many at most; an end token or a full context stops earlier.
        seed: of the random keys, from 0 to 2**32 - 1.
        write_every: tokens a segment.

    Raises:
        UsageError: the prompt is no valid text, is none in the form of the tokenizer, has no token, or
            does not fit into the model's context.
        PluginError: a sampler gives what it should not.
        DivergedError: the logits of the model are not finite.
    """
    try:
        ids = prompt_ids(tokenizer, prompt)
    except DataError as fault:
        raise UsageError(f"the prompt cannot be read: {fault.what}", fix=fault.fix) from fault
    if not ids:
        raise UsageError(
            "the prompt is empty, and texts of this model have no begin token", fix="give a prompt"
        )
    limit = model.context_tokens
    if limit is not None and len(ids) >= limit:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, the model's context holds {limit}", fix="shorten the prompt"
        )
    if limit is not None:
        num_tokens = min(num_tokens, limit - len(ids))
    tokens = decode(model, ids, Drawing(samplers, seed), num_tokens=num_tokens, stops=tokenizer.stops)
    return _segments(tokenizer, tokens, num_tokens, write_every)


def _segments(tokenizer: Tokenizer, tokens: Iterator[int], num_tokens: int, every: int) -> Iterator[Segment]:
    told = 0
    faults: list[Exception] = []

    def counted() -> Iterator[int]:
        nonlocal told
        try:
            for token in tokens:
                told += 1
                yield token
        except Exception as fault:  # not through the tokenizer, which has no part in it
            faults.append(fault)

    yield from map(Segment, tokenizer.stream(counted(), every))
    if faults:
        raise faults[0]
    yield Segment("", STOP if told < num_tokens else LENGTH)


def whole(segments: Iterable[Segment]) -> Segment:
    """All that :func:`generate` gives, as one segment."""
    parts = list(segments)
    return Segment("".join(part.text for part in parts), parts[-1].finish)


def decode(
    model: LanguageModel,
    prompt: Sequence[int],
    draw: Callable[[mx.array, Sequence[int]], int],
    *,
    num_tokens: int,
    stops: Collection[int],
) -> Iterator[int]:
    """Token ids that follow the ids ``prompt``, up to ``num_tokens`` or one of ``stops``.

    Args:
        model: in whatever state; it is put in evaluation mode.
        prompt: one id at least.
        draw: the id that follows, from logits (1, V) in float32 and all ids before it.
        num_tokens: how many at most.
        stops: ids that end the text, and do not come.
    """
    model.eval()
    cache = model.make_cache()
    tokens = list(prompt)
    unseen = tokens[:]
    for _ in range(num_tokens):
        token = draw(forward(model, unseen, cache), tokens)
        if token in stops:
            return
        yield token
        tokens.append(token)
        unseen = [token]


def forward(model: LanguageModel, tokens: Sequence[int], cache: Sequence[Cache]) -> mx.array:
    """Logits (1, V), float32, after ``tokens``, of which there is one at least, went into ``cache``."""
    for start in range(0, len(tokens), PREFILL_TOKENS):
        part = mx.array([tokens[start : start + PREFILL_TOKENS]])
        hidden = model.run(model.embed(part), cache=cache)
        mx.eval(hidden)
    return model.head(hidden[:, -1]).astype(mx.float32)
