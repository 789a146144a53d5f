"""Many prompts at once: each gets the text that it gets when they are asked one after another."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from serving_steps import ADAPTERS, greedy

from mlxlora_core.errors import PluginError, ResourceError
from mlxlora_core.model import loading
from mlxlora_core.model.adapters import AdapterFile, load_file
from mlxlora_core.model.generate import CONTEXT, PromptTooLong, Segment, follow, whole
from mlxlora_core.model.loading import Model
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.plugins import Component, Plugin, Registry
from mlxlora_core.plugins.blame import told
from mlxlora_core.serving import together
from mlxlora_core.serving.scheduler import Limits
from mlxlora_core.serving.together import follow_all
from mlxlora_core.specs import Sampler

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
Chosen = Sequence[tuple[Component, Any]]


def of_somebody(transform: Callable[[], Any]) -> Chosen:
    """A sampler that is built for each text by ``transform``."""
    spec = Sampler(name="mine", summary="s", build=lambda options: transform())
    return [(Component("sampler", spec, Plugin("box", "box", "1", "installed", "box")), None)]


def with_state() -> Any:
    """Lets the tokens that stand at its own count come, so that one count for two texts would show."""
    count = 0

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        nonlocal count
        count += 1
        return mx.where(mx.arange(logits.shape[-1]) % 7 == count % 7, logits, -mx.inf)

    return transform


def samplers(registry: Registry) -> dict[str, Chosen]:
    def named(name: str, **options: Any) -> tuple[Component, Any]:
        component = registry.find("sampler", name)
        return component, component.spec.options(**options)

    return {
        "most likely": greedy(registry),
        "drawn": [named("repetition-penalty"), named("top-p", p=0.95, temp=1.2)],
        "with state": of_somebody(with_state),
    }


def prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of one token to more than a part is read of, some of which begin alike."""
    draw = random.Random(seed)
    alike = [draw.randrange(3, 320) for _ in range(140)]
    lengths = [1, 127, 128, 129, 140, *(draw.randrange(1, 60) for _ in range(count))][:count]
    return [(alike if draw.random() < 0.5 else prompt_of(draw))[:length] for length in lengths]


def prompt_of(draw: random.Random) -> list[int]:
    return [draw.randrange(3, 320) for _ in range(140)]


def one_by_one(
    model: Model, asked: Sequence[Sequence[int]], chosen: Chosen, num_tokens: int, seed: int
) -> list[Segment]:
    parts = (model.language_model, model.tokenizer)
    return [whole(follow(*parts, ids, chosen, num_tokens=num_tokens, seed=seed)) for ids in asked]


def at_once(
    model: Model, asked: Sequence[Sequence[int]], chosen: Chosen, num_tokens: int, seed: int, **limits: Any
) -> list[Segment]:
    parts = (model.language_model, model.tokenizer)
    how = {"num_tokens": num_tokens, "seed": seed, "limits": Limits(**limits)}
    return list(follow_all(*parts, asked, chosen, **how))


def texts(segments: Sequence[Segment]) -> list[tuple[str, str | None]]:
    return [(segment.text, segment.finish) for segment in segments]


@pytest.fixture(scope="module", params=[None, 4], ids=["float32", "4 bits"])
def base(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> Path:
    return model_folder(bits=request.param)


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path], registry: Registry) -> Model:
    return loading.load(model_folder(), registry)


@pytest.mark.parametrize("adapter", [None, *ADAPTERS] if ALL else [None, "large", "turned"])
def test_each_prompt_gets_what_it_gets_alone(
    base: Path,
    adapter: str | None,
    registry: Registry,
    adapter_files: Callable[[Path], dict[str, Path]],
) -> None:
    model = loading.load(base, registry)
    if adapter is not None:
        load_file(AdapterFile(adapter_files(base)[adapter]), model, registry)
    asked = prompts(70 if ALL else 14, seed=len(adapter or ""))
    for name, chosen in samplers(registry).items():
        want = texts(one_by_one(model, asked, chosen, 12, seed=3))
        assert texts(at_once(model, asked, chosen, 12, seed=3)) == want, name
        assert len(set(want)) > 8, "or all texts are alike, and this shows little"


@pytest.mark.parametrize("limits", [{"places": 1}, {"places": 3, "part_tokens": 16, "step_tokens": 20}])
def test_so_it_does_with_other_limits(model: Model, registry: Registry, limits: dict[str, int]) -> None:
    asked, chosen = prompts(12, seed=9), samplers(registry)["drawn"]
    want = texts(one_by_one(model, asked, chosen, 12, seed=0))
    assert texts(at_once(model, asked, chosen, 12, seed=0, **limits)) == want


def test_texts_end_at_the_context_as_they_do_alone(
    model: Model, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.language_model, "context_tokens", 150)
    asked, chosen = (
        prompts(9, seed=4),
        of_somebody(lambda: lambda logits, tokens: only(logits, 5 + len(tokens))),
    )
    want = one_by_one(model, asked, chosen, 1 << 40, seed=0)
    assert texts(at_once(model, asked, chosen, 1 << 40, seed=0)) == texts(want)
    assert {segment.finish for segment in want} == {CONTEXT}
    with pytest.raises(PromptTooLong):
        at_once(model, [[5], [5] * 150], chosen, 2, seed=0)


def only(logits: mx.array, token: int) -> mx.array:
    return mx.where(mx.arange(logits.shape[-1]) == token, 0.0, mx.full(logits.shape, -mx.inf))


# --- what goes alone ----------------------------------------------------------


def test_what_needs_more_memory_than_all_may_have_goes_alone(
    model: Model, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Iterator[Segment]:
        alone.append(len(arguments[2]))
        return follow(*arguments, **options)

    monkeypatch.setattr(together, "follow", counted)
    asked, chosen = [[5] * 9, [6] * 120, [7] * 3, [8] * 300, [9]], greedy(registry)
    want = texts(one_by_one(model, asked, chosen, 8, seed=0))
    assert texts(at_once(model, asked, chosen, 8, seed=0)) == want and alone == []
    few = together.Scheduler(model.language_model, together.Selection(None), Limits())._sizes.cache_bytes(256)
    assert texts(at_once(model, asked, chosen, 8, seed=0, cache_bytes=few * 4 // 3 + 4)) == want
    assert alone == [300]
    # Memory for keys and values of all that may be asked for is not there, but of what comes it is.
    monkeypatch.setattr(model.language_model, "context_tokens", None)
    ends = of_somebody(lambda: lambda logits, tokens: only(logits, 2 if len(tokens) > 12 else 5))
    assert [segment.finish for segment in at_once(model, asked[2:3], ends, 1 << 50, seed=0)] == ["stop"]


def test_a_model_whose_rows_cannot_stand_in_a_batch_is_asked_one_by_one(
    stand_in: Callable[..., Any], tokenizer: CheckedTokenizer, registry: Registry
) -> None:
    model = stand_in(vocab_size=320)
    asked = [[5 + n] * (n + 1) for n in range(7)]
    how = {"num_tokens": 6, "seed": 0}
    want = [whole(follow(model, tokenizer, ids, greedy(registry), **how)) for ids in asked]
    assert list(follow_all(model, tokenizer, asked, greedy(registry), **how)) == want


# --- on the way ---------------------------------------------------------------


def test_prompts_are_taken_as_there_are_places(model: Model, registry: Registry) -> None:
    taken = []

    def asked() -> Iterator[list[int]]:
        for number in range(300):
            taken.append(number)
            yield [5 + number % 200]

    parts = (model.language_model, model.tokenizer)
    made = follow_all(*parts, asked(), greedy(registry), num_tokens=2, seed=0)
    next(made)
    assert len(taken) <= 32
    assert len(list(made)) == 299 and len(taken) == 300
    assert list(follow_all(*parts, [], greedy(registry), num_tokens=2, seed=0)) == []


def failing(fault: BaseException) -> Chosen:
    """A sampler that raises in the third token of texts that begin with 9."""

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        if tokens[0] == 9 and len(tokens) == 3:
            raise fault
        return logits

    return of_somebody(lambda: transform)


@pytest.mark.parametrize(
    "fault",
    [PluginError("mine fails"), ValueError("a defect"), KeyboardInterrupt()],
    ids=lambda f: type(f).__name__,
)
def test_what_a_sampler_raises_comes_as_it_is(model: Model, fault: BaseException) -> None:
    asked = [[5], [6], [9], [7]]
    with pytest.raises(type(fault)) as caught:
        at_once(model, asked, failing(fault), 6, seed=0)
    assert caught.value is fault


def test_a_limit_of_the_machine_is_one(model: Model) -> None:
    with pytest.raises(ResourceError), told(()):
        at_once(model, [[9]], failing(MemoryError()), 6, seed=0)


def test_texts_before_one_that_fails_are_told(model: Model) -> None:
    parts = (model.language_model, model.tokenizer)
    chosen = failing(PluginError("mine fails"))
    made = follow_all(*parts, [[5], [6], [9], [7]], chosen, num_tokens=6, seed=0)
    assert len([next(made), next(made)]) == 2
    with pytest.raises(PluginError):
        next(made)
