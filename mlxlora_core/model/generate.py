"""``encode -> prefill -> (decode one -> sample)* -> text``."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import DataError, PluginError, UsageError
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.specs import Cache, Sample, Tokenizer

PREFILL_TOKENS = 512


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    sample: Sample,
    *,
    num_tokens: int,
    seed: int,
    write_every: int = 1,
) -> Generator[str, None, bool]:
    """Segments of the text that follows ``prompt``.

    Its value as a generator is whether an end token ended the text.

    Args:
        model: in whatever state; it is put in evaluation mode.
        tokenizer: of the model.
        prompt: text; a begin token is put in front.
        sample: chooses each token.
        num_tokens: how many at most; an end token or a full context stops earlier.
        seed: of the random keys.
        write_every: tokens a segment.

    Raises:
        UsageError: the prompt is no valid text, or does not fit into the model's context.
    """
    try:
        ids = tokenizer.encode(prompt)
    except DataError as fault:
        raise UsageError(f"the prompt cannot be read: {fault.what}", fix=fault.fix) from fault
    limit = model.context_tokens
    if limit is not None and len(ids) >= limit:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, the model's context holds {limit}", fix="shorten the prompt"
        )
    if limit is not None:
        num_tokens = min(num_tokens, limit - len(ids))
    tokens = decode(model, ids, sample, num_tokens=num_tokens, seed=seed, stops=tokenizer.stops)
    return _segments(tokenizer, tokens, num_tokens, write_every)


def _segments(
    tokenizer: Tokenizer, tokens: Iterator[int], num_tokens: int, every: int
) -> Generator[str, None, bool]:
    told = 0

    def counted() -> Iterator[int]:
        nonlocal told
        for token in tokens:
            told += 1
            yield token

    yield from tokenizer.stream(counted(), every)
    return told < num_tokens


def whole(segments: Generator[str, None, bool]) -> tuple[str, bool]:
    """All that :func:`generate` gives: the text, and whether an end token ended it."""
    text = ""
    while True:
        try:
            text += next(segments)
        except StopIteration as end:
            return text, bool(end.value)


def decode(
    model: LanguageModel,
    prompt: Sequence[int],
    sample: Sample,
    *,
    num_tokens: int,
    seed: int,
    stops: Collection[int],
) -> Iterator[int]:
    """Token ids that follow the ids ``prompt``, up to ``num_tokens`` or one of ``stops``."""
    if not callable(sample):
        raise PluginError(f"the sampler is built as {type(sample).__name__}, wanted a function")
    model.eval()
    cache = model.make_cache()
    tokens = list(prompt)
    unseen = tokens[:]
    for key in mx.random.split(mx.random.key(seed), num_tokens):
        token = _token(sample(forward(model, unseen, cache), tokens, key), model.vocab_size)
        if token in stops:
            return
        yield token
        tokens.append(token)
        unseen = [token]


def _token(drawn: Any, vocab_size: int) -> int:
    """The token id that a sampler has drawn.

    Raises:
        PluginError: it is none.
    """
    try:
        token = int(drawn)
    except (TypeError, ValueError) as fault:
        raise PluginError(f"the sampler gives {type(drawn).__name__}, wanted a token id") from fault
    if not 0 <= token < vocab_size:
        raise PluginError(f"the sampler gives {token}, wanted a token id from 0 to {vocab_size - 1}")
    return token


def forward(model: LanguageModel, tokens: Sequence[int], cache: Sequence[Cache]) -> mx.array:
    """Logits (1, V), float32, after ``tokens``, of which there is one at least, went into ``cache``."""
    for start in range(0, len(tokens), PREFILL_TOKENS):
        part = mx.array([tokens[start : start + PREFILL_TOKENS]])
        hidden = model.run(model.embed(part), cache=cache)
        mx.eval(hidden)
    return model.head(hidden[:, -1]).astype(mx.float32)
