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
    """What generating a text took.

    Attributes:
        prompt_tokens: tokens of the prompt.
        tokens: tokens generated, without an end token.
        first_seconds: time to the first of them.
        seconds: time to the end of the text.
    """

    prompt_tokens: int
    tokens: int
    first_seconds: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second after the first; for a single token, the time of the prompt is included."""
        count, seconds = max(self.tokens - 1, 0), self.seconds - self.first_seconds
        return count / seconds if count and seconds > 0 else self.tokens / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Segment:
    """A part of a generated text.

    Attributes:
        text: the text; empty in the last segment.
        finish: what ended the text, ``stop`` (an end token or a stop text), ``length``
            (as many tokens as were asked for) or ``context`` (the context of the model
            is full); None while it goes on.
        stop: the stop text that ended it, or None.
        spent: in the last segment, what the text took.
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
        model: in any mode; it is put in evaluation mode.
        tokenizer: of the model.
        prompt: a text, which gets a begin token, or messages, which get the tokenizer's chat format.
        samplers: (component, its options) of each, in the order in which they change the logits.
        num_tokens: the most tokens to generate; an end token or a full context ends the text earlier.
        seed: of the random keys, from 0 to 2**32 - 1.
        write_every: tokens per segment.
        stop: texts, none of them empty, before which the generated text ends; no token is drawn once
            one is complete.
        told: called with the memory that the prompt needs, in words, before it is read.

    Raises:
        UsageError: the prompt is not valid text, does not suit the chat format, has no tokens, or does
            not fit into the model's context.
        PluginError: a sampler breaks its contract.
        DivergedError: the logits of the model are not finite.
        ResourceError: there is too little memory for the prompt, or later for the text.
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
    """As :func:`generate`, for the ids of a prompt that is known to fit.

    Args:
        model: as for :func:`generate`, like every argument with the same name.
        tokenizer: of the model.
        ids: of the prompt, from :func:`fitting_ids`.
        samplers: how tokens are drawn.
        num_tokens: the most tokens to generate.
        seed: of the random keys.
        write_every: tokens per segment.
        stop: texts before which the generated text ends.
        part_tokens: how many tokens of the prompt are read at a time.
        kept: the cache of an earlier text, whose common beginning is reused; afterwards, of this one.
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
    """The ids of a prompt, which must leave room for at least one token in the context of the model.

    Raises:
        UsageError: the prompt does not fit or is not valid; as :func:`generate`.
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
    """Refuse a prompt of so many tokens if it leaves no room for another in the context of the model.

    Raises:
        PromptTooLong: it names both numbers.
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
        num_tokens: the most tokens that come.
        end: the reason why a text of that length ends.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: int, num_tokens: int, end: str) -> None:
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._num_tokens, self._end = num_tokens, end
        self._count, self._started, self._first = 0, 0.0, 0.0
        self._faults: list[Exception] = []

    def segments(self, tokens: Iterator[int], every: int, stops: StopTexts) -> Iterator[Segment]:
        """The segments of a text, of ``every`` tokens each, up to the first stop text."""
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
        except Exception as fault:  # raised later: the tokenizer that iterates here is not to blame
            self._faults.append(fault)

    def _spent(self) -> Spent:
        seconds = time.perf_counter() - self._started
        return Spent(self._prompt_tokens, self._count, self._first or seconds, seconds)


def whole(segments: Iterable[Segment]) -> Segment:
    """All segments of :func:`generate` joined into one."""
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
    """Yield the token ids that follow the ids ``prompt``, up to ``num_tokens`` or one of ``stops``.

    If ``draw`` returns a token that the device is still drawing, the model is run on it before it is
    yielded, so that the device computes the next logits while the caller shows the token.

    Args:
        model: in any mode; it is put in evaluation mode.
        prompt: at least one id.
        draw: returns the next id, given logits (1, V) in float32 and all ids so far.
        num_tokens: the most ids to yield.
        stops: ids that end the text; they are not yielded.
        part_tokens: how many tokens of the prompt are read at a time.
        kept: the cache of an earlier text, whose common beginning is reused; afterwards, of this one.

    Raises:
        ResourceError: the text becomes too long for the free memory.
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
    """Logits (1, V), float32, after putting ``tokens``, at least one, into ``cache``."""
    last = (len(tokens) - 1) // part_tokens * part_tokens
    for start in range(0, last, part_tokens):
        part = mx.array([tokens[start : start + part_tokens]])
        mx.eval(model.run(model.embed(part), cache=cache))
    return _after(model, mx.array([tokens[last:]]), cache)


def _after(model: LanguageModel, tokens: mx.array, cache: Sequence[Cache]) -> mx.array:
    """Logits (1, V), float32, after putting ids (1, T) into ``cache``."""
    hidden = model.run(model.embed(tokens), cache=cache)
    return model.head(hidden[:, -1]).astype(mx.float32)
