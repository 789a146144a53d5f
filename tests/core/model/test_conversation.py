"""A conversation goes on from what was computed of it, and says what one that is read anew says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import small_models
from mlx.utils import tree_map
from small_models import REGISTRY

import mlxlora_core
from mlxlora_core.model import loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.conversation import Conversation
from mlxlora_core.model.generate import PromptTooLong, fitting_ids, follow, generate, whole
from mlxlora_core.model.loading import Model
from mlxlora_core.model.prompt_cache import PromptCache
from mlxlora_core.model.several import AdapterSet
from mlxlora_core.runs.recipe import choose_samplers

SAMPLERS = [(c.component, c.options) for c in choose_samplers("temperature", {"temp": 1.5}, REGISTRY)]
QUESTIONS = ["the weights of a layer", "and the gradient?", "why", "scales the token"]
Reads = list[int]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Opens a small model of a family."""

    def make(family: str) -> Model:
        return loading.load(small_models.write(tmp_path_factory.mktemp("m") / "model", family), REGISTRY)

    return make


def counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> Reads:
    """How many tokens the model reads at a time, from now on."""
    reads: Reads = []
    embed = type(model.language_model).embed

    def counting(self: Any, tokens: mx.array) -> mx.array:
        reads.append(tokens.shape[1])
        return embed(self, tokens)

    monkeypatch.setattr(type(model.language_model), "embed", counting)
    return reads


def answer(conversation: Conversation, question: str, num_tokens: int = 9) -> str:
    return whole(conversation.ask(question, SAMPLERS, num_tokens=num_tokens, seed=4)).text


def anew(model: Model, messages: list[dict[str, str]], num_tokens: int = 9) -> str:
    """The answer of a model that has read nothing yet."""
    language_model = model.language_model
    return whole(
        generate(language_model, model.tokenizer, messages, SAMPLERS, num_tokens=num_tokens, seed=4)
    ).text


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "phi3"])
def test_it_reads_only_what_is_new_and_says_the_same(
    opened: Callable[[str], Model], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(family)
    talk = Conversation(AdapterSet(model), system="user answer")
    for question in QUESTIONS[:3]:
        before = talk.messages
        asked = [*before, {"role": "user", "content": question}]
        ids = fitting_ids(model.language_model, model.tokenizer, asked)
        with monkeypatch.context() as patch:
            reads = counted(model, patch)
            said = answer(talk, question)
        assert talk.messages == [*asked, {"role": "assistant", "content": said}]
        assert said == anew(model, asked)
        if before[1:]:
            old = fitting_ids(model.language_model, model.tokenizer, before[:-1])
            assert sum(reads) < len(ids) - len(old) + 20, "the questions of before are not read again"


def test_each_adapter_has_computed_for_itself(opened: Callable[[str], Model], tmp_path: Path) -> None:
    model = opened("llama")
    folder = model.folder
    for seed in (1, 2):
        one = mlxlora_core.load(folder).attach("lora", rank=2, scale=8.0, seed=seed)
        mx.random.seed(seed)
        made = one.base.module.trainable_parameters()
        one.base.module.update(tree_map(lambda x: 0.3 * mx.random.normal(x.shape), made))
        one.save_adapter(tmp_path / f"{seed}.npz")
    adapters = AdapterSet(model)
    for seed in (1, 2):
        adapters.load(str(seed), AdapterFile(tmp_path / f"{seed}.npz"), REGISTRY)
    talk, said = Conversation(adapters), {}
    for name in ("1", None, "2", "1", "1"):
        talk.adapter = name
        asked = [*talk.messages, {"role": "user", "content": QUESTIONS[0]}]
        said[name] = answer(talk, QUESTIONS[0])
        adapters.select(name)
        assert said[name] == anew(model, asked)
    assert len(set(said.values())) == 3


def test_what_is_left_in_the_middle_is_a_turn_as_far_as_it_came(opened: Callable[[str], Model]) -> None:
    model = opened("llama")
    talk = Conversation(AdapterSet(model))
    with closing(talk.ask(QUESTIONS[0], SAMPLERS, num_tokens=50, seed=4)) as segments:
        assert next(segments).text == "", "the prompt is read"
    assert talk.turns == []
    with closing(talk.ask(QUESTIONS[0], SAMPLERS, num_tokens=50, seed=4)) as segments:
        said = "".join(next(segments).text for _ in range(5))
    assert said and talk.turns[-1] == {"role": "assistant", "content": said}
    asked = [*talk.messages, {"role": "user", "content": QUESTIONS[1]}]
    assert answer(talk, QUESTIONS[1]) == anew(model, asked)
    talk.forget()
    talk.system = "user"
    asked = [{"role": "system", "content": "user"}, {"role": "user", "content": QUESTIONS[1]}]
    assert answer(talk, QUESTIONS[1]) == anew(model, asked)


def test_a_conversation_that_is_too_long_is_refused_and_stays(opened: Callable[[str], Model]) -> None:
    model = opened("llama")
    talk = Conversation(AdapterSet(model))
    answer(talk, QUESTIONS[0])
    turns = [dict(turn) for turn in talk.turns]
    with pytest.raises(PromptTooLong, match="the model's context holds 256"):
        answer(talk, "the weights " * 200)
    assert talk.turns == turns
    assert answer(talk, "why") == anew(model, [*turns, {"role": "user", "content": "why"}])


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_texts_that_begin_alike_for_some_tokens(opened: Callable[[str], Model], family: str) -> None:
    """Shorter, longer, the same again, and of nothing in common."""
    model = opened(family)
    kept, draw = PromptCache(), [5, 9, 14, 200, 31, 77, 8, 120, 33]
    for ids in (draw, draw[:4], draw, [*draw[:6], 50, 51], [99, *draw], [7], [7, 8], draw * 3):
        texts = [
            whole(
                follow(
                    *(model.language_model, model.tokenizer, ids, SAMPLERS),
                    num_tokens=6,
                    seed=1,
                    part_tokens=2,
                    kept=each,
                )
            )
            for each in (kept, None)
        ]
        assert texts[0] == texts[1]
        assert kept.tokens[: len(ids)] == ids


def test_a_fault_in_the_middle_of_the_layers_does_no_harm(
    opened: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened("llama")
    talk = Conversation(AdapterSet(model))
    first = answer(talk, QUESTIONS[0])
    block = type(model.language_model.layers[1])
    call = block.__call__

    def fails(self: Any, *arguments: Any, **more: Any) -> Any:
        if self is model.language_model.layers[1]:
            raise MemoryError
        return call(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(block, "__call__", fails)
        with pytest.raises(MemoryError):
            answer(talk, QUESTIONS[1])
    assert talk.turns[-1]["content"] == first
    asked = [*talk.messages, {"role": "user", "content": QUESTIONS[2]}]
    assert answer(talk, QUESTIONS[2]) == anew(model, asked)
