"""Many requests, of which half are left in the middle: nothing of them is left behind."""

from __future__ import annotations

import gc
import http.client
import json
import os
import random
import threading
import time
from collections.abc import Callable

import pytest
from served_models import ADAPTERS, ServerProcess

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
REQUESTS = 1000 if ALL else 240
ROUND = REQUESTS // 4


def ask(server: ServerProcess, draw: random.Random) -> None:
    """One request, left at any time or read to its end."""
    chat = draw.random() < 0.5
    asked = {
        "model": draw.choice(["model", *ADAPTERS]),
        "max_tokens": draw.randrange(1, 120),
        "n": draw.choice([1, 1, 1, 3]),
        "stream": draw.random() < 0.6,
    }
    words = "the layer scales " * draw.randrange(1, 9)
    asked |= {"messages": [{"role": "user", "content": words}]} if chat else {"prompt": words}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps(asked).encode()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    how = draw.randrange(4)
    if how == 0:  # half of the body
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[: len(body) // 2])
        connection.close()
        return
    connection.request("POST", path, body)
    if how == 1:
        time.sleep(draw.random() / 20)
        connection.close()
        return
    response = connection.getresponse()
    response.read(200 if how == 2 else None)
    response.close()
    connection.close()


def many(server: ServerProcess, seed: int) -> None:
    """A round of requests, by several threads."""

    def work(number: int) -> None:
        draw = random.Random(1000 * seed + number)
        for _ in range(ROUND // 6):
            ask(server, draw)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "something hangs"
    server.until("running", 0)
    server.until("waiting", 0)
    server.until("http_requests", 0)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_requests_that_are_left_leave_nothing(begin: Callable[..., ServerProcess]) -> None:
    with begin() as server:
        many(server, 0)
        many(server, 1)
        files, before = len(os.listdir(f"/proc/{server.process.pid}/fd")), server.memory_bytes()
        threads = len(os.listdir(f"/proc/{server.process.pid}/task"))
        many(server, 2)
        many(server, 3)
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) <= files + 2
        assert len(os.listdir(f"/proc/{server.process.pid}/task")) <= threads + 1
        assert server.memory_bytes() - before < 24 << 20
        assert server.metric("reserved_bytes") == 0
        assert "Traceback" not in server.errors() and "defect" not in server.errors()
    gc.collect()
