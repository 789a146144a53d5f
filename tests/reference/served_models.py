"""``mlxlora serve`` in a process of its own, on a small model with adapters, and a plain client of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import small_models
from mlx.utils import tree_map

import mlxlora_core

#: adapters that change what the small model says
ADAPTERS = ("first", "second", "third")
#: bans the end tokens of the small model, so that a text has as many tokens as are asked for
NO_END = {"1": -100, "3": -100}


def write_models(folder: Path) -> Path:
    """A folder with a small model that chats, in ``model``, and three adapters for it."""
    small_models.write(folder / "model", "llama")
    for seed, name in enumerate(ADAPTERS):
        model = mlxlora_core.load(folder / "model").attach("lora", rank=2 + seed, scale=8.0, seed=seed)
        mx.random.seed(seed)
        made = model.base.module.trainable_parameters()
        model.base.module.update(tree_map(lambda x: 0.3 * mx.random.normal(x.shape), made))
        model.save_adapter(folder / f"{name}.safetensors")
    return folder


class ServerProcess:
    """A server, until it is left.

    Args:
        arguments: of ``mlxlora serve``; the port is one that is free.
        folder: that it runs in.

    Attributes:
        process: of it.
        port: that it listens on.
    """

    def __init__(self, *arguments: object, folder: Path) -> None:
        command = [sys.executable, "-m", "mlxlora_core", "serve", *map(str, arguments)]
        self._errors = (folder / "stderr.txt").open("w+")
        self.process = subprocess.Popen(
            [*command, "--port", "0"],
            cwd=folder,
            env={**os.environ, "MLXLORA_PLUGINS": ""},
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.errors()
        self.port = int(self.url.rpartition(":")[2])

    def errors(self) -> str:
        """What it has written to stderr."""
        self._errors.seek(0)
        return self._errors.read()

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a response; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        found = response.read()
        told = {name.lower(): value for name, value in response.getheaders()}
        connection.close()
        return response.status, told, found

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        """The document that a request is answered with, whatever the status."""
        return json.loads(self.request("POST", path, body, headers)[2])

    def text(self, **asked: Any) -> str:
        """How a prompt is continued."""
        answer = self.post("/v1/completions", asked)
        assert "choices" in answer, answer
        found: str = answer["choices"][0]["text"]
        return found

    def events(self, path: str, body: Any) -> Iterator[Any]:
        """The events of a streamed response; the last one is ``[DONE]``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, json.dumps({**body, "stream": True}).encode())
        response = connection.getresponse()
        assert response.status == 200, response.read()
        try:
            for line in response:
                if line.startswith(b"data: "):
                    data = line.removeprefix(b"data: ").strip()
                    yield data.decode() if data == b"[DONE]" else json.loads(data)
        finally:
            connection.close()
            response.close()

    def metric(self, name: str) -> float:
        """A number of ``/metrics``."""
        for line in self.request("GET", "/metrics")[2].decode().splitlines():
            if line.startswith(f"mlxlora_{name} "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"there is no {name}")

    def until(self, name: str, value: float, seconds: float = 20) -> None:
        """Wait until a number of ``/metrics`` has come to a value."""
        end = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def memory_bytes(self) -> int:
        """What it has in memory."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Tell it to stop, and wait for its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(60)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *fault: object) -> None:
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()
