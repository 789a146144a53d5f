"""The protocol over HTTP, on a small model: chats, completions, streams, errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served_models import ADAPTERS, NO_END, ServerProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "the layer scales"}]
PLAIN = {"model": "model", "prompt": "the layer scales", "max_tokens": 12, "seed": 3, "logit_bias": NO_END}
TALK = {"model": "model", "messages": HELLO, "max_tokens": 12, "seed": 3, "logit_bias": NO_END}


# --- models -------------------------------------------------------------------


def test_base_and_adapters_are_models_of_their_own(server: ServerProcess) -> None:
    status, _, body = server.request("GET", "/v1/models")
    models = json.loads(body)["data"]
    assert status == 200
    assert [model["id"] for model in models] == ["model", *ADAPTERS]
    assert [model["mlxlora"]["kind"] for model in models] == ["base", *["adapter"] * 3]
    assert all(model["object"] == "model" and model["mlxlora"]["template"] for model in models)
    one = json.loads(server.request("GET", "/v1/models/second")[2])
    assert one == models[2]
    assert server.request("GET", "/v1/models/fourth")[0] == 404
    texts = {server.text(**{**PLAIN, "model": name}) for name in ("model", *ADAPTERS)}
    assert len(texts) == 4, "each says something else"


# --- what is drawn ------------------------------------------------------------


def test_a_seed_decides_the_text(server: ServerProcess) -> None:
    first = server.text(**PLAIN)
    assert server.text(**PLAIN) == first
    assert server.text(**{**PLAIN, "seed": 4}) != first
    assert server.text(**{**PLAIN, "seed": 3 + 2**32}) == first
    by_chance = {**PLAIN, "seed": None, "temperature": 2}
    assert len({server.text(**by_chance) for _ in range(3)}) > 1


def test_choices_are_drawn_with_the_seeds_that_follow(server: ServerProcess) -> None:
    asked = {**PLAIN, "prompt": ["the layer", "of the gradient"], "n": 3}
    choices = server.post(COMPLETIONS, asked)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    alone = [
        server.text(**{**PLAIN, "prompt": prompt, "seed": 3 + 3 * row + n})
        for row, prompt in enumerate(asked["prompt"])
        for n in range(3)
    ]
    assert [choice["text"] for choice in choices] == alone


def test_temperature_zero_is_the_most_likely_token(server: ServerProcess) -> None:
    asked = {**PLAIN, "temperature": 0, "logprobs": 1}
    told = server.post(COMPLETIONS, asked)["choices"][0]["logprobs"]
    best = [next(iter(top)) for top in told["top_logprobs"]]
    assert told["tokens"][:1] == best[:1]
    likely = server.text(**{**PLAIN, "temperature": 0})
    assert server.text(**{**PLAIN, "top_k": 1}) == likely
    assert server.text(**{**PLAIN, "top_p": 0}) == likely
    assert server.text(**{**PLAIN, "min_p": 1}) == likely
    assert server.text(**{**PLAIN, "seed": 9, "temperature": 0}) == likely


def test_penalties_and_biases_change_the_text(server: ServerProcess) -> None:
    likely = {**PLAIN, "temperature": 0, "max_tokens": 40}
    text = server.text(**likely)
    for name, value in (("frequency_penalty", 2), ("presence_penalty", 2), ("repetition_penalty", 5)):
        assert server.text(**{**likely, name: value}) != text, name
    told = server.post(COMPLETIONS, {**likely, "logit_bias": {**NO_END, "70": 100}})["choices"][0]
    assert len(set(told["text"])) == 1, "one token for good"


def test_an_answer_ends_before_a_stop_text(server: ServerProcess) -> None:
    whole = server.post(CHAT, {**TALK, "max_tokens": 40, "logprobs": True})["choices"][0]
    text = whole["message"]["content"]
    assert whole["finish_reason"] == "length"
    stop = text[len(text) // 2 :][:2]
    cut = server.post(CHAT, {**TALK, "max_tokens": 40, "logprobs": True, "stop": [stop, "nowhere"]})
    choice = cut["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == text[: text.index(stop)]
    tokens = "".join(token["token"] for token in choice["logprobs"]["content"])
    assert tokens.startswith(choice["message"]["content"])
    assert stop not in tokens or not tokens.endswith(stop)


def test_a_system_message_and_parts_are_read(server: ServerProcess) -> None:
    base = server.post(CHAT, TALK)
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "the layer"}, {"type": "text", "text": " scales"}],
        }
    ]
    assert server.post(CHAT, {**TALK, "messages": parts})["choices"] == base["choices"]
    system = [{"role": "system", "content": "of"}, *HELLO]
    other = server.post(CHAT, {**TALK, "messages": system})
    assert other["usage"]["prompt_tokens"] > base["usage"]["prompt_tokens"]
    developer = [{"role": "developer", "content": "of"}, *HELLO]
    assert server.post(CHAT, {**TALK, "messages": developer})["choices"] == other["choices"]


def test_a_prompt_may_be_token_ids(server: ServerProcess) -> None:
    ids = [0, 70, 71, 72]
    answer = server.post(COMPLETIONS, {**PLAIN, "prompt": ids})
    assert answer["usage"]["prompt_tokens"] == 4
    assert server.post(COMPLETIONS, {**PLAIN, "prompt": [ids]})["choices"] == answer["choices"]


# --- log-probabilities and usage ----------------------------------------------


def test_log_probabilities_of_tokens(server: ServerProcess) -> None:
    choice = server.post(CHAT, {**TALK, "logprobs": True, "top_logprobs": 3})["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == choice["message"]["content"]
    for token in content:
        best = [other["logprob"] for other in token["top_logprobs"]]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        assert token["logprob"] <= best[0] <= 0
        assert token["bytes"] is None or bytes(token["bytes"]).decode() == token["token"]
    told = server.post(COMPLETIONS, {**PLAIN, "logprobs": 2})["choices"][0]
    table = told["logprobs"]
    assert "".join(table["tokens"]) == told["text"]
    assert [
        told["text"][place:].startswith(t)
        for place, t in zip(table["text_offset"], table["tokens"], strict=True)
    ]
    assert server.post(CHAT, TALK)["choices"][0]["logprobs"] is None


def test_usage_tells_what_was_cached(server: ServerProcess) -> None:
    prompt = " ".join(["gradient"] * 150)
    asked = {**PLAIN, "prompt": prompt, "max_tokens": 2, "n": 1}
    first, second = (server.post(COMPLETIONS, asked)["usage"] for _ in range(2))
    assert first["completion_tokens"] == 2
    assert first["total_tokens"] == first["prompt_tokens"] + 2
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == 128
    assert server.post(COMPLETIONS, {**asked, "n": 3})["usage"]["completion_tokens"] == 6


# --- streams ------------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_stream_is_the_answer_in_parts(server: ServerProcess, logprobs: bool) -> None:
    asked = {**TALK, "logprobs": logprobs, "n": 2, "max_tokens": 20}
    whole = server.post(CHAT, asked)
    *parts, done = server.events(CHAT, {**asked, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert {part["id"] for part in parts} == {parts[0]["id"]}
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    *chunks, last = parts
    assert last["choices"] == []
    assert last["usage"] == whole["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}
    assert all(chunk["usage"] is None for chunk in chunks)
    for index, choice in enumerate(whole["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in mine) == choice["message"]["content"]
        assert [part["finish_reason"] for part in mine] == [*[None] * (len(mine) - 1), "length"]
        assert len(mine) > 10, "they come one by one"
        if logprobs:
            told = [token for part in mine if part["logprobs"] for token in part["logprobs"]["content"]]
            assert told == choice["logprobs"]["content"]


def test_a_stream_of_a_completion(server: ServerProcess) -> None:
    *parts, done = server.events(COMPLETIONS, PLAIN)
    assert done == "[DONE]"
    assert "".join(part["choices"][0]["text"] for part in parts) == server.text(**PLAIN)
    assert all("usage" not in part for part in parts)


# --- alone and among others ---------------------------------------------------


def test_a_text_is_the_same_alone_and_among_sixteen_others(server: ServerProcess) -> None:
    models = ("model", *ADAPTERS)
    asked = [
        {
            **PLAIN,
            "model": models[n % 4],
            "prompt": "the layer " * (1 + n % 5),
            "seed": n,
            "max_tokens": 30 + n,
        }
        for n in range(17)
    ]
    alone = [server.text(**each) for each in asked]
    together = threading.Barrier(len(asked))

    def text(each: dict[str, Any]) -> str:
        together.wait()
        return server.text(**each)

    for _ in range(2):
        with ThreadPoolExecutor(len(asked)) as threads:
            assert list(threads.map(text, asked)) == alone
    assert len(set(alone)) == 17


# --- JSON ---------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_answer_is_json_whatever_the_model_says(server: ServerProcess, stream: bool) -> None:
    asked = {**TALK, "response_format": {"type": "json_object"}, "temperature": 1.5}
    found = []
    for seed in range(12):
        each = {**asked, "model": ("model", *ADAPTERS)[seed % 4], "seed": seed, "max_tokens": 3 + 5 * seed}
        if stream:
            *parts, _ = server.events(CHAT, each)
            text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
        else:
            text = server.post(CHAT, each)["choices"][0]["message"]["content"]
        found.append(json.loads(text))
    assert all(isinstance(each, dict) for each in found)
    assert sum(bool(each) for each in found) > 3, "and not always empty"


def test_a_json_answer_holds_to_a_schema(server: ServerProcess) -> None:
    schema = {
        "type": "object",
        "properties": {
            "unit": {"enum": ["m", "km"]},
            "far": {"type": "integer"},
            "known": {"type": "boolean"},
        },
        "required": ["unit", "far", "known"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "distance", "strict": True, "schema": schema}}
    units = set()
    for seed in range(8):
        asked = {**TALK, "seed": seed, "response_format": wanted, "max_tokens": 60, "temperature": 1.5}
        choice = server.post(CHAT, asked)["choices"][0]
        told = json.loads(choice["message"]["content"])
        assert list(told) == ["unit", "far", "known"]
        assert told["unit"] in ("m", "km") and type(told["far"]) is int and type(told["known"]) is bool
        units.add(told["unit"])
    assert len(units) == 2


def test_a_json_answer_is_the_same_for_the_same_seed(server: ServerProcess) -> None:
    asked = {**TALK, "response_format": {"type": "json_object"}, "max_tokens": 30, "n": 2}
    first, second = (server.post(CHAT, asked)["choices"] for _ in range(2))
    assert first == second
    plain = server.post(CHAT, {**TALK, "response_format": {"type": "text"}})
    assert plain["choices"] == server.post(CHAT, TALK)["choices"]


# --- errors -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "change", "status", "code", "param"),
    [
        (CHAT, {"model": "fourth"}, 404, "model_not_found", "model"),
        (CHAT, {"model": None}, 400, None, "model"),
        (CHAT, {"messages": []}, 400, "invalid_value", "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}] * 1025}, 400, "invalid_value", "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "invalid_value", "messages[0].content"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "invalid_value",
            "messages[0].content",
        ),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            400,
            "unsupported_parameter",
            "messages[0].tool_calls",
        ),
        (CHAT, {"temperature": 3}, 400, "invalid_value", "temperature"),
        (CHAT, {"temperature": "hot"}, 400, "invalid_value", "temperature"),
        (CHAT, {"top_p": -1}, 400, "invalid_value", "top_p"),
        (CHAT, {"n": 17}, 400, "invalid_value", "n"),
        (CHAT, {"n": 10**400}, 400, "invalid_value", "n"),
        (CHAT, {"n": True}, 400, "invalid_value", "n"),
        (CHAT, {"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        (CHAT, {"seed": 1.5}, 400, "invalid_value", "seed"),
        (CHAT, {"stop": ["a", ""]}, 400, "invalid_value", "stop"),
        (CHAT, {"stop": ["a" * 4097]}, 400, "invalid_value", "stop"),
        (CHAT, {"top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
        (CHAT, {"stream_options": {}}, 400, "invalid_value", "stream_options"),
        (CHAT, {"logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
        (CHAT, {"logit_bias": {"99999": 1}}, 400, "invalid_value", "logit_bias"),
        (CHAT, {"tools": [{}]}, 400, "unsupported_parameter", "tools"),
        (CHAT, {"temprature": 1}, 400, "unknown_parameter", "temprature"),
        (CHAT, {"response_format": {"type": "json_schema"}}, 400, "invalid_value", "response_format"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "x"}}}},
            400,
            "invalid_json_schema",
            "response_format",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x " * 500}]},
            400,
            "context_length_exceeded",
            "messages",
        ),
        (COMPLETIONS, {"prompt": "x " * 500}, 400, "context_length_exceeded", "prompt"),
        (COMPLETIONS, {"prompt": "\ud800"}, 400, "invalid_value", None),
        (COMPLETIONS, {"prompt": [1, 10**6]}, 400, "invalid_value", None),
        (COMPLETIONS, {"prompt": []}, 400, "invalid_value", "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 8, "n": 3}, 400, "invalid_value", "n"),
        (COMPLETIONS, {"echo": True}, 400, "unsupported_parameter", "echo"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_makes_no_sense_is_refused_with_the_protocols_error(
    server: ServerProcess, path: str, change: dict[str, Any], status: int, code: str | None, param: str | None
) -> None:
    asked = {**(TALK if path == CHAT else PLAIN), **change}
    got, headers, body = server.request("POST", path, asked)
    error = json.loads(body)["error"]
    assert (got, error["code"], error["param"]) == (status, code, param)
    assert headers["content-type"] == "application/json"
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 2000
    assert server.text(**PLAIN)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"n": NaN}', b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000],
)
def test_bodies_that_are_no_request(server: ServerProcess, body: bytes) -> None:
    status, _, found = server.request("POST", CHAT, body)
    assert status == 400
    assert json.loads(found)["error"]["type"] == "invalid_request_error"


def test_paths_and_methods_that_there_are_not(server: ServerProcess) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", CHAT, 405),
        ("GET", "/v1/models/", 404),
    ):
        got, _, body = server.request(method, path)
        assert got == status
        assert json.loads(body)["error"]["message"]


def test_a_length_that_is_not_given_is_that_of_the_server(begin: Callable[..., ServerProcess]) -> None:
    with begin("--max-tokens", 7) as server:
        talk = {**TALK, "max_tokens": None}
        assert server.post(CHAT, talk)["usage"]["completion_tokens"] == 7
        assert server.post(CHAT, {**talk, "max_completion_tokens": 5})["usage"]["completion_tokens"] == 5
        assert server.post(COMPLETIONS, {**PLAIN, "max_tokens": None})["usage"]["completion_tokens"] == 16
