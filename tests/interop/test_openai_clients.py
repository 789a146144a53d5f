"""The official ``openai`` client, and ``llm``, against a real server on the loopback address."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from served_models import ADAPTERS, NO_END, ServerProcess, write_models

openai = pytest.importorskip("openai", reason="needs the client: pip install openai")
pytest.importorskip("uvicorn", reason="needs the extra: pip install 'mlxlora[serve]'")

KEY = "0123456789abcdef0123"
HELLO = [{"role": "user", "content": "the layer scales"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that wants a key."""
    folder = write_models(tmp_path_factory.mktemp("served"))
    (folder / "keys.txt").write_text(KEY + "\n")
    files = [word for name in ADAPTERS for word in ("--adapter-file", folder / f"{name}.safetensors")]
    with ServerProcess(
        "--model", folder / "model", *files, "--api-key-file", folder / "keys.txt", folder=folder
    ) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Any]:
    """The official client."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def answered(client: Any, **more: Any) -> Any:
    asked = {
        "model": "model",
        "messages": HELLO,
        "max_completion_tokens": 12,
        "seed": 3,
        "logit_bias": NO_END,
    }
    return client.chat.completions.create(**{**asked, **more})


def text_of(answer: Any) -> str:
    found: str = answer.choices[0].message.content
    return found


def cancelled(server: ServerProcess) -> float:
    text = server.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})[2].decode()
    return next(float(line.split()[-1]) for line in text.splitlines() if 'reason="cancelled"' in line)


# --- openai -------------------------------------------------------------------


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["model", *ADAPTERS]
    assert client.models.retrieve("second").owned_by == "mlxlora"


def test_a_chat(client: Any) -> None:
    answer = answered(client)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert text_of(answered(client)) == text_of(answer) != ""
    assert text_of(answered(client, seed=4)) != text_of(answer)
    assert len({text_of(answered(client, model=name)) for name in ("model", *ADAPTERS)}) == 4


def test_a_stream(client: Any) -> None:
    stream = answered(client, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert last.usage.completion_tokens == 12 and last.choices == []
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == text_of(answered(client))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_helper_that_gathers_a_stream(client: Any) -> None:
    text = text_of(answered(client, max_completion_tokens=40))
    asked = {"model": "model", "messages": HELLO, "max_tokens": 40, "seed": 3, "logit_bias": NO_END}
    asked |= {"stop": text[len(text) // 2 :][:2], "logprobs": True, "top_logprobs": 2}
    with client.chat.completions.stream(**asked) as stream:
        (final,) = stream.get_final_completion().choices
    (whole,) = client.chat.completions.create(**asked).choices
    assert final.message.content == whole.message.content != ""
    told = [token.logprob for token in final.logprobs.content]
    assert told == [token.logprob for token in whole.logprobs.content]


def test_stop_and_choices_and_log_probabilities(client: Any) -> None:
    text = text_of(answered(client, max_completion_tokens=40))
    stop = text[len(text) // 2 :][:2]
    cut = answered(client, max_completion_tokens=40, stop=[stop])
    assert (text_of(cut), cut.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    several = answered(client, n=4).choices
    assert [choice.index for choice in several] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in several}) == 4
    told = answered(client, logprobs=True, top_logprobs=5).choices[0].logprobs.content
    assert len(told) == 12
    assert all(len(token.top_logprobs) == 5 and token.logprob <= 0 for token in told)


def test_json(client: Any) -> None:
    for seed in range(4):
        answer = answered(
            client, seed=seed, response_format={"type": "json_object"}, max_completion_tokens=30
        )
        assert isinstance(json.loads(text_of(answer)), dict)


def test_an_answer_as_an_object_of_a_class(client: Any) -> None:
    pydantic = pytest.importorskip("pydantic", reason="comes with openai")

    class Part(pydantic.BaseModel):  # type: ignore[name-defined, misc]  # which is not there for the type checker
        name: str
        heavy: bool

    class Machine(pydantic.BaseModel):  # type: ignore[name-defined, misc]
        parts: list[Part]
        count: int | None

    for seed in range(4):
        asked = {"model": "first", "messages": HELLO, "max_tokens": 150, "seed": seed}
        (choice,) = client.chat.completions.parse(**asked, response_format=Machine).choices
        assert isinstance(choice.message.parsed, Machine)


def test_completions(client: Any) -> None:
    asked = {
        "model": "second",
        "prompt": ["the layer", [0, 70, 71]],
        "max_tokens": 8,
        "seed": 1,
        "logit_bias": NO_END,
    }
    answer = client.completions.create(**asked, logprobs=2)
    assert len(answer.choices) == 2
    assert len(answer.choices[0].logprobs.tokens) == 8
    parts = list(client.completions.create(**asked, stream=True))
    for index, choice in enumerate(answer.choices):
        mine = [part.choices[0].text for part in parts if part.choices[0].index == index]
        assert "".join(mine) == choice.text


@pytest.mark.parametrize(
    ("more", "kind", "code"),
    [
        ({"model": "fourth"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 9}, openai.BadRequestError, "invalid_value"),
        ({"extra_body": {"wish": 1}}, openai.BadRequestError, "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": "x " * 900}]},
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            openai.BadRequestError,
            None,
        ),
        (
            {"messages": [{"role": "user", "content": "x" * (5 << 20)}]},
            openai.APIStatusError,
            "request_too_large",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors(client: Any, more: dict[str, Any], kind: type[Exception], code: str | None) -> None:
    with pytest.raises(kind) as fault:
        answered(client, **more)
    assert code is None or fault.value.code == code  # type: ignore[attr-defined]  # of the client
    assert text_of(answered(client))


def test_a_wrong_key(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        with pytest.raises(openai.AuthenticationError):
            answered(client)


def test_leaving_a_stream(client: Any, server: ServerProcess) -> None:
    before = cancelled(server)
    stream = answered(client, stream=True, max_completion_tokens=240, n=4)
    next(iter(stream))
    stream.close()
    for _ in range(200):
        if cancelled(server) == before + 4:
            break
        asyncio.run(asyncio.sleep(0.05))
    assert cancelled(server) == before + 4


def test_cancelling_a_task(server: ServerProcess) -> None:
    before = cancelled(server)

    async def ask_and_leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            task = asyncio.create_task(answered(client, max_completion_tokens=240, n=4))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        while cancelled(server) < before + 4:
            await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(ask_and_leave(), 20))


def test_the_same_alone_and_among_sixteen(client: Any) -> None:
    asked = [
        {"model": ("model", *ADAPTERS)[n % 4], "seed": n, "max_completion_tokens": 20 + n} for n in range(17)
    ]
    alone = [text_of(answered(client, **each)) for each in asked]
    with ThreadPoolExecutor(17) as threads:
        assert list(threads.map(lambda each: text_of(answered(client, **each)), asked)) == alone


def test_every_field_of_the_client_is_in_our_list() -> None:
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    from mlxlora_core.server.fields import CHAT_FIELDS, COMPLETION_FIELDS

    chat = chat_create_params.CompletionCreateParamsBase.__annotations__.keys() | {"stream"}
    completion = completion_create_params.CompletionCreateParamsBase.__annotations__.keys() | {"stream"}
    ours = {"top_k", "min_p", "repetition_penalty"}
    assert chat == CHAT_FIELDS.keys() - ours
    assert completion == COMPLETION_FIELDS.keys() - ours


# --- llm ----------------------------------------------------------------------


def asked_llm(folder: Path, *arguments: str) -> str:
    """What the command line of ``llm`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments],
        env={**os.environ, "LLM_USER_PATH": str(folder), "LLM_LOAD_PLUGINS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(find_spec("llm") is None, reason="needs llm: pip install llm")
def test_llm(server: ServerProcess, client: Any, tmp_path: Path) -> None:
    entry = (
        f"- model_id: ours\n  model_name: first\n  api_base: {server.url}/v1\n  api_key_name: ours\n"
        f"- model_id: ours-text\n  model_name: model\n  api_base: {server.url}/v1\n  api_key_name: ours\n"
        "  completion: true\n"
    )
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    (tmp_path / "keys.json").write_text(json.dumps({"ours": KEY}))
    options = ["-o", "seed", "3", "-o", "max_tokens", "12", "-o", "logit_bias", json.dumps(NO_END)]
    want = text_of(answered(client, model="first"))
    for stream in ([], ["--no-stream"]):
        assert (
            asked_llm(tmp_path, "-m", "ours", *options, *stream, "the layer scales").strip() == want.strip()
        )
    talk = asked_llm(tmp_path, "-m", "ours", *options, "-s", "of the gradient", "the layer")
    assert talk.strip() not in ("", want.strip())
    text = asked_llm(tmp_path, "-m", "ours-text", *options, "the layer")
    asked = {"model": "model", "max_tokens": 12, "seed": 3, "logit_bias": NO_END}
    assert text.strip() == client.completions.create(prompt="the layer", **asked).choices[0].text.strip()
    stop = ["-o", "stop", want.strip()[4:6]]
    assert want.strip()[4:6] not in asked_llm(tmp_path, "-m", "ours", *options, *stop, "the layer scales")
