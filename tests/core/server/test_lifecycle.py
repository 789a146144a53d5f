"""Places, queues, time limits, clients that leave, and the end of a server."""

from __future__ import annotations

import http.client
import json
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served_models import NO_END, ServerProcess

from mlxlora_core.cli import execute

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = {"model": "model", "prompt": "the", "max_tokens": 240, "seed": 1, "logit_bias": NO_END}


def begun_stream(server: ServerProcess, **more: object) -> http.client.HTTPConnection:
    """A stream of which the first event has come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", COMPLETIONS, json.dumps({**LONG, **more, "stream": True}).encode())
    connection.stream = connection.getresponse()  # type: ignore[attr-defined]  # kept until it is closed
    assert connection.stream.readline().startswith(b"data: ")  # type: ignore[attr-defined]
    return connection


def leave(connection: http.client.HTTPConnection) -> None:
    connection.stream.close()  # type: ignore[attr-defined]
    connection.close()


def test_a_full_queue_is_told_with_when_to_come_again(begin: Callable[..., ServerProcess]) -> None:
    with begin("--places", 1, "--queue", 2) as server:
        together = threading.Barrier(12)

        def ask(seed: int) -> tuple[int, dict[str, str], bytes]:
            together.wait()
            return server.request("POST", COMPLETIONS, {**LONG, "seed": seed})

        with ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(ask, range(12)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3, "one has the place, two wait"
        for status, headers, body in answers:
            if status == 429:
                assert int(headers["retry-after"]) >= 1
                assert json.loads(body)["error"]["code"] == "queue_full"
        assert server.metric("running") == 0
        assert server.request("POST", COMPLETIONS, LONG)[0] == 200


def test_choices_that_do_not_all_fit_leave_nothing_behind(begin: Callable[..., ServerProcess]) -> None:
    with begin("--places", 1, "--queue", 1) as server:
        assert server.request("POST", COMPLETIONS, {**LONG, "n": 8})[0] == 429
        server.until("running", 0)
        assert server.metric("waiting") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_place(begin: Callable[..., ServerProcess], stream: bool) -> None:
    with begin("--places", 1) as server:
        if stream:
            leave(begun_stream(server, n=3))
        else:
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            connection.request("POST", COMPLETIONS, json.dumps({**LONG, "n": 3}).encode())
            server.until("running", 1)
            connection.close()
        server.until("running", 0)
        server.until("waiting", 0)
        ended = server.request("GET", "/metrics")[2].decode()
        assert 'finished_total{reason="cancelled"} 3' in ended
        assert len(server.text(**LONG)) > 240


def test_a_request_that_takes_too_long_is_given_up(begin: Callable[..., ServerProcess]) -> None:
    with begin("--timeout", 0.02) as server:
        status, _, body = server.request("POST", COMPLETIONS, LONG)
        assert (status, json.loads(body)["error"]["code"]) == (504, "timeout")
        *_, error, done = server.events(COMPLETIONS, LONG)
        assert (error["error"]["code"], done) == ("timeout", "[DONE]")
        server.until("running", 0)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_what_is_under_way_end(begin: Callable[..., ServerProcess], signum: int) -> None:
    with begin() as server:
        whole = server.text(**LONG)
        connection = begun_stream(server)
        server.process.send_signal(signum)
        lines = connection.stream.read().decode().splitlines()  # type: ignore[attr-defined]
        parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert whole.endswith("".join(part["choices"][0]["text"] for part in parts))
        assert parts[-1]["choices"][0]["finish_reason"] == "length"
        assert lines[-2] == "data: [DONE]"
        leave(connection)
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.errors()
        with pytest.raises(OSError):
            server.request("GET", "/health")


def test_a_stop_waits_no_longer_than_it_says(begin: Callable[..., ServerProcess]) -> None:
    with begin("--stop-timeout", 0) as server:
        connection = begun_stream(server, n=16)
        server.process.send_signal(signal.SIGTERM)
        lines = connection.stream.read().decode().splitlines()  # type: ignore[attr-defined]
        told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert told[-1]["error"]["code"] == "stopping"
        leave(connection)
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.errors()


def test_health_and_metrics(server: ServerProcess) -> None:
    before = server.metric("requests_total")
    assert json.loads(server.request("GET", "/health")[2]) == {"status": "ok"}
    server.text(**{**LONG, "max_tokens": 3})
    assert server.metric("requests_total") == before + 1
    text = server.request("GET", "/metrics")[2].decode()
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(names) == len(set(names)) > 15
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            assert name.partition("{")[0] in names
            float(value)
    assert "untyped" not in text, "each number of the engine is described"


def test_a_port_that_is_taken_is_said_before_the_model_is_read(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["serve", "--model", str(tmp_path / "none"), "--port", str(server.port)]) == 2
    told = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1 port {server.port}" in told
    assert "none" not in told


def test_idle_connections_do_not_hold_up_the_end(begin: Callable[..., ServerProcess]) -> None:
    with begin() as server:
        idle = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(5)]
        for connection in idle:
            connection.connect()
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 15, "which is less than --stop-timeout"
        for connection in idle:
            connection.close()
