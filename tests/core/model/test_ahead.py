"""Tokens that are given out while the device computes the next: the same text as without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora_core.errors import DivergedError, MlxloraError, PluginError, ResourceError
from mlxlora_core.machine import memory as machine
from mlxlora_core.model import drawing, generate, loading, memory
from mlxlora_core.model.drawing import Drawing, Drawn
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins import Component, Plugin, Registry
from mlxlora_core.specs import Sampler

PROMPT = "Q: what scales the weights?\nA:"
SAMPLERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "greedy": [("greedy", {})],
    "temperature": [("temperature", {"temp": 1.3})],
    "cold": [("temperature", {"temp": 0.0})],
    "top-k": [("top-k", {"k": 7})],
    "top-p": [("top-p", {"p": 0.8})],
    "min-p": [("min-p", {"p": 0.1})],
    "repetition-penalty": [("repetition-penalty", {"penalty": 1.5, "window": 4})],
    "two": [("repetition-penalty", {}), ("top-p", {"temp": 1.2})],
    "none": [],
}


@pytest.fixture(scope="module", params=[None, 4], ids=["dense", "4 bits"])
def model(request: pytest.FixtureRequest, model_folder: Callable[..., Path], registry: Registry) -> Model:
    return loading.load(model_folder(bits=request.param), registry)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A function that says whether tokens are drawn ahead."""
    return lambda on: monkeypatch.setattr(drawing, "runs_ahead", lambda: on)


def sampler(transform: Any) -> tuple[Component, Any]:
    """A sampler of somebody who gives ``transform``, and its options."""
    spec = Sampler(name="mine", summary="s", build=lambda options: transform)
    return Component("sampler", spec, Plugin("box", "box", "1", "installed", "box")), None


def chosen(registry: Registry, name: str) -> list[tuple[Component, Any]]:
    found = [(registry.find("sampler", kind), values) for kind, values in SAMPLERS[name]]
    return [(component, component.spec.options(**values)) for component, values in found]


def outcome(make: Callable[[], Iterable[Any]]) -> tuple[list[Any], str]:
    """What comes, and the error that ends it."""
    came = []
    try:
        for item in make():
            came.append(item)
    except MlxloraError as fault:
        return came, str(fault)
    return came, ""


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_is_the_same_text_with_every_sampler(
    model: Model, registry: Registry, ahead: Callable[[bool], None], name: str
) -> None:
    found: dict[bool, list[Any]] = {}
    for on in (False, True):
        ahead(on)
        texts = [
            generate.generate(
                model.language_model,
                model.tokenizer,
                PROMPT,
                chosen(registry, name),
                num_tokens=count,
                seed=seed,
            )
            for seed in (0, 1)
            for count in (1, 2, 60)
        ]
        found[on] = [list(text) for text in texts]
    assert found[True] == found[False]
    assert len(found[True][2]) > 20


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 30])
@pytest.mark.parametrize("stop_at", [0, 1, 2, 29, None])
def test_it_ends_where_it_did(
    model: Model, ahead: Callable[[bool], None], num_tokens: int, stop_at: int | None
) -> None:
    ahead(False)
    draw = Drawing([], 4)
    whole = list(generate.decode(model.language_model, [1, 5], draw.soon, num_tokens=30, stops=()))
    stops = {whole[stop_at]} if stop_at is not None else set()
    found = []
    for on in (False, True):
        ahead(on)
        ids = generate.decode(
            model.language_model, [1, 5], Drawing([], 4).soon, num_tokens=num_tokens, stops=stops
        )
        found.append(list(ids))
    assert found[0] == found[1] and not stops & set(found[1])


def test_a_full_context_ends_it(stand_in: Callable[..., Any], tokenizer: Any, ahead: Any) -> None:
    small = stand_in(vocab_size=320, context_tokens=40)
    found = []
    for on in (False, True):
        ahead(on)
        found.append(list(generate.generate(small, tokenizer, PROMPT, [], num_tokens=99, seed=0)))
    assert found[0] == found[1] and found[1][-1].finish == "context"


def test_the_next_is_asked_for_before_a_token_is_given_out(
    stand_in: Callable[..., Any], ahead: Callable[[bool], None]
) -> None:
    ahead(True)
    model, runs = stand_in(), []
    inner = model.run
    model.run = lambda hidden, **more: runs.append(hidden.shape[1]) or inner(hidden, **more)
    tokens = generate.decode(model, [1, 5, 9], Drawing([], 0).soon, num_tokens=4, stops=())
    seen = [(token, len(runs)) for token in tokens]
    assert [count for _, count in seen] == [2, 3, 4, 4]  # nothing follows the last
    assert runs == [3, 1, 1, 1]


def test_a_sampler_is_asked_once_a_token_with_all_before_it(model: Model, ahead: Any) -> None:
    ahead(True)
    asked: list[tuple[int, ...]] = []

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        asked.append(tuple(tokens))
        return logits

    draw = Drawing([sampler(transform)], 0)
    tokens = generate.decode(model.language_model, [1, 5], draw.soon, num_tokens=5, stops=())
    first = next(tokens)
    assert asked == [(1, 5)], "not before it was given out what comes before"
    rest = list(tokens)
    assert asked == [(1, 5, *[first, *rest][:count]) for count in range(5)]


@pytest.mark.parametrize("bad", [mx.nan, mx.inf, -mx.inf], ids=str)
@pytest.mark.parametrize("whose", ["sampler", "model"])
def test_what_is_refused_is_refused_after_the_same_tokens(
    model: Model, ahead: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, whose: str, bad: float
) -> None:
    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        return mx.full(logits.shape, bad) if whose == "sampler" and len(tokens) == 6 else logits

    def decoded() -> Iterable[int]:
        calls, head = iter(range(100)), type(model.language_model).head

        def spoilt(self: Any, hidden: mx.array) -> mx.array:
            logits = head(self, hidden)
            return mx.full(logits.shape, bad) if whose == "model" and next(calls) == 4 else logits

        with monkeypatch.context() as patch:
            patch.setattr(type(model.language_model), "head", spoilt)
            draw = Drawing([sampler(transform)], 2)
            yield from generate.decode(model.language_model, [1, 5], draw.soon, num_tokens=20, stops=())

    found = []
    for on in (False, True):
        ahead(on)
        found.append(outcome(decoded))
    assert found[0] == found[1]
    assert len(found[1][0]) == 4 and (whose == "model") == ("logits of the model at token 7" in found[1][1])


def test_its_errors_are_those_of_a_plain_draw(ahead: Callable[[bool], None]) -> None:
    ahead(True)
    drawn = Drawing([sampler(lambda logits, tokens: logits * mx.nan)], 0).soon(mx.zeros((1, 320)), [1])
    assert isinstance(drawn, Drawn)
    with pytest.raises(PluginError, match="sampler box:mine: transform gives nan, wanted numbers"):
        drawn.read()
    drawn = Drawing([], 0).soon(mx.full((1, 320), mx.inf), [1])
    with pytest.raises(DivergedError, match="at token 2 are not finite"):
        drawn.read()
    with pytest.raises(PluginError, match=r"transform gives float32 \(1, 3\), wanted float32 \(1, 320\)"):
        Drawing([sampler(lambda logits, tokens: logits[:, :3])], 0).soon(mx.zeros((1, 320)), [1])


@pytest.mark.parametrize("on", [False, True])
def test_a_text_that_outgrows_memory_gives_out_all_before_it(
    model: Model, ahead: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    ahead(on)
    given = []
    with pytest.raises(ResourceError, match="another 256 tokens of the text needs about"):
        for token in generate.decode(
            model.language_model, [1, 5], Drawing([], 0).soon, num_tokens=10**9, stops=()
        ):
            given.append(token)
            monkeypatch.setattr(memory, "free_memory_bytes", lambda: 1000)
            monkeypatch.setattr(machine, "_rooms", lambda root: [machine._Room(0, 1000, "memory")])
    assert len(given) == 254
