"""Which letters and tokens may come in JSON answers, against Python's own reader."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.model.loading import load
from mlxlora_core.plugins import Registry
from mlxlora_core.server import json_grammar
from mlxlora_core.server.faults import ProtocolError
from mlxlora_core.server.json_answers import JsonAnswers, JsonTokens
from mlxlora_core.server.json_grammar import Grammar, State
from mlxlora_core.server.json_schema import grammar_of

LETTERS = '{}[]",:\\ \n\ttrufalsenE+-.0123456789/bx\u00e9\x01'
OBJECTS = Grammar()
BEGIN = OBJECTS.begin(OBJECTS.object)


def read(text: str, grammar: Grammar = OBJECTS, state: State = BEGIN) -> State:
    """The state after a text; empty where a letter may not come."""
    for letter in text:
        state = grammar.step(state, letter)
    return state


def ending(state: State, grammar: Grammar = OBJECTS) -> str:
    """The letters that end a text soonest, each of which makes the rest shorter by one."""
    text = ""
    while state.least:
        nearer = ((letter, grammar.step(state, letter)) for letter in map(chr, range(32, 127)))
        least = state.least
        letter, state = next((one, after) for one, after in nearer if after and after.least == least - 1)
        text += letter
    assert state.may_end
    return text


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
        assert read(text).may_end, text
        state, size = BEGIN, draw.randrange(len(text))
        for place, letter in enumerate(text):
            assert not state.may_end, text[:place]
            assert place != size or is_object(text[:place] + ending(state)), text[:place]
            state = OBJECTS.step(state, letter)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_else_may_come(seed: int) -> None:
    """Objects with a letter changed, put in or left out: as Python reads them, so may they come."""
    draw, refused = random.Random(seed), 0
    for _ in range(2000):
        text = json.dumps({"a": drawn_value(draw, 2), "b": drawn_value(draw, 1)})
        place, letter = draw.randrange(len(text)), draw.choice(LETTERS)
        changed = text[:place] + letter + text[place + draw.randrange(2) :]
        came = read(changed).may_end
        assert came == is_object(changed), changed
        refused += not came
    assert refused > 500


@pytest.mark.parametrize("seed", range(5))
def test_any_way_that_letters_may_take_can_be_ended(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        state, text = BEGIN, ""
        for _ in range(60):
            choices = [(letter, after) for letter in LETTERS if (after := OBJECTS.step(state, letter))]
            if not choices:
                assert state.may_end
                break
            letter, state = draw.choice(choices)
            text += letter
        assert is_object(text + ending(state)), text


def test_lists_within_each_other_have_a_bottom() -> None:
    text = '{"":'
    while read(text + "["):
        text += "["
    assert 20 < text.count("[") < 200
    assert read(text + "1")
    assert is_object(text + ending(read(text)))


# --- schemas ------------------------------------------------------------------

PLACES = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "height": {"type": ["number", "null"]},
        "kind": {"enum": ["hill", "lake", 3, None]},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
        "near": {"$ref": "#/$defs/near"},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
    "$defs": {"near": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "boolean"}}]}},
}


def check_place(found: dict[str, Any]) -> None:
    """Whether a value holds to :data:`PLACES`, said by hand."""
    assert list(found) == [name for name in PLACES["properties"] if name in found]
    assert isinstance(found["name"], str)
    assert 1 <= len(found["tags"]) <= 3 and all(isinstance(tag, str) for tag in found["tags"])
    assert "height" not in found or found["height"] is None or type(found["height"]) in (int, float)
    assert "kind" not in found or found["kind"] in ("hill", "lake", 3, None)
    near = found.get("near", 1)
    assert type(near) is int or all(type(each) is bool for each in near)


def test_whatever_letters_come_hold_to_a_schema() -> None:
    grammar, way = grammar_of(PLACES)
    draw, seen = random.Random(0), set[str]()
    for _ in range(60):
        state, text = grammar.begin(way), ""
        for _ in range(draw.randrange(150)):
            found = [
                (each, after) for each in map(chr, range(32, 127)) if (after := grammar.step(state, each))
            ]
            structure = [each for each in found if not each[0].isalnum()]
            if not found:
                break
            letter, state = draw.choice(structure if structure and draw.random() < 0.5 else found)
            text += letter
        place = json.loads(text + ending(state, grammar))
        check_place(place)
        seen |= place.keys()
    assert seen == PLACES["properties"].keys()


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, ["0", "-12", "7"], ["01", "1.0", "1e3", "x", '"1"']),
        ({"type": "number"}, ["0.5", "-1e-9", "12"], [".5", "1.", "+1"]),
        ({"const": 'a\u00e9"'}, ['"a\\u00e9\\""'], ['"a"']),
        (
            {"type": "array", "items": {"type": "null"}, "minItems": 2},
            ["[null, null]", "[null,null,null]"],
            ["[]", "[null]"],
        ),
        ({"type": "array", "maxItems": 1}, ["[]", "[{}]"], ["[1,1]"]),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"type": "object", "additionalProperties": {"type": "null"}}, ["{}", '{"x": null}'], ['{"x": 1}']),
        ({"type": "object", "additionalProperties": False}, ["{}"], ['{"x": 1}']),
        (
            {"properties": {"a": True, "b": {}}},
            ["{}", '{"b": [1]}', '{"a":1,"b":2}'],
            ['{"b":1,"a":2}', '{"a":1,}'],
        ),
        ({"oneOf": [{"type": "boolean"}, {"const": "true"}]}, ["true", '"true"'], ["null", '"false"']),
        (
            {"enum": ["a", 1, 1.5, True, None, [1]], "type": ["string", "integer"]},
            ['"a"', "1"],
            ["1.5", "true"],
        ),
        ({"const": 1, "enum": [True, 1.0, "1"]}, ["1"], ["true", "1.0"]),
        (
            {
                "oneOf": [
                    {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]},
                    {"type": "object", "properties": {"k": {"enum": ["b", "c"]}}, "required": ["k"]},
                    {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/no"}]},
                ],
                "$defs": {"no": {"type": "null"}},
                "discriminator": {"propertyName": "k"},
            },
            ['{"k": "a"}', '{"k": "c"}', "1.5", "null"],
            ['{"k": "d"}', '"a"'],
        ),
        ({"description": "anything"}, ["1", "[]", '{"a": "b"}'], ["x"]),
    ],
    ids=str,
)
def test_texts_that_hold_to_a_schema_and_others(schema: Any, good: list[str], bad: list[str]) -> None:
    grammar, way = grammar_of(schema)
    for text in good:
        assert read(text, grammar, grammar.begin(way)).may_end, text
    for text in bad:
        assert not read(text, grammar, grammar.begin(way)).may_end, text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "x"},
        {"type": "integer", "minimum": 3},
        {"allOf": [{}]},
        {"type": "thing"},
        {"type": []},
        {"type": {"a": 1}},
        {"enum": []},
        {"type": "object", "properties": [1]},
        {"type": "object", "required": ["a"], "properties": {}},
        {"type": "object", "required": [[]]},
        {"type": "array", "minItems": 3, "maxItems": 2},
        {"type": "array", "minItems": 10**6},
        {"type": "array", "items": [1]},
        {"type": "integer", "const": "x"},
        {"const": "c", "enum": ["a"]},
        {"const": float("inf")},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"oneOf": [{"enum": [1, 2]}, {"enum": [2.0, 3]}]},
        {"oneOf": [{"type": "null"}, {"properties": {"a": {}}}]},
        {"oneOf": [{"type": "object"}, {"type": "object", "properties": {"k": {}}, "required": ["k"]}]},
        {"oneOf": [{"anyOf": [{"type": "string"}, {"type": "array"}]}, {"const": []}]},
        {"$ref": "#/$defs/none"},
        {"$ref": "http://elsewhere.example/x"},
        {"$ref": ["x"]},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
        {"anyOf": [{}] * 2000},
        {"items": {"anyOf": [{"type": ["string", "array"], "items": {"enum": [1]}}] * 33}},
        {"const": "x" * 5000},
        {"items": {"items": 3}},
        3,
        None,
    ],
    ids=lambda schema: str(schema)[:50],
)
def test_schemas_that_cannot_be_held_are_refused(schema: Any) -> None:
    with pytest.raises(ProtocolError) as fault:
        grammar_of(schema)
    assert (fault.value.status, fault.value.param) == (400, "response_format")


def test_a_schema_of_schemas_is_bounded() -> None:
    """Parts that name each other twice over would be 2**25 in all."""
    parts: dict[str, Any] = {
        f"p{n}": {"type": "array", "items": {"anyOf": [{"$ref": f"#/$defs/p{n + 1}"}] * 2}} for n in range(25)
    }
    parts["p25"] = {}
    with pytest.raises(ProtocolError, match="too many parts"):
        grammar_of({"$defs": parts, "$ref": "#/$defs/p0"})


# --- tokens -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(models: Path, registry: Registry) -> JsonTokens:
    """Of the small model."""
    return JsonTokens(load(models / "model", registry).tokenizer)


@pytest.fixture(scope="module")
def answers(tokens: JsonTokens) -> Callable[[Any], JsonAnswers]:
    """A function that gives answers of a schema."""
    return lambda schema: JsonAnswers(tokens, *grammar_of(schema))


BEGINNINGS = ("", "{", '{"', '{"a', '{"a\\', '{"a\\u1', '{"a":', '{"a":1', '{"a":[tr', '{"a":[1,', '{"a":1}')


@pytest.mark.parametrize("before", BEGINNINGS)
def test_which_tokens_may_come_is_what_letter_by_letter_says(
    tokens: JsonTokens, answers: Callable[[Any], JsonAnswers], before: str
) -> None:
    assert tokens.lacks(OBJECTS.letters) == ""
    state = read(before)
    allowed = answers({"type": "object"}).allowed(state, 1000)
    for token, text in enumerate(tokens.texts):
        if token in tokens.stops:
            assert allowed[token] == state.may_end
        else:
            assert allowed[token] == bool(text and read(before + text)), (before, text)


class OddTokens:
    """A tokenizer of tokens that no model has: letters at random, such as quotes in the middle."""

    def __init__(self, draw: random.Random, count: int) -> None:
        odd = [*LETTERS, "\x7f", "\u4e2d", "\ufffd", "\U0001f600"]
        texts = ["".join(draw.choices(odd, k=draw.randrange(1, 7))) for _ in range(count)]
        self.texts = ["", "<end>", *map(chr, range(32, 127)), *texts]
        self.vocab_size, self.stops, self.specials = len(self.texts), frozenset((1,)), frozenset((1,))
        self.special_texts = frozenset(("<end>",))

    def stream(self, ids: list[int]) -> list[str]:
        return [self.texts[token] for token in ids]


@pytest.mark.parametrize("kept", [100_000, 40], ids=["all kept", "all forgotten"])
@pytest.mark.parametrize("schema", [{"type": "object"}, PLACES], ids=["any object", "places"])
def test_tokens_cost_what_their_letters_leave(
    schema: Any, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_grammar, "_MOST_KNOWN", kept)
    draw = random.Random(0)
    tokens = JsonTokens(OddTokens(draw, 3000))  # type: ignore[arg-type]  # what of it is asked for
    grammar, way = grammar_of(schema)
    found = JsonAnswers(tokens, grammar, way)
    for _ in range(8):
        state = found.begin
        for _ in range(draw.randrange(25)):
            nearer = {each: after for each in LETTERS if (after := grammar.step(state, each))}
            state = draw.choice(list(nearer.values())) if nearer else state
        after = [read(text, grammar, state) if text else None for text in tokens.texts]
        wanted = [each.least + 1 if each else None for each in after]
        wanted[1] = 0 if state.may_end else None
        for left in (*range(1, 30), 1000):
            most = max(left - 1, min(cost for cost in wanted if cost is not None))
            allowed = [cost is not None and cost <= most for cost in wanted]
            assert found.allowed(state, left).tolist() == allowed


@pytest.mark.parametrize("most", [3, 4, 9, 40, 150])
@pytest.mark.parametrize("schema", [{"type": "object"}, PLACES], ids=["any object", "places"])
def test_whatever_is_drawn_is_whole_within_its_length(
    tokens: JsonTokens, answers: Callable[[Any], JsonAnswers], most: int, schema: Any
) -> None:
    found, draw, lengths = answers(schema), np.random.default_rng(most), set()
    most = most if schema is not PLACES else most + 25  # {"name":"","tags":[""]} is no shorter
    for _ in range(15):
        change, ids = found.change(), list[int]()
        while len(ids) < most:
            logits = change(mx.array(draw.normal(size=(1, len(tokens.texts))) * 3), ids, most - len(ids))
            token = int(mx.argmax(logits))
            if token in tokens.stops:
                break
            ids.append(token)
        else:
            pytest.fail("it has no end")
        told = json.loads("".join(tokens.texts[token] for token in ids))
        assert isinstance(told, dict)
        if schema is PLACES:
            check_place(told)
        lengths.add(len(ids))
    assert schema is PLACES or most < 40 or len(lengths) > 1


def test_a_length_that_is_too_short_ends_as_near_as_it_can(answers: Callable[[Any], JsonAnswers]) -> None:
    found = answers(PLACES)
    allowed = found.allowed(found.begin, 3)
    assert allowed.any() and not allowed.all()
