"""What a reader gets of a stream, by whatever way it reads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from mlxlora_core.serving.request import Delta
from mlxlora_core.serving.stream import Stream

PARTS = [*(Delta(f"part {number}") for number in range(200)), Delta("", finish="stop")]


def put_all(stream: Stream, parts: Sequence[Delta]) -> None:
    for delta in parts:
        stream.put(delta)


def test_a_function_gets_every_part_once_and_in_order_whenever_it_comes() -> None:
    for before in (0, 7, len(PARTS)):
        stream, got = Stream(), list[Delta]()
        for delta in PARTS[:before]:
            stream.put(delta)
        writer = threading.Thread(target=put_all, args=(stream, PARTS[before:]))
        writer.start()
        stream.on_delta(got.append)
        writer.join()
        assert got == PARTS


def test_a_function_is_called_by_whoever_puts_and_may_end_the_request() -> None:
    told, threads = [], []
    stream = Stream(lambda: told.append("cancelled"))

    def callback(delta: Delta) -> None:
        threads.append(threading.get_ident())
        stream.cancel()

    stream.on_delta(callback)
    writer = threading.Thread(target=stream.put, args=(PARTS[0],))
    writer.start()
    writer.join()
    assert threads == [writer.ident]
    assert told == ["cancelled"] and stream.cancelled


def test_a_function_that_raises_ends_the_request_and_is_called_no_more() -> None:
    calls = []

    def callback(delta: Delta) -> None:
        calls.append(delta)
        raise OSError("nobody is there")

    stream = Stream()
    stream.on_delta(callback)
    for delta in PARTS[:3]:
        stream.put(delta)
    assert calls == PARTS[:1] and stream.cancelled


def test_an_event_loop_that_is_closed_ends_the_request() -> None:
    stream = Stream()

    async def leave() -> None:
        stream.put(PARTS[0])
        async for _ in stream:
            return

    asyncio.run(leave())
    assert not stream.cancelled
    stream.put(PARTS[1])
    assert stream.cancelled
