"""Each token is a function of seed and position, and what samplers give is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

from mlxlora_core.errors import DivergedError, PluginError
from mlxlora_core.model.drawing import Drawing
from mlxlora_core.options import parse
from mlxlora_core.plugins import Component, Plugin, Registry
from mlxlora_core.specs import Sampler


def sampler(transform: Any, name: str = "mine") -> tuple[Component, Any]:
    """A sampler of somebody who gives ``transform``, and its options."""
    spec = Sampler(name=name, summary="s", build=lambda options: transform)
    return Component("sampler", spec, Plugin("box", "box", "1", "installed", "box")), None


def as_it_is(logits: mx.array, tokens: Sequence[int]) -> mx.array:
    return logits


def test_a_key_is_the_seed_and_the_position() -> None:
    """The token at each place is MLX's own draw with that key."""
    logits = mx.random.normal((1, 320), key=mx.random.key(1))
    for seed in (0, 7, 2**32 - 1):
        for count in (1, 2, 500):
            key = mx.random.key(seed * 2**32 + count)
            want = int(mx.random.categorical(logits, key=key))
            assert Drawing([], seed)(logits, [1] * count) == want


def test_one_token_that_may_come_is_the_draw() -> None:
    """Nothing is drawn among one; MLX would give the same token."""
    for token in (0, 44, 319):
        logits = mx.where(mx.arange(320)[None] == token, -3.0, -mx.inf)
        assert Drawing([], 0)(logits, [1]) == token == int(mx.random.categorical(logits))


def test_a_sampler_that_asks_is_given_the_tokenizer() -> None:
    """By the name of its parameter; another one is not."""
    tokenizer: Any = object()
    seen: list[Any] = []

    def build(options: Any, tokenizer: Any) -> Any:
        seen.append(tokenizer)
        return as_it_is

    spec = Sampler(name="asks", summary="s", build=build)
    asks = Component("sampler", spec, Plugin("box", "box", "1", "installed", "box"))
    logits = mx.random.normal((1, 320), key=mx.random.key(1))
    token = Drawing([(asks, None), sampler(as_it_is)], 3, tokenizer)(logits, [1])
    assert seen == [tokenizer] and token == Drawing([], 3)(logits, [1])


# --- what a sampler should not give -------------------------------------------

FAULTS: dict[str, tuple[Any, str]] = {
    "no function": (3, "sampler box:mine: build gives int, wanted a function (logits, tokens)"),
    "nothing": (None, "sampler box:mine: build gives NoneType, wanted a function (logits, tokens)"),
    "a key too": (
        lambda logits, tokens, key: logits,
        "sampler box:mine: build gives a function (logits, tokens, key), wanted a function (logits, tokens)",
    ),
    "logits alone": (
        lambda logits: logits,
        "build gives a function (logits), wanted a function (logits, t",
    ),
    "no array": (lambda *_: None, "sampler box:mine: transform gives NoneType, wanted array"),
    "an id": (
        lambda logits, tokens: logits.argmax(axis=-1),
        "transform gives uint32 (1,), wanted float32 (1, 320)",
    ),
    "another type": (
        lambda logits, tokens: logits.astype(mx.float16),
        "transform gives float16 (1, 320), wanted float32 (1, 320)",
    ),
    "not a number": (lambda logits, tokens: logits * mx.nan, "transform gives nan, wanted numbers"),
    "one that is none": (
        lambda logits, tokens: mx.where(mx.arange(320) == 300, mx.nan, logits),
        "transform gives nan, wanted numbers",
    ),
    "infinity": (
        lambda logits, tokens: mx.where(mx.arange(320) == 300, mx.inf, logits),
        "transform gives inf, wanted numbers",
    ),
    "no token": (
        lambda logits, tokens: mx.full(logits.shape, -mx.inf),
        "transform gives no token that may come (all logits are -inf), wanted numbers",
    ),
}


@pytest.mark.parametrize(("transform", "words"), FAULTS.values(), ids=FAULTS)
def test_what_a_sampler_should_not_give_is_told(transform: Any, words: str) -> None:
    with pytest.raises(PluginError) as caught:
        Drawing([sampler(transform)], 0)(mx.zeros((1, 320)), [1])
    assert words in str(caught.value)


def test_of_several_samplers_the_one_that_broke_the_logits_is_named() -> None:
    def writes_into_its_logits(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        logits[:, 3:] = mx.nan
        return logits

    chain = [
        sampler(as_it_is, "first"),
        sampler(writes_into_its_logits, "second"),
        sampler(lambda logits, tokens: logits + 1, "third"),
    ]
    with pytest.raises(PluginError, match="sampler box:second: transform gives nan"):
        Drawing(chain, 0)(mx.zeros((1, 320)), [1])


def test_ids_cannot_be_changed_by_a_sampler() -> None:
    def transform(logits: mx.array, tokens: Any) -> mx.array:
        tokens.append(7)
        return logits

    with pytest.raises(AttributeError, match="append"):
        Drawing([sampler(transform)], 0)(mx.zeros((1, 320)), [1])


@pytest.mark.parametrize("name", ["greedy", "temperature", "top-k", "top-p", "min-p", "repetition-penalty"])
@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
def test_a_model_whose_logits_are_not_finite_gives_no_token(
    registry: Registry, name: str, value: float
) -> None:
    logits = mx.where(mx.arange(320)[None] == 7, value, mx.zeros((1, 320)))
    if value == -mx.inf:
        logits = mx.full((1, 320), value)
    component = registry.find("sampler", name)
    draw = Drawing([(component, parse(component.spec.options, {}, owner=name))], 0)
    with pytest.raises(DivergedError, match="the logits of the model at token 3 are not finite"):
        draw(logits, [1, 5])


def test_a_model_may_rule_tokens_out() -> None:
    logits = mx.where(mx.arange(320)[None] >= 318, mx.zeros((1, 320)), -mx.inf)
    assert {Drawing([], seed)(logits, [1]) for seed in range(20)} == {318, 319}
