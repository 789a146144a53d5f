"""The engine from the threads of its callers."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving_steps import Served, Steps, ids_of, told

from mlxlora_core.errors import UsageError
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.serving.engine import Engine
from mlxlora_core.serving.request import QueueFull, Request, Stopping
from mlxlora_core.serving.scheduler import Limits

LIMITS: dict[str, Any] = {"cache_bytes": 1 << 26}


@pytest.fixture
def start(served: Served) -> Iterator[Callable[..., Engine]]:
    """A function that starts an engine, which is stopped in the end."""
    started = []

    def make(**limits: Any) -> Engine:
        engine = Engine(served.model, served.tokenizer, served.adapters, Limits(**{**LIMITS, **limits}))
        started.append(engine)
        engine.wait_until_ready()
        return engine

    yield make
    for engine in started:
        engine.stop()


def test_threads_get_what_each_would_get_alone(served: Served, start: Callable[..., Engine]) -> None:
    names = (None, "small", "large", "top", "turned")
    asked = [Request([5, 6 + n], names[n % 5], seed=n, max_tokens=5 + n) for n in range(12)]
    want = []
    for request in asked:
        steps = Steps(served)
        job = steps.submit(request)
        steps.run()
        want.append(ids_of(told(job)))
    engine, got = start(), {}

    def ask(number: int) -> None:
        time.sleep(random.random() / 20)
        got[number] = ids_of(list(engine.submit(asked[number])))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(12)] == want


def test_adapters_of_which_nothing_was_computed_before_are_served(make_served: Callable[..., Served]) -> None:
    """MLX computes in the thread whose arrays they are, and what was read for an adapter is of this one."""
    served = make_served()
    with Engine(served.model, served.tokenizer, served.adapters, Limits(**LIMITS)) as engine:
        for name in engine.names:
            assert list(engine.submit(Request([5, 6], name, max_tokens=2)))[-1].error is None


def test_tasks_read_streams_too(start: Callable[..., Engine]) -> None:
    engine = start()

    async def ask(seed: int) -> tuple[str, str | None]:
        parts = [part async for part in engine.submit(Request([5, 6], seed=seed, max_tokens=8))]
        return "".join(part.text for part in parts), parts[-1].finish

    async def both() -> list[tuple[str, str | None]]:
        return await asyncio.gather(*(ask(seed) for seed in (1, 2, 1)))

    found = asyncio.run(both())
    assert found[0] == found[2]
    assert all(finish in ("length", "stop") for _, finish in found)


def test_a_task_that_is_gone_holds_up_nobody(start: Callable[..., Engine]) -> None:
    engine = start()

    async def leave() -> None:
        async for _ in engine.submit(Request([5, 6], max_tokens=50)):
            return

    asyncio.run(leave())
    assert list(engine.submit(Request([5, 7], max_tokens=3)))[-1].finish in ("length", "stop")


def test_the_queue_has_an_end(start: Callable[..., Engine]) -> None:
    engine = start(places=1, queue=2)
    streams = []
    with pytest.raises(QueueFull, match=r"^\d requests wait, which is as many as may"):
        for _ in range(9):
            streams.append(engine.submit(Request([5], max_tokens=100)))
    assert 3 <= len(streams) <= 8
    assert engine.metrics()["refused"] == 1
    for stream in streams:
        stream.cancel()
    assert {list(stream)[-1].finish for stream in streams} <= {"cancelled", "stop", "length"}
    assert list(engine.submit(Request([5], max_tokens=2)))[-1].finish in ("stop", "length")


def test_cancelled_requests_free_their_places(start: Callable[..., Engine]) -> None:
    engine = start(places=2)
    first = [engine.submit(Request([5], seed=n, max_tokens=10_000)) for n in range(2)]
    second = engine.submit(Request([6], max_tokens=3))
    for stream in first:
        stream.get(timeout=20)
        stream.cancel()
    assert list(second)[-1].finish in ("stop", "length")
    metrics = engine.metrics()
    assert metrics["reserved_bytes"] == 0 or metrics["running"] > 0


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([]), "token ids from 0 to 319, one at least"),
        (Request([5, 320], max_tokens=1), "token ids from 0 to 319"),
        (Request([5, -1], max_tokens=1), "token ids from 0 to 319"),
        (Request([5], adapter="smal", max_tokens=1), "no adapter 'smal', did you mean 'small'"),
        (Request([5], max_tokens=0), "max_tokens is 0"),
        (Request([5]), "max_tokens is None"),
        (Request([5], max_tokens=1, seed=-1), "seed is -1"),
        (Request([5], max_tokens=1, stop=[""]), "a text to stop at is ''"),
        (Request([5], max_tokens=1, logprobs=21), "logprobs is 21, wanted 0 to 20"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    start: Callable[..., Engine], request_: Request, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        start().submit(request_)


def test_a_prompt_beyond_the_context_is_refused(
    served: Served, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.model, "context_tokens", 8)
    with pytest.raises(UsageError, match="the prompt has 8 tokens, the model's context holds 8"):
        start().submit(Request([5] * 8))


# --- the end ------------------------------------------------------------------


def test_a_stop_lets_those_that_run_finish_and_takes_no_more(start: Callable[..., Engine]) -> None:
    engine = start(places=1)
    streams = [engine.submit(Request([5], seed=n, max_tokens=20)) for n in range(3)]
    stopping = threading.Thread(target=engine.stop, args=(60,))
    stopping.start()
    while not engine.stopping:
        time.sleep(0.001)
    with pytest.raises(Stopping):
        engine.submit(Request([5], max_tokens=1))
    stopping.join()
    assert {list(stream)[-1].finish for stream in streams} <= {"length", "stop"}


def test_what_takes_longer_than_the_stop_is_ended(start: Callable[..., Engine]) -> None:
    engine = start(places=1)
    streams = [engine.submit(Request([5], seed=n, max_tokens=100_000, stop=[])) for n in range(2)]
    engine.stop(0.1)
    finish = [list(stream)[-1].finish for stream in streams]
    assert finish[1] == "cancelled"
    with pytest.raises(Stopping):
        engine.submit(Request([5], max_tokens=1))


def test_an_engine_that_cannot_begin_says_why(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: LanguageModel) -> None:
        raise UsageError("not this one")

    monkeypatch.setattr("mlxlora_core.serving.scheduler.sizes_of", fails)
    engine = Engine(served.model, served.tokenizer, served.adapters)
    with pytest.raises(UsageError, match="not this one"):
        engine.wait_until_ready()
    with pytest.raises(UsageError, match="not this one"):
        engine.submit(Request([5], max_tokens=1))


def test_a_reader_that_waits_is_told_that_nothing_came(start: Callable[..., Engine]) -> None:
    stream = start().submit(Request([5], max_tokens=1))
    parts = [stream.get(timeout=20)]
    while parts[-1].finish is None:
        parts.append(stream.get(timeout=20))
    with pytest.raises(EOFError):
        stream.get(timeout=0)
