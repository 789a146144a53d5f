"""Requests of many threads that leave at any instant: nothing is left of them, and nobody waits forever.

By day 150 of them; ``MLXLORA_TEST_ALL=1`` takes 1000 and holds the memory of the process to a bound.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from serving_steps import NAMES, Served

from mlxlora_core.serving.engine import Engine
from mlxlora_core.serving.request import FINISH_REASONS, Delta, QueueFull, Request
from mlxlora_core.serving.scheduler import Limits
from mlxlora_core.serving.stream import Stream

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
COUNT, ROUNDS, CALLERS = (1000, 10, 24) if ALL else (150, 5, 24)
SECONDS = 60  # without a part, after which a caller gives the engine up
LIMITS = Limits(places=12, queue=16, part_tokens=16, cache_bytes=1 << 21)


class Callers:
    """Threads that ask, read, and leave, each in its own way.

    Attributes:
        finished: how requests ended, by how many.
        faults: of the threads.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._alike = engine, [5 + number % 300 for number in range(200)]
        self.finished = Counter[str]()
        self.faults: list[BaseException] = []

    def run(self, seeds: range) -> None:
        """Serve a request for each seed."""
        threads = [threading.Thread(target=self._call, args=(seeds[n::CALLERS],)) for n in range(CALLERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _call(self, seeds: range) -> None:
        try:
            for seed in seeds:
                draw = random.Random(seed)
                self.finished[self._read(self._asked(self._request(draw, seed)), draw)] += 1
        except BaseException as fault:
            self.faults.append(fault)

    def _request(self, draw: random.Random, seed: int) -> Request:
        prompt = [*self._alike[: draw.randrange(0, 80)], 5 + draw.randrange(300)]
        return Request(
            prompt,
            draw.choice(NAMES),
            seed=seed,
            max_tokens=draw.choice((1, 4, 30, 600)),
            deadline=draw.choice((None, 0.05, 1.0)),
            logprobs=draw.choice((None, 2)),
        )

    def _asked(self, request: Request) -> Stream:
        while True:
            try:
                return self._engine.submit(request)
            except QueueFull:
                time.sleep(0.002)

    def _read(self, stream: Stream, draw: random.Random) -> str:
        """How a request ended whose reader reads by a function or in turns, and may leave."""
        leave = threading.Timer(draw.random() / 20, stream.cancel)
        leave.start() if draw.random() < 0.5 else stream.cancel() if draw.random() < 0.2 else None
        if draw.random() < 0.5:
            return self._called(stream)
        for part in iter(lambda: stream.get(SECONDS), None):
            if part.finish is not None:
                return str(part.error or part.finish)
            if draw.random() < 0.01:
                stream.cancel()
        raise AssertionError

    def _called(self, stream: Stream) -> str:
        ended, last = threading.Event(), list[Delta]()

        def callback(part: Delta) -> None:
            last[:] = [part]
            if part.finish is not None:
                ended.set()

        stream.on_delta(callback)
        if not ended.wait(SECONDS):
            raise TimeoutError
        return str(last[0].error or last[0].finish)


@pytest.fixture
def engine(served: Served) -> Engine:
    """An engine with little room, so that requests wait and are put aside."""
    return Engine(served.model, served.tokenizer, served.adapters, LIMITS)


def resident_bytes() -> int:
    """Memory of this process. Source: proc(5), ``/proc/self/statm``."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_nothing_is_left_of_requests_that_leave(engine: Engine) -> None:
    callers, active, resident = Callers(engine), [], []
    with engine:
        engine.wait_until_ready()
        for first in range(0, COUNT, COUNT // ROUNDS):
            callers.run(range(first, first + COUNT // ROUNDS))
            assert not callers.faults, callers.faults
            while engine.metrics()["running"] or engine.metrics()["waiting"]:
                time.sleep(0.01)
            metrics = engine.metrics()
            assert metrics["reserved_bytes"] == metrics["reading"] == metrics["aside"] == 0
            assert metrics["prefix_bytes"] <= LIMITS.cache_bytes // 4  # type: ignore[operator]  # it is given
            gc.collect()
            active.append(mx.get_active_memory() - metrics["prefix_bytes"])
            resident.append(resident_bytes())
    metrics = engine.metrics()
    assert sum(metrics[f"finished_{reason}"] for reason in FINISH_REASONS) == COUNT == metrics["requests"]
    assert set(callers.finished) <= {*FINISH_REASONS}, callers.finished
    assert min(callers.finished[reason] for reason in ("cancelled", "timeout")) > COUNT // 50
    assert max(active[1:]) - min(active[1:]) < 1 << 16, active
    if ALL:
        assert resident[-1] - resident[ROUNDS // 3] < 16 << 20, resident
    assert not [thread for thread in threading.enumerate() if thread.name == "mlxlora engine"]
