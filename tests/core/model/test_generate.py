from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora_core.errors import UsageError
from mlxlora_core.model import folder as folders
from mlxlora_core.model import generate as generate_module
from mlxlora_core.model.folder import Model
from mlxlora_core.model.generate import decode, generate, whole
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.registry import Registry

PROMPT = "Q: what scales the weights?\nA:"


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path], registry: Registry) -> Model:
    return folders.load(model_folder(), registry)


def greedy(logits: mx.array, tokens: Sequence[int], key: mx.array) -> mx.array:
    return mx.argmax(logits, axis=-1)


def drawn(logits: mx.array, tokens: Sequence[int], key: mx.array) -> mx.array:
    return mx.random.categorical(logits, key=key)


def text(model: Model, sample: Any = drawn, **options: Any) -> str:
    settings = {"num_tokens": 30, "seed": 0, **options}
    return "".join(generate(model.language_model, model.tokenizer, PROMPT, sample, **settings))


def scripted(ids: Sequence[int]) -> Any:
    """A sampler that gives these ids whatever the model says."""
    rest = iter(ids)
    return lambda logits, tokens, key: mx.array([next(rest)])


# --- what follows -------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_whatever_was_drawn_before(model: Model) -> None:
    first = text(model)
    mx.random.seed(9)
    mx.random.uniform()
    assert text(model) == first
    assert text(model, seed=1) != first


def test_greedy_tokens_are_those_of_the_whole_sequence_run_again_each_time(model: Model) -> None:
    prompt = model.tokenizer.encode(PROMPT)
    ids = list(decode(model.language_model, prompt, greedy, num_tokens=40, seed=0, stops=()))
    for i, id in enumerate(ids):
        logits = model.language_model(mx.array([prompt + ids[:i]]))
        assert int(mx.argmax(logits[0, -1])) == id
    assert len(set(ids)) > 3


def test_a_prompt_is_read_in_parts_as_well_as_whole(
    model: Model, stand_in: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(language_model: Any) -> list[int]:
        prompt = [1, 5, 9, 30, 2, 7, 7, 8, 11, 40]
        return list(decode(language_model, prompt, greedy, num_tokens=20, seed=0, stops=()))

    for language_model in (model.language_model, stand_in()):
        whole = ids(language_model)
        for length in (1, 3, 10):
            monkeypatch.setattr(generate_module, "PREFILL_TOKENS", length)
            assert ids(language_model) == whole


def test_the_sampler_gets_the_ids_so_far_a_key_of_its_own_and_float32(model: Model) -> None:
    prompt = model.tokenizer.encode(PROMPT)
    seen = []

    def sample(logits: mx.array, tokens: Sequence[int], key: mx.array) -> mx.array:
        seen.append((list(tokens), tuple(key.tolist())))
        assert (logits.shape, logits.dtype) == ((1, 320), mx.float32)
        return mx.array([10 + len(seen)])

    decoded = list(decode(model.language_model, prompt, sample, num_tokens=4, seed=3, stops=()))
    assert decoded == [11, 12, 13, 14]
    assert [tokens for tokens, _ in seen] == [prompt + decoded[:i] for i in range(4)]
    assert len({key for _, key in seen}) == 4


def test_nothing_is_computed_that_nobody_asked_for(stand_in: Callable[..., Any]) -> None:
    model = stand_in()
    runs = []
    inner = model.run
    model.run = lambda hidden, **cache: runs.append(hidden.shape[1]) or inner(hidden, **cache)
    assert len(list(decode(model, [1, 5, 9], greedy, num_tokens=4, seed=0, stops=()))) == 4
    assert runs == [3, 1, 1, 1]


# --- where it ends ------------------------------------------------------------


def test_it_ends_at_an_end_token_which_is_not_shown(model: Model) -> None:
    ids = model.tokenizer.encode("the weights", bos=False)
    sample = scripted([*ids, 2, 50, 51])
    assert text(model, sample) == " the weights"
    rest = scripted([40, 41, 2, 42])
    decoded = decode(model.language_model, [1], rest, num_tokens=9, seed=0, stops={2, 7})
    assert list(decoded) == [40, 41]


def test_it_ends_after_as_many_tokens_as_were_asked_for(model: Model) -> None:
    for count in (1, 2, 17):
        segments = generate(
            model.language_model, model.tokenizer, PROMPT, scripted([40] * 99), num_tokens=count, seed=0
        )
        assert "".join(segments) == model.tokenizer.decode([40] * count)


def test_it_ends_where_the_context_is_full(stand_in: Callable[..., Any], tokenizer: CheckedTokenizer) -> None:
    length = len(tokenizer.encode(PROMPT))
    for room in (1, 5):
        model = stand_in(vocab_size=320, context_tokens=length + room)
        segments = generate(model, tokenizer, PROMPT, scripted([40] * 99), num_tokens=50, seed=0)
        assert "".join(segments) == tokenizer.decode([40] * room)
    unlimited = stand_in(vocab_size=320, context_tokens=None)
    segments = generate(unlimited, tokenizer, PROMPT, scripted([40] * 99), num_tokens=50, seed=0)
    assert "".join(segments) == tokenizer.decode([40] * 50)


@pytest.mark.parametrize(
    ("ids", "num_tokens", "ended"), [((40, 2), 9, True), ((40, 2), 2, True), ((40, 41), 2, False)]
)
def test_it_tells_whether_an_end_token_ended_it(
    model: Model, ids: tuple[int, ...], num_tokens: int, ended: bool
) -> None:
    assert model.tokenizer.stops == {2}
    segments = generate(
        model.language_model, model.tokenizer, PROMPT, scripted(ids), num_tokens=num_tokens, seed=0
    )
    said = model.tokenizer.decode([id for id in ids if id != 2])
    assert whole(segments) == (said, ended)


def test_a_full_context_is_no_end(stand_in: Callable[..., Any], tokenizer: CheckedTokenizer) -> None:
    model = stand_in(vocab_size=320, context_tokens=len(tokenizer.encode(PROMPT)) + 3)
    segments = generate(model, tokenizer, PROMPT, scripted([40] * 9), num_tokens=50, seed=0)
    assert whole(segments) == (tokenizer.decode([40] * 3), False)


@pytest.mark.parametrize("too_long_by", [0, 1, 10])
def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_shown(
    stand_in: Callable[..., Any], tokenizer: CheckedTokenizer, too_long_by: int
) -> None:
    length = len(tokenizer.encode(PROMPT))
    model = stand_in(vocab_size=320, context_tokens=length - too_long_by)
    with pytest.raises(UsageError, match=rf"prompt has {length} tokens.*holds {length - too_long_by}\."):
        generate(model, tokenizer, PROMPT, greedy, num_tokens=5, seed=0)


def test_a_prompt_that_is_no_text_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match=r"prompt cannot be read: character 2 of the text is '\\udcff'"):
        generate(model.language_model, model.tokenizer, "a\udcff", greedy, num_tokens=5, seed=0)


# --- how it is shown ----------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4, 100])
def test_text_comes_in_segments_of_so_many_tokens(model: Model, every: int) -> None:
    ids = model.tokenizer.encode("the weights 😀 scale é in float32 and so on", bos=False)
    segments = list(
        generate(
            model.language_model,
            model.tokenizer,
            PROMPT,
            scripted(ids),
            num_tokens=len(ids),
            seed=0,
            write_every=every,
        )
    )
    assert "".join(segments) == " the weights 😀 scale é in float32 and so on"
    assert len(segments) <= -(-len(ids) // every)
    assert (len(segments) > 1) == (every < 100)


def test_an_empty_prompt_is_a_begin_token(model: Model) -> None:
    seen: list[list[int]] = []

    def sample(logits: mx.array, tokens: Sequence[int], key: mx.array) -> mx.array:
        seen.append(list(tokens))
        return mx.array([40])

    list(generate(model.language_model, model.tokenizer, "", sample, num_tokens=1, seed=0))
    assert seen == [[model.tokenizer.bos]]


def test_dropout_is_off_in_a_model_that_is_being_trained(model: Model, registry: Registry) -> None:
    from mlxlora_core.model import adapters

    other = folders.load(model.folder, registry)
    lora = registry.find("adapter", "lora")
    adapters.attach(other, lora, lora.spec.options(rank=4, dropout=0.9), 0)
    other.module.load_weights(
        [(n, mx.ones(t.shape)) for n, t in adapters.trainable(other.module).items()], strict=False
    )
    other.module.train()
    assert text(other, greedy) == text(other, greedy)
    assert not other.module.training
