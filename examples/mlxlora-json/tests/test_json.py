"""The conformance suite over sampler ``json``, and its texts held against Python's own JSON."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlxlora_json
import numpy as np
import pytest
from mlxlora_json import JsonOptions, masks
from mlxlora_json.grammar import Grammar, State

from mlxlora_core.api import UsageError
from mlxlora_core.testing.sampler import SamplerSuite
from mlxlora_core.testing.small_tokenizer import SmallTokenizer

WORDS = SmallTokenizer()
FIELDS = ("name:string", "year:integer?", "tags:array", "more:any")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_WIDE = re.compile(r"(?<![,:])[ ]|[ ](?=[ ])|[\t\n\r]")


class TestJson(SamplerSuite):
    """Sampler ``json``."""

    spec = next(iter(mlxlora_json.mlxlora_samplers()))
    option_sets = ({}, {"form": "any", "within": 4}, {"fields": list(FIELDS), "form": "array", "depth": 3})
    bad_options: Sequence[dict[str, Any]] = (
        {"form": "xml"},
        {"within": 3},
        {"depth": 0},
        {"fields": ["year:date"]},
        {"fields": [":string"]},
        {"fields": ["a:string", "a:number"]},
        {"fields": ["a"], "form": "any"},
        {"fields": ["a:array"], "depth": 1},
        {"fields": ["a"], "form": "array", "depth": 1},
    )


def grammar(**options: Any) -> Grammar:
    """Of these options."""
    given = JsonOptions(**options)
    return Grammar(given.form, given.typed(), given.depth)


def read(form: Grammar, text: str) -> State | None:
    """The state after a text; None where it may not come."""
    state: State | None = form.begin
    for letter in text:
        if state is None:
            return None
        state = form.step(state, letter)
    return state


def accepts(form: Grammar, text: str) -> bool:
    """Whether it is a whole text of the form."""
    state = read(form, text)
    return state is not None and form.may_end(state)


# --- the grammar --------------------------------------------------------------


def value(draw: random.Random, depth: int) -> Any:
    """Any JSON value."""
    kind = draw.randrange(8 if depth else 6)
    if kind == 6:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 7:
        return {word(draw): value(draw, depth - 1) for _ in range(draw.randrange(4))}
    number = draw.choice([0, -1, 17, 10**30, 1.5, -2e-9, 6.02e23])
    return draw.choice([word(draw), number, True, False, None])


def word(draw: random.Random) -> str:
    """Letters that JSON writes in all its ways."""
    return "".join(draw.choice('aé"\\\n\t\x01/{}[]:, \U0001f600') for _ in range(draw.randrange(6)))


def damaged(draw: random.Random, text: str) -> str:
    """A text with a letter put in, taken out or changed."""
    place = draw.randrange(len(text))
    return text[:place] + draw.choice([*' {}[]",:\\-+.0123eEtnu\n', ""]) + text[place + draw.randrange(2) :]


def is_json_on_a_line(text: str) -> bool:
    """As Python's own reader says, with blanks only behind commas, colons and at the start."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return not _WIDE.search(_STRING.sub("0", text.removeprefix(" ")))


def test_it_takes_what_python_takes_and_nothing_else() -> None:
    """Texts that Python writes, and 20 000 damaged ones."""
    draw, form, taken = random.Random(1), grammar(form="any", depth=64), 0
    for _ in range(2000):
        text = json.dumps(value(draw, 4), ensure_ascii=draw.random() < 0.1)
        assert ("\\ud83d" in text) or accepts(form, text), text
        for _ in range(10):
            other = damaged(draw, text)
            taken += accepts(form, other)
            if "\\u" not in other:  # of halves of a pair, see below
                assert accepts(form, other) == is_json_on_a_line(other), other
    assert taken > 1000


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('"\\u00e9"', True),
        ('"\\uD7ff"', True),
        ('"\\ud800"', False),
        ('"\\uDe00"', False),
        ('"\\ue000"', True),
    ],
)
def test_no_escape_of_half_a_pair(text: str, taken: bool) -> None:
    """Python would take it and make what is no text of it."""
    assert accepts(grammar(form="any"), text) is taken


def test_the_least_is_the_least() -> None:
    """Found by trying all letters, from states on the way through many texts."""
    draw = random.Random(2)
    for form in (grammar(form="any"), grammar(fields=FIELDS), grammar(form="array", fields=FIELDS[:1])):
        for _ in range(25):
            state, left = form.begin, draw.randrange(12)
            while left and (letters := steps(form, state)):
                state, left = form.step(state, draw.choice(letters)) or (), left - 1
            assert form.least(state) == shortest(form, state)


@pytest.mark.parametrize(
    "text", ['["\\', '["\\u', '["\\ud', '["\\u0', '["\\ud0', '["\\u00', '["\\u000', "[-", "[1e", "[tr"]
)
def test_the_least_in_the_middle_of_a_symbol(text: str) -> None:
    """Of escapes, numbers and words."""
    form = grammar(form="array")
    state = read(form, text)
    assert state is not None and form.least(state) == shortest(form, state)


def steps(form: Grammar, state: State) -> list[str]:
    """The letters that may come."""
    return [letter for letter in map(chr, range(32, 127)) if form.step(state, letter) is not None]


def shortest(form: Grammar, state: State) -> int:
    """How few letters end a text, a breadth at a time; only those that bring the end nearer are followed."""
    count, states = 0, {state}
    while not any(form.may_end(each) for each in states):
        following = {form.step(each, letter) for each in states for letter in steps(form, each)}
        states = {each for each in following if each is not None}
        best = min(map(len, states))
        states = {each for each in states if len(each) <= best + 1}
        count += 1
    return count


def test_fields_come_in_their_order_and_no_others() -> None:
    """With their types, and null where it may be."""
    form = grammar(fields=FIELDS)
    assert accepts(form, '{"name": "Ada", "year": 1815, "tags": [1, "a"], "more": {"x": []}}')
    assert accepts(form, '{"name":"","year":null,"tags":[],"more":-0.5}')
    for text in (
        "{}",
        '{"name": "Ada"}',
        '{"name": null, "year": 1, "tags": [], "more": 1}',
        '{"name": "", "year": 1.5, "tags": [], "more": 1}',
        '{"name": "", "year": 1, "tags": {}, "more": 1}',
        '{"year": 1, "name": "", "tags": [], "more": 1}',
        '{"name": "", "year": 1, "tags": [], "more": 1, "x": 1}',
    ):
        assert not accepts(form, text), text
    many = grammar(form="array", fields=["a:boolean"])
    assert accepts(many, "[]") and accepts(many, '[{"a": true}, {"a": false}]')
    assert not accepts(many, "[{}]") and not accepts(many, '{"a": true}')


def test_names_are_written_as_json_has_them() -> None:
    """Quotes and letters beyond ASCII in a name, and a colon."""
    form = grammar(fields=['a"b:string', "é", "c:d:null"[:-5] + ":integer"])
    assert accepts(form, '{"a\\"b": "", "\\u00e9": [], "c:d": 1}')


def test_depth() -> None:
    """Lists and objects in each other, and no more."""
    form = grammar(form="any", depth=2)
    assert accepts(form, '[{"a": 1}, []]')
    assert read(form, '[{"a": [') is None and read(form, "[[[") is None


# --- tokens -------------------------------------------------------------------


def text_of(options: JsonOptions, seed: int, strength: float = 3.0) -> tuple[str, int]:
    """What comes of random logits that change at every token, behind a prompt, and of how many tokens."""
    draw = np.random.default_rng(seed)
    change = masks.transform(options, WORDS)
    tokens = WORDS.encode("Once upon a time")
    begin = len(tokens)
    while tokens[-1] not in WORDS.stops:
        logits = mx.array(draw.normal(0, strength, (1, WORDS.vocab_size)).astype(np.float32))
        tokens.append(
            int(mx.random.categorical(change(logits, tuple(tokens)), key=mx.random.key(len(tokens))))
        )
        assert len(tokens) - begin <= options.within
    return WORDS.decode(tokens[begin:]), len(tokens) - begin


@pytest.mark.parametrize("within", [40, 70, 200])
def test_whatever_the_model_would_say_it_is_whole(within: int) -> None:
    """Within the tokens that there are, of the fields that were named; others than those never come."""
    options = JsonOptions(fields=("name:string", "year:integer", "ok:boolean?"), within=within)
    for seed in range(20):
        text, _ = text_of(options, seed)
        found = json.loads(text)
        assert list(found) == ["name", "year", "ok"]
        assert isinstance(found["name"], str) and type(found["year"]) is int
        assert found["ok"] in (True, False, None)


@pytest.mark.parametrize(("form", "kind"), [("object", dict), ("array", list), ("any", object)])
def test_texts_of_any_form_are_whole(form: str, kind: type) -> None:
    """The smallest room as well as a large one."""
    for within in (4, 9, 150):
        for seed in range(10):
            assert isinstance(json.loads(text_of(JsonOptions(form=form, within=within), seed)[0]), kind)


def test_every_text_may_come() -> None:
    """Of a text of the grammar no token is forbidden where there is room."""
    options = JsonOptions(form="any", within=100)
    ids = WORDS.encode('{"a": [1, true, null, "b c"], "d": -2.5e3}', bos=False, eos=True)
    change, tokens = masks.transform(options, WORDS), [0]
    for token in ids:
        assert change(mx.zeros((1, WORDS.vocab_size)), tuple(tokens))[0, token] == 0
        tokens.append(token)


def test_only_an_end_follows_the_end() -> None:
    """Also where a caller goes on asking."""
    change = masks.transform(JsonOptions(), WORDS)
    change(mx.zeros((1, WORDS.vocab_size)), (0,))
    tokens = (0, *WORDS.encode("{}", bos=False, eos=True))
    left = np.flatnonzero(np.array(change(mx.zeros((1, WORDS.vocab_size)), tokens))[0] == 0)
    assert left.tolist() == sorted(WORDS.stops)


# --- what is refused ----------------------------------------------------------


def test_too_few_tokens_for_any_text() -> None:
    """With how many it takes."""
    with pytest.raises(
        UsageError, match=r"the shortest text takes 12 tokens, within is 11\b.* set within=12"
    ):
        masks.transform(JsonOptions(fields=("name:string",), within=11), WORDS)
    text, count = text_of(JsonOptions(fields=("name:string",), within=12), 0)
    assert list(json.loads(text)) == ["name"] and count <= 12


class Letterless(SmallTokenizer):
    """Without a token for a brace alone, and with tokens of half letters."""

    def stream(self, ids: Any, every: int = 1) -> Any:
        """As the other one, but for some."""
        given = list(ids)
        return iter(["\ufffd"]) if self.decode(given) in ("}", "$") else super().stream(given, every)


def test_a_vocabulary_without_the_letters() -> None:
    """Nothing could be ended with it."""
    with pytest.raises(UsageError, match="the tokenizer has no token for } alone"):
        masks.transform(JsonOptions(), Letterless())


def test_tokens_that_are_no_text_never_come() -> None:
    """Begin and end ids, and what is no whole letter."""
    words = masks.Vocabulary(Letterless())
    silent = {0, 1, *WORDS.encode("$", bos=False), *WORDS.encode("}", bos=False)}
    assert {i for i, text in enumerate(words.texts) if not text} == silent
