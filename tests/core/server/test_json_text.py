"""Which letters may come in a JSON object, against Python's own reader."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.model.loading import load
from mlxlora_core.plugins import Registry
from mlxlora_core.server.json_answers import JsonTokens, as_json
from mlxlora_core.server.json_text import BEGIN, DONE, State, ending, step

LETTERS = '{}[]",:\\ \n\ttrufalsenE+-.0123456789/bx\u00e9\x01'


def read(text: str) -> State | None:
    """The state after a text; None where a letter may not come."""
    state: State | None = BEGIN
    for letter in text:
        if state is None:
            return None
        state = step(state, letter)
    return state


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def drawn_value(draw: random.Random, depth: int) -> Any:
    kinds = [None, True, False, draw.randrange(-5, 999), draw.random() * 1e-9, "", 'a"\\\u00e9\n']
    if depth:
        kinds += [[drawn_value(draw, depth - 1) for _ in range(draw.randrange(4))]] * 4
        kinds += [{str(n): drawn_value(draw, depth - 1) for n in range(draw.randrange(4))}] * 4
    return draw.choice(kinds)


@pytest.mark.parametrize("seed", range(5))
def test_every_object_may_come(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        value = {"": drawn_value(draw, 3)}
        text = json.dumps(value, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1, "\t"]))
        state = read(text)
        assert state is not None and state.place == DONE, text
        for size in range(len(text)):
            before = read(text[:size])
            assert before is not None and before.place != DONE, text[:size]
            assert is_object(text[:size] + ending(before)), text[:size]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_else_may_come(seed: int) -> None:
    """Objects with a letter changed, put in or left out: as Python reads them, so may they come."""
    draw, refused = random.Random(seed), 0
    for _ in range(2000):
        text = json.dumps({"a": drawn_value(draw, 2), "b": drawn_value(draw, 1)})
        place, letter = draw.randrange(len(text)), draw.choice(LETTERS)
        changed = text[:place] + letter + text[place + draw.randrange(2) :]
        state = read(changed)
        came = state is not None and state.place == DONE
        assert came == is_object(changed), changed
        refused += not came
    assert refused > 500


@pytest.mark.parametrize("seed", range(5))
def test_any_way_that_letters_may_take_can_be_ended(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        state, text = BEGIN, ""
        for _ in range(60):
            choices = [(letter, after) for letter in LETTERS if (after := step(state, letter)) is not None]
            if not choices:
                assert state.place == DONE
                break
            letter, state = draw.choice(choices)
            text += letter
        assert is_object(text + ending(state)), text


def test_objects_within_each_other_have_a_bottom() -> None:
    text, state = "", BEGIN
    while (after := step(state, "{")) is not None:
        text, state = text + '{"":', after
        for letter in '"":':
            following = step(state, letter)
            assert following is not None
            state = following
    assert 10 < text.count("{") <= 64
    assert is_object(text + ending(state))


# --- tokens -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(models: Path, registry: Registry) -> tuple[JsonTokens, Any]:
    """Of the small model, and its tokenizer."""
    tokenizer = load(models / "model", registry).tokenizer
    return JsonTokens(tokenizer), tokenizer


def test_which_tokens_may_come_is_what_letter_by_letter_says(tokens: tuple[JsonTokens, Any]) -> None:
    found, tokenizer = tokens
    assert found.lacks == ""
    for before in (
        "",
        "{",
        '{"',
        '{"a',
        '{"a\\',
        '{"a\\u1',
        '{"a":',
        '{"a":1',
        '{"a":[tr',
        '{"a":[1,',
        '{"a":1}',
    ):
        state = read(before)
        assert state is not None
        allowed = found.allowed(state, 1000)
        for token in range(tokenizer.vocab_size):
            text = "" if token in tokenizer.specials else "".join(tokenizer.stream([token]))
            if token in tokenizer.stops:
                assert allowed[token] == (state.place == DONE)
            elif text and text not in tokenizer.special_texts:
                assert allowed[token] == (read(before + text) is not None), (before, text)
            else:
                assert not allowed[token]


@pytest.mark.parametrize("most", [3, 4, 9, 40, 150])
def test_whatever_is_drawn_is_whole_within_its_length(tokens: tuple[JsonTokens, Any], most: int) -> None:
    found, tokenizer = tokens
    draw = np.random.default_rng(most)
    lengths = set()
    for _ in range(15):
        change, ids = as_json(found), list[int]()
        while len(ids) < most:
            logits = change(mx.array(draw.normal(size=(1, tokenizer.vocab_size)) * 3), ids, most - len(ids))
            token = int(mx.argmax(logits))
            if token in tokenizer.stops:
                break
            ids.append(token)
        else:
            pytest.fail("it has no end")
        assert is_object("".join(tokenizer.stream(ids))), ids
        lengths.add(len(ids))
    assert most < 9 or len(lengths) > 1
