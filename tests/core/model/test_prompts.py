from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import DataError, UsageError
from mlxlora_core.model import loading
from mlxlora_core.model.generate import generate, whole
from mlxlora_core.model.prompts import continued, is_taken, prompt_ids, words_on
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.plugins import Registry
from mlxlora_core.training.settings import ChatConfig

HELLO = [{"role": "user", "content": "Hello"}]
ANSWERED = [*HELLO, {"role": "assistant", "content": "Hi."}]


def test_a_text_has_a_begin_id_and_messages_have_the_form_of_the_tokenizer(
    tokenizer: CheckedTokenizer,
) -> None:
    assert prompt_ids(tokenizer, "Hello") == tokenizer.encode("Hello")
    assert prompt_ids(tokenizer, HELLO) == tokenizer.encode("[INST] Hello [/INST]")


def test_messages_that_end_with_an_answer_ask_nothing(tokenizer: CheckedTokenizer) -> None:
    with pytest.raises(DataError, match="must not end with an answer"):
        prompt_ids(tokenizer, ANSWERED)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("A: ", "the weights"),
        ("A:  ", "a layer"),
        ("A: ", " the weights"),
        ("th", "e"),
        ("the weigh", "ts"),
        ("", "the"),
        ("the", ""),
        ("A:\n", "the"),
        ("A:\t", "the"),
        ("4", "2"),
        ("é", "\u0301x"),
        ("😀", "😀"),
        ("  ", "  "),
        ("A: ", "</s>"),
    ],
)
def test_a_prompt_keeps_its_ids_and_the_two_their_text(
    tokenizer: CheckedTokenizer, prompt: str, completion: str
) -> None:
    found = continued(tokenizer, prompt, completion)
    together = tokenizer.encode(prompt + completion, eos=True)
    assert found.asked == tokenizer.encode(prompt)
    assert found.answered[-1] == 2
    assert tokenizer.decode([*found.asked, *found.answered]) == prompt + completion
    assert "".join(tokenizer.stream(found.answered)) == (completion if prompt else f" {completion}")
    assert found.apart is (together[: len(found.asked)] != found.asked)
    assert found.apart or [*found.asked, *found.answered] == together


def test_some_of_these_would_be_joined(tokenizer: CheckedTokenizer) -> None:
    assert continued(tokenizer, "A: ", "the weights").apart
    assert continued(tokenizer, "th", "e").apart
    assert not continued(tokenizer, "A:", " the weights").apart


# --- what is told of a prompt ---------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("Q: what?", []),
        ("<s>[INST] Hi [/INST]", ["<s>, [/INST], [INST] in the prompt is text"]),
        ("a \u2581 b", ["lacks or changes characters of the prompt"]),
        ([{"role": "user", "content": "a </s>"}], ["</s> in the prompt is text"]),
    ],
)
def test_a_prompt_that_says_something_else_than_it_seems_to_is_told(
    tokenizer: CheckedTokenizer, prompt: Any, says: list[str]
) -> None:
    words = list(words_on(tokenizer, prompt))
    assert len(words) == len(says)
    assert all(part in line for part, line in zip(says, words, strict=True))
    if isinstance(prompt, str) and words and "is text" in words[0]:
        assert "--chat asks" in words[0]


class TakesTheEnd:
    """A tokenizer that takes a text for a token, as one with user-defined pieces does."""

    vocab_size, bos, stops, fingerprint = 300, None, frozenset([299]), "x"
    special_texts = frozenset(["<PRE>"])

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        first, *rest = text.split("<PRE>")
        ids = list(first.encode())
        for part in rest:
            ids += [298, *part.encode()]
        return ids + [299] * eos

    def decode(self, ids: Any) -> str:
        return "".join("<PRE>" if i == 298 else "" if i == 299 else chr(i) for i in ids)


def test_a_text_that_becomes_a_token_is_told_as_such(tokenizer: CheckedTokenizer) -> None:
    taking = CheckedTokenizer(tokenizer.component, {}, TakesTheEnd())
    assert is_taken(taking, "<PRE>") and not is_taken(taking, "</s>")
    (line,) = words_on(taking, "a <PRE> b")
    assert line == "warning: <PRE> in the prompt is taken for the token of that name"


# --- asking ---------------------------------------------------------------------


def test_a_chat_is_one_question_behind_a_system_message() -> None:
    assert ChatConfig().asked("Hello") == "Hello"
    assert ChatConfig(chat=True).asked("Hello") == HELLO
    system = {"role": "system", "content": "Be brief."}
    assert ChatConfig(chat=True, system="Be brief.").asked("Hello") == [system, *HELLO]
    with pytest.raises(ValueError, match="system needs chat"):
        ChatConfig(system="Be brief.")


def test_messages_are_answered_as_the_text_of_their_form_is(
    model_folder: Callable[..., Path], registry: Registry
) -> None:
    model = loading.load(model_folder(), registry)

    def said(prompt: Any) -> str:
        segments = generate(model.language_model, model.tokenizer, prompt, [], num_tokens=9, seed=1)
        return whole(segments).text

    assert said(HELLO) == said("[INST] Hello [/INST]") != said("Hello")
    for odd in (ANSWERED, [], [*HELLO, *HELLO]):
        with pytest.raises(UsageError, match="the prompt cannot be read"):
            said(odd)
