from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora_core.errors import ResourceError, UsageError
from mlxlora_core.machine import memory as machine
from mlxlora_core.model import loading, memory
from mlxlora_core.model.drawing import Drawing
from mlxlora_core.model.generate import Segment, Spent, decode, generate, whole
from mlxlora_core.model.loading import Model
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.plugins import Component, Plugin, Registry
from mlxlora_core.plugins.sections import configure
from mlxlora_core.specs import Sampler

PROMPT = "Q: what scales the weights?\nA:"


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path], registry: Registry) -> Model:
    return loading.load(model_folder(), registry)


def sampler(transform: Any, name: str = "mine") -> tuple[Component, Any]:
    """A sampler of somebody who gives ``transform``, and its options."""
    spec = Sampler(name=name, summary="s", build=lambda options: transform)
    return Component("sampler", spec, Plugin("box", "box", "1", "installed", "box")), None


def scripted(ids: Sequence[int]) -> Any:
    """A transform that leaves these ids whatever the model says."""
    rest = iter(ids)

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == next(rest), 0.0, mx.full(logits.shape, -mx.inf))

    return transform


def as_it_is(logits: mx.array, tokens: Sequence[int]) -> mx.array:
    return logits


def segments(model: Any, transform: Any = as_it_is, tokenizer: Any = None, **options: Any) -> list[Segment]:
    settings = {"num_tokens": 30, "seed": 0, **options}
    tokenizer = tokenizer or model.tokenizer
    language_model = getattr(model, "language_model", model)
    return list(generate(language_model, tokenizer, PROMPT, [sampler(transform)], **settings))


def text(model: Any, transform: Any = as_it_is, tokenizer: Any = None, **options: Any) -> str:
    return whole(segments(model, transform, tokenizer, **options)).text


def greedy(logits: mx.array, tokens: Sequence[int]) -> int:
    """What :func:`decode` draws with: the most likely token."""
    return int(mx.argmax(logits[0]))


# --- what follows -------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_whatever_was_drawn_before(model: Model) -> None:
    first = text(model)
    mx.random.seed(9)
    mx.random.uniform()
    assert text(model) == first
    assert text(model, seed=1) != first


def test_a_longer_text_goes_on_from_the_shorter_one(
    model: Model, stand_in: Callable[..., Any], tokenizer: CheckedTokenizer
) -> None:
    """A token is a function of (seed, position): not of how many were asked for, nor of the context."""
    long = text(model, num_tokens=40)
    for count in (1, 2, 3, 4, 5, 20):
        assert long.startswith(text(model, num_tokens=count))
        assert text(model, num_tokens=count)
    roomy = text(stand_in(vocab_size=320, context_tokens=999), tokenizer=tokenizer)
    narrow = text(stand_in(vocab_size=320, context_tokens=40), tokenizer=tokenizer)
    assert roomy.startswith(narrow) and 0 < len(narrow) < len(roomy)


def test_a_text_that_is_cut_and_continued_is_the_same_text(model: Model) -> None:
    ids = model.tokenizer.encode(PROMPT)

    def go_on(begun: list[int], count: int) -> list[int]:
        draw = Drawing([sampler(as_it_is)], 5)
        return begun + list(decode(model.language_model, begun, draw, num_tokens=count, stops=()))

    whole_text = go_on(ids, 12)
    assert go_on(go_on(ids, 5), 7) == whole_text


def test_greedy_tokens_are_those_of_the_whole_sequence_run_again_each_time(model: Model) -> None:
    prompt = model.tokenizer.encode(PROMPT)
    ids = list(decode(model.language_model, prompt, greedy, num_tokens=40, stops=()))
    for i, id in enumerate(ids):
        logits = model.language_model(mx.array([prompt + ids[:i]]))
        assert int(mx.argmax(logits[0, -1])) == id
    assert len(set(ids)) > 3


def test_a_prompt_is_read_in_parts_as_well_as_whole(model: Model, stand_in: Callable[..., Any]) -> None:
    def ids(language_model: Any, part: int = 512) -> list[int]:
        prompt = [1, 5, 9, 30, 2, 7, 7, 8, 11, 40]
        return list(decode(language_model, prompt, greedy, num_tokens=20, stops=(), part_tokens=part))

    for language_model in (model.language_model, stand_in()):
        whole = ids(language_model)
        for length in (1, 3, 10):
            assert ids(language_model, length) == whole


def test_a_text_that_outgrows_memory_ends_with_a_line(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before it was given out."""
    given = []
    with pytest.raises(ResourceError, match="another 256 tokens of the text needs about"):
        for token in decode(model.language_model, [1, 5], greedy, num_tokens=10**12, stops=()):
            given.append(token)
            monkeypatch.setattr(memory, "free_memory_bytes", lambda: 1000)
            monkeypatch.setattr(machine, "_rooms", lambda root: [machine._Room(0, 1000, "memory")])
    assert len(given) == 254


def test_a_sampler_gets_the_ids_so_far_and_float32(model: Model) -> None:
    prompt = model.tokenizer.encode(PROMPT)
    seen = []
    script = scripted([11, 12, 13, 14])

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        seen.append(list(tokens))
        assert (logits.shape, logits.dtype) == ((1, 320), mx.float32)
        return script(logits, tokens)

    draw = Drawing([sampler(transform)], 3)
    decoded = list(decode(model.language_model, prompt, draw, num_tokens=4, stops=()))
    assert decoded == [11, 12, 13, 14]
    assert seen == [prompt + decoded[:i] for i in range(4)]


def test_it_is_built_once_for_each_text(model: Model) -> None:
    built = []
    component, _ = sampler(None)
    spec = Sampler(name="mine", summary="s", build=lambda options: built.append(options) or as_it_is)
    mine = Component("sampler", spec, component.plugin)
    for count in (1, 2):
        parts = [(mine, "options")]
        list(generate(model.language_model, model.tokenizer, PROMPT, parts, num_tokens=5, seed=0))
        assert built == ["options"] * count


def test_samplers_change_the_logits_one_after_the_other(model: Model) -> None:
    told = []

    def first(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        return mx.where(mx.arange(320) < 100, logits, -mx.inf)

    def second(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        told.append(int((logits > -mx.inf).sum()))
        return mx.where(mx.arange(320) >= 98, logits, -mx.inf)

    draw = Drawing([sampler(first), sampler(second)], 0)
    ids = list(decode(model.language_model, [1, 5], draw, num_tokens=20, stops=()))
    assert set(ids) == {98, 99} and set(told) == {100}


def test_nothing_is_computed_that_nobody_asked_for(stand_in: Callable[..., Any]) -> None:
    model = stand_in()
    runs = []
    inner = model.run
    model.run = lambda hidden, **cache: runs.append(hidden.shape[1]) or inner(hidden, **cache)
    assert len(list(decode(model, [1, 5, 9], greedy, num_tokens=4, stops=()))) == 4
    assert runs == [3, 1, 1, 1]


# --- where it ends ------------------------------------------------------------


def test_it_ends_at_an_end_token_which_is_not_shown(model: Model) -> None:
    ids = model.tokenizer.encode("the weights", bos=False)
    assert text(model, scripted([*ids, 2, 50, 51])) == " the weights"
    for end in (9, 2):
        draw = Drawing([sampler(scripted([40, 41, end, 42]))], 0)
        assert list(decode(model.language_model, [1], draw, num_tokens=9, stops={2, 9})) == [40, 41]


def test_it_ends_after_as_many_tokens_as_were_asked_for(model: Model) -> None:
    for count in (1, 2, 17):
        assert text(model, scripted([40] * 99), num_tokens=count) == model.tokenizer.decode([40] * count)


def test_no_number_of_tokens_is_too_large_to_ask_for(model: Model) -> None:
    ids = model.tokenizer.encode("the weights", bos=False)
    script = scripted([*ids, 2])
    assert text(model, script, num_tokens=2**40) == " the weights"


def test_it_ends_where_the_context_is_full(stand_in: Callable[..., Any], tokenizer: CheckedTokenizer) -> None:
    length = len(tokenizer.encode(PROMPT))
    for room in (1, 5):
        model = stand_in(vocab_size=320, context_tokens=length + room)
        told = segments(model, scripted([40] * 99), tokenizer, num_tokens=50)
        assert whole(told) == Segment(tokenizer.decode([40] * room), "context")
        exact = segments(model, scripted([40] * 99), tokenizer, num_tokens=room)
        assert whole(exact).finish == "length", "as many as were asked for, and no more was"
    unlimited = stand_in(vocab_size=320, context_tokens=None)
    assert text(unlimited, scripted([40] * 99), tokenizer, num_tokens=50) == tokenizer.decode([40] * 50)


@pytest.mark.parametrize(
    ("ids", "num_tokens", "finish"),
    [((40, 2), 9, "stop"), ((40, 2), 2, "stop"), ((40, 41), 2, "length"), ((2,), 5, "stop")],
)
def test_the_last_segment_tells_what_ended_it(
    model: Model, ids: tuple[int, ...], num_tokens: int, finish: str
) -> None:
    assert model.tokenizer.stops == {2}
    told = segments(model, scripted(ids), num_tokens=num_tokens)
    assert [segment.finish for segment in told] == [None] * (len(told) - 1) + [finish]
    assert whole(told) == Segment(model.tokenizer.decode([id for id in ids if id != 2]), finish)


def test_a_stop_text_is_found_across_tokens_and_no_part_of_it_comes(model: Model) -> None:
    ids = model.tokenizer.encode("the weights of a layer", bos=False)
    decoded = model.tokenizer.decode(ids)
    stop = decoded[5:-3]
    assert len({model.tokenizer.decode(ids[:n]) for n in range(len(ids)) if n}) > 3, "it has borders in it"
    enough = next(n for n in range(len(ids)) if stop in model.tokenizer.decode(ids[:n]))
    for every in (1, 2, 3, 99):
        told = segments(model, scripted([*ids, 2]), write_every=every, stop=["never", stop])
        assert whole(told) == Segment(decoded[:5], "stop", stop)
        assert all(decoded[:5].startswith("".join(t.text for t in told[:n])) for n in range(len(told)))
        spent = told[-1].spent
        assert spent is not None and spent.tokens == enough, "none is drawn behind a stop text"
    unmet = segments(model, scripted([*ids, 2]), stop=[decoded + "!", decoded[-1] + "?"])
    assert whole(unmet) == Segment(decoded, "stop")


def test_the_last_segment_tells_what_the_text_took(model: Model) -> None:
    *others, last = segments(model, scripted([40, 41, 42, 2]), num_tokens=9)
    assert all(segment.spent is None for segment in others)
    assert last.spent is not None
    assert (last.spent.prompt_tokens, last.spent.tokens) == (len(model.tokenizer.encode(PROMPT)), 3)
    assert 0 < last.spent.first_seconds <= last.spent.seconds
    nothing = segments(model, scripted([2]), num_tokens=9)[-1].spent
    assert nothing is not None and (nothing.tokens, nothing.rate) == (0, 0)


def test_a_rate_is_that_behind_the_first_token() -> None:
    assert Spent(9, 21, 5.0, 15.0).rate == 2
    assert Spent(9, 1, 4.0, 4.0).rate == 0.25


@pytest.mark.parametrize("too_long_by", [0, 1, 10])
def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_shown(
    stand_in: Callable[..., Any], tokenizer: CheckedTokenizer, too_long_by: int
) -> None:
    length = len(tokenizer.encode(PROMPT))
    model = stand_in(vocab_size=320, context_tokens=length - too_long_by)
    with pytest.raises(UsageError, match=rf"prompt has {length} tokens.*holds {length - too_long_by}\."):
        generate(model, tokenizer, PROMPT, [], num_tokens=5, seed=0)


def test_a_prompt_that_is_no_text_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match=r"prompt cannot be read: character 2 of the text is '\\udcff'"):
        generate(model.language_model, model.tokenizer, "a\udcff", [], num_tokens=5, seed=0)


# --- how it is shown ----------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4, 100])
def test_text_comes_in_segments_of_so_many_tokens(model: Model, every: int) -> None:
    ids = model.tokenizer.encode("the weights 😀 scale é in float32 and so on", bos=False)
    told = segments(model, scripted(ids), num_tokens=len(ids), write_every=every)
    assert whole(told).text == " the weights 😀 scale é in float32 and so on"
    *parts, end = told
    assert end == Segment("", "length") and all(part.text for part in parts)
    assert len(parts) <= -(-len(ids) // every)
    assert (len(parts) > 1) == (every < 100)


def test_a_segment_comes_before_the_next_token_is_computed(model: Model) -> None:
    asked = []

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        asked.append(len(tokens))
        return script(logits, tokens)

    script = scripted([40] * 9)
    told = generate(model.language_model, model.tokenizer, PROMPT, [sampler(transform)], num_tokens=9, seed=0)
    next(told)
    assert len(asked) == 1


def test_an_empty_prompt_is_a_begin_token(model: Model) -> None:
    seen: list[list[int]] = []

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        seen.append(list(tokens))
        return logits

    list(generate(model.language_model, model.tokenizer, "", [sampler(transform)], num_tokens=1, seed=0))
    assert seen == [[model.tokenizer.bos]]


def test_dropout_is_off_in_a_model_that_is_being_trained(model: Model, registry: Registry) -> None:
    from mlxlora_core.model import adapters

    other = loading.load(model.folder, registry)
    lora = registry.find("adapter", "lora")
    adapters.attach(other, *configure(lora, {"rank": 4, "dropout": 0.9}), 0)
    other.module.load_weights(
        [(n, mx.ones(t.shape)) for n, t in adapters.trainable(other.module).items()], strict=False
    )
    other.module.train()
    assert text(other) == text(other)
    assert not other.module.training
