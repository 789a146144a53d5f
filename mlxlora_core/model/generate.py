"""``encode -> prefill -> (decode one -> draw)* -> text``."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import DataError, UsageError
from mlxlora_core.model.drawing import Drawing, Drawn
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.memory import CACHE_STEP, PARTS, require_growth, room_for_prompt
from mlxlora_core.model.prompt_cache import PromptCache
from mlxlora_core.model.prompts import Prompt, prompt_ids
from mlxlora_core.model.stop_texts import StopTexts
from mlxlora_core.plugins import Component
from mlxlora_core.values import Cache, Tokenizer

#: what ended a text: an end token or a stop text, the limit on its tokens, or the end of the model's context
STOP, LENGTH, CONTEXT = "stop", "length", "context"


class PromptTooLong(UsageError):
    """A prompt does not fit into the context of the model."""


@dataclass(frozen=True)
class Spent:
    """What a text took.

    Attributes:
        prompt_tokens: of the prompt.
        tokens: drawn for the text, without an end token.
        first_seconds: until the first of them was there.
        seconds: until the text had ended.
    """

    prompt_tokens: int
    tokens: int
    first_seconds: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second, behind the first; of one token, with the time that the prompt took."""
        count, seconds = max(self.tokens - 1, 0), self.seconds - self.first_seconds
        return count / seconds if count and seconds > 0 else self.tokens / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Segment:
    """A part of a generated text.

    Attributes:
        text: it; of the last one nothing.
        finish: what ended the text, ``stop`` (an end token or a stop text), ``length``
            (as many tokens as were asked for) or ``context`` (the context of the model
            is full); None while it goes on.
        stop: the stop text that ended it, or None.
        spent: of the last one, what the text took.
    """

    text: str
    finish: str | None = None
    stop: str | None = None
    spent: Spent | None = field(default=None, compare=False)


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Prompt,
    samplers: Iterable[tuple[Component, Any]],
    *,
    num_tokens: int,
    seed: int,
    write_every: int = 1,
    stop: Sequence[str] = (),
    told: Callable[[str], None] = lambda words: None,
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
        stop: texts before which the text ends, none of them empty; no token is drawn once one is complete.
        told: called with what the prompt needs of memory, in words, before it is read.

    Raises:
        UsageError: the prompt is no valid text, is none in the form of the tokenizer, has no token, or
            does not fit into the model's context.
        PluginError: a sampler gives what it should not.
        DivergedError: the logits of the model are not finite.
        ResourceError: there is too little memory for the prompt, or in the end for the text.
    """
    ids = fitting_ids(model, tokenizer, prompt)
    part, words = room_for_prompt(model, len(ids), num_tokens)
    told(words)
    return follow(
        *(model, tokenizer, ids, samplers),
        num_tokens=num_tokens,
        seed=seed,
        write_every=write_every,
        stop=stop,
        part_tokens=part,
    )


def follow(
    model: LanguageModel,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    samplers: Iterable[tuple[Component, Any]],
    *,
    num_tokens: int,
    seed: int,
    write_every: int = 1,
    stop: Sequence[str] = (),
    part_tokens: int = PARTS[0],
    kept: PromptCache | None = None,
) -> Iterator[Segment]:
    """As :func:`generate`, behind the ids of a prompt that has been found to fit.

    Args:
        model: as there, like all that is not said here.
        tokenizer: of the model.
        ids: as :func:`fitting_ids` gives them.
        samplers: how tokens are drawn.
        num_tokens: how many at most.
        seed: of the random keys.
        write_every: tokens a segment.
        stop: texts before which the text ends.
        part_tokens: how many of the prompt are read at a time.
        kept: what was computed of an earlier text, to go on from; it holds this one afterwards.
    """
    end, limit = LENGTH, model.context_tokens
    if limit is not None and num_tokens > limit - len(ids):
        end, num_tokens = CONTEXT, limit - len(ids)
    drawing = Drawing(samplers, seed, tokenizer)

    def draw(logits: mx.array, tokens: Sequence[int]) -> int | Drawn:
        return drawing.soon(
            logits[:, : tokenizer.vocab_size], tokens
        )  # ids beyond it are padding, and no text

    tokens = decode(
        *(model, ids, draw),
        num_tokens=num_tokens,
        stops=tokenizer.stops,
        part_tokens=part_tokens,
        kept=kept,
    )
    return _Telling(tokenizer, len(ids), num_tokens, end).segments(tokens, write_every, StopTexts(stop))


def fitting_ids(model: LanguageModel, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The ids of a prompt that fits into the context of a model with room for a token.

    Raises:
        UsageError: it does not, or is none; as :func:`generate`.
    """
    try:
        ids = prompt_ids(tokenizer, prompt)
    except DataError as fault:
        raise UsageError(f"the prompt cannot be read: {fault.what}", fix=fault.fix) from fault
    if not ids:
        raise UsageError(
            "the prompt is empty, and texts of this model have no begin token", fix="give a prompt"
        )
    require_fit(model, len(ids))
    return ids


def require_fit(model: LanguageModel, tokens: int) -> None:
    """Refuse a prompt of so many tokens where the context of a model has no room for a token behind it.

    Raises:
        PromptTooLong: with both numbers.
    """
    limit = model.context_tokens
    if limit is not None and tokens >= limit:
        raise PromptTooLong(
            f"the prompt has {tokens} tokens, the model's context holds {limit}", fix="shorten the prompt"
        )


class _Telling:
    """Makes segments of token ids.

    Args:
        tokenizer: of the model.
        prompt_tokens: of the prompt.
        num_tokens: how many come at most.
        end: what has ended a text of so many.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: int, num_tokens: int, end: str) -> None:
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._num_tokens, self._end = num_tokens, end
        self._count, self._started, self._first = 0, 0.0, 0.0
        self._faults: list[Exception] = []

    def segments(self, tokens: Iterator[int], every: int, stops: StopTexts) -> Iterator[Segment]:
        """The segments of a text, ``every`` so many tokens, up to the first stop text."""
        self._started = time.perf_counter()
        held, shown = "", 0  # text that waits for its segment; how many segments have been due
        for text in self._tokenizer.stream(self._counted(tokens)):
            held += stops.add(text)
            due = self._count // every
            if held and (due > shown or stops.found is not None):
                yield Segment(held)
                held = ""
            shown = due
            if stops.found is not None:
                yield Segment("", STOP, stops.found, self._spent())
                return
        if self._faults:
            raise self._faults[0]
        finish, spent = STOP if self._count < self._num_tokens else self._end, self._spent()
        rest = held + stops.rest()
        if rest:
            yield Segment(rest)
        yield Segment("", finish, None, spent)

    def _counted(self, tokens: Iterator[int]) -> Iterator[int]:
        try:
            for token in tokens:
                self._count += 1
                self._first = self._first or time.perf_counter() - self._started
                yield token
        except Exception as fault:  # not through the tokenizer, which has no part in it
            self._faults.append(fault)

    def _spent(self) -> Spent:
        seconds = time.perf_counter() - self._started
        return Spent(self._prompt_tokens, self._count, self._first or seconds, seconds)


def whole(segments: Iterable[Segment]) -> Segment:
    """All that :func:`generate` gives, as one segment."""
    parts = list(segments)
    return replace(parts[-1], text="".join(part.text for part in parts))


def decode(
    model: LanguageModel,
    prompt: Sequence[int],
    draw: Callable[[mx.array, Sequence[int]], int | Drawn],
    *,
    num_tokens: int,
    stops: Collection[int],
    part_tokens: int = PARTS[0],
    kept: PromptCache | None = None,
) -> Iterator[int]:
    """Token ids that follow the ids ``prompt``, up to ``num_tokens`` or one of ``stops``.

    Where a token may be still to draw, the model is asked for what follows it before it is given
    out, so that the device computes that while the token is shown.

    Args:
        model: in whatever state; it is put in evaluation mode.
        prompt: one id at least.
        draw: the id that follows, from logits (1, V) in float32 and all ids before it.
        num_tokens: how many at most.
        stops: ids that end the text, and do not come.
        part_tokens: how many of the prompt are read at a time.
        kept: what was computed of an earlier text, to go on from; it holds this one afterwards.

    Raises:
        ResourceError: the text becomes too long for the memory that is left.
    """
    model.eval()
    kept = kept or PromptCache()
    cache, unseen = kept.begin(model, prompt)
    tokens = kept.tokens
    logits: mx.array | None = None
    for left in range(num_tokens, 0, -1):
        if len(tokens) % CACHE_STEP == 0:
            require_growth(model)
        drawn = draw(forward(model, unseen, cache, part_tokens) if logits is None else logits, tokens)
        logits = None
        if isinstance(drawn, Drawn) and left > 1:
            logits = _after(model, drawn.token[None], cache)
            mx.async_eval(drawn.token, drawn.checks, logits)
        token = drawn.read() if isinstance(drawn, Drawn) else drawn
        if token in stops:
            return
        yield token
        tokens.append(token)
        unseen = [token]


def forward(
    model: LanguageModel, tokens: Sequence[int], cache: Sequence[Cache], part_tokens: int = PARTS[0]
) -> mx.array:
    """Logits (1, V), float32, after ``tokens``, of which there is one at least, went into ``cache``."""
    last = (len(tokens) - 1) // part_tokens * part_tokens
    for start in range(0, last, part_tokens):
        part = mx.array([tokens[start : start + part_tokens]])
        mx.eval(model.run(model.embed(part), cache=cache))
    return _after(model, mx.array([tokens[last:]]), cache)


def _after(model: LanguageModel, tokens: mx.array, cache: Sequence[Cache]) -> mx.array:
    """Logits (1, V), float32, after ids (1, T) went into ``cache``."""
    hidden = model.run(model.embed(tokens), cache=cache)
    return model.head(hidden[:, -1]).astype(mx.float32)
