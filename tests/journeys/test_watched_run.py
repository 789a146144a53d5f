"""``mlxlora run --watch``: a run that somebody looks on at, from its start to its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chromium import Page, browser, program

pytest.importorskip("uvicorn", reason="needs the extra: pip install 'mlxlora[serve]'")
pytest.importorskip("starlette", reason="needs the extra: pip install 'mlxlora[serve]'")

RECIPE = """
[run]
folder = "{folder}"
[model]
torch_path = "{checkpoint}"
dtype = "float32"
[data]
use = "jsonl"
options = {{ path = "{data}" }}
[adapter]
use = "lora"
options = {{ rank = 4, targets = ["all-linear"], layers = -1, dropout = 0.1 }}
[train]
iters = {iters}
batch_size = 4
learning_rate = 1e-2
steps_per_report = 1
steps_per_eval = 10
[generate]
prompts = ["A layer", "The"]
num_tokens = 4
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path) -> Write:
    """Writes a recipe of so many steps whose run has a name."""

    def written(name: str, iters: int) -> Path:
        path = tmp_path / f"{name}.toml"
        folder = tmp_path / "runs" / name
        text = RECIPE.format(folder=folder, checkpoint=tiny_checkpoint, data=tiny_data, iters=iters)
        path.write_text(text)
        return path

    return written


@contextmanager
def begun(recipe: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A watched run, and the address of its page."""
    command = [
        sys.executable,
        "-m",
        "mlxlora_core",
        "run",
        str(recipe),
        "--watch",
        "--watch-port",
        "0",
        *more,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"the run can be watched at (http://127\.0\.0\.1:\d+/run)$", line):
                    yield process, found[1]
                    break
            else:
                pytest.fail("no address was told")
        finally:
            if process.poll() is None:
                process.kill()


def told(address: str, path: str = "") -> Any:
    """What the page is told; waited for until the server answers."""
    until = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(address.replace("/run", f"/api/run{path}"), timeout=10) as answer:
                return json.loads(answer.read())
        except urllib.error.URLError:
            assert time.monotonic() < until
            time.sleep(0.1)


def wait_for_step(address: str, step: int) -> None:
    until = time.monotonic() + 60
    while told(address)["run"]["step"] < step:
        assert time.monotonic() < until
        time.sleep(0.1)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.skipif(program() is None, reason="no Chromium here")
def test_a_run_is_watched_stopped_and_gone_on_with(write: Write, tmp_path: Path) -> None:
    recipe = write("long", 1_000_000)
    folder = tmp_path / "runs" / "long"
    with browser(tmp_path / "profile") as tab, begun(recipe) as (process, address):
        assert isinstance(tab, Page) and told(address) is not None
        tab.open(address)
        tab.wait_for("document.getElementById('state').textContent === 'running'", 60)
        tab.wait_for("document.querySelector('#loss path')", 60)
        before = tab.script("document.getElementById('progress').value")
        tab.wait_for(f"document.getElementById('progress').value > {before}", 60)
        tab.wait_for("document.querySelectorAll('#rows .row').length === 6", 60)
        tab.script("document.getElementById('stop').focus()")
        tab.press("Enter")
        tab.wait_for("document.getElementById('sure').open")
        tab.press("Tab", "Enter")
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(60) == 130
        assert re.search(r"interrupted; step \d+ is saved\. Go on with: mlxlora run", said)
        assert [one for one in tab.requests if not one.startswith(address.removesuffix("run"))] == []
    saved = int(re.findall(r"step (\d+) is saved", said)[0])
    record = json.loads((folder / "run.json").read_text())
    assert record["ended"] == "interrupted"
    assert sorted(folder.glob("checkpoints/step-*")), "a checkpoint is there"
    with begun(recipe) as (process, address):
        wait_for_step(address, saved + 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def test_who_looks_on_changes_nothing(write: Write, tmp_path: Path) -> None:
    adapters = []
    for name, more in (("plain", []), ("seen", ["--watch", "--watch-port", "0"])):
        command = [sys.executable, "-m", "mlxlora_core", "run", str(write(name, 40)), "--json", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["summary"], "stdout is the result alone"
        folder = tmp_path / "runs" / name
        adapters.append((folder / "adapter" / "adapter.safetensors").read_bytes())
        reports = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        adapters.append([(one["kind"], one["step"], one["loss"]) for one in reports])  # type: ignore[arg-type]
    assert adapters[:2] == adapters[2:]
    assert not (tmp_path / "runs" / "plain" / "samples.jsonl").exists()
    said = (tmp_path / "runs" / "seen" / "samples.jsonl").read_text().splitlines()
    assert said and {json.loads(line)["prompt"] for line in said} <= {"A layer", "The"}


def test_a_server_that_is_killed_costs_the_run_nothing(write: Write, tmp_path: Path) -> None:
    with begun(write("a", 200)) as (process, address):
        wait_for_step(address, 1)
        server = [int(pid) for pid in children(process.pid) if _is_server(pid)]
        assert len(server) == 1
        os.kill(server[0], signal.SIGKILL)
        assert process.stderr is not None
        process.stderr.read()
        assert process.wait(120) == 0
    assert json.loads((tmp_path / "runs" / "a" / "run.json").read_text())["summary"]


def test_a_run_that_is_killed_takes_its_server_along(write: Write) -> None:
    with begun(write("a", 1_000_000)) as (process, address):
        wait_for_step(address, 1)
        process.kill()
        process.wait(30)
        until = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
            except OSError:
                break
            assert time.monotonic() < until, "the server is still there"
            time.sleep(0.1)


def test_a_port_that_is_taken_is_one_line_before_any_work(write: Write, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "mlxlora_core", "run", str(write("a", 20)), "--watch"]
        done = subprocess.run([*command, "--watch-port", port], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and f"port {port}" in done.stderr
    assert "--watch-port" in done.stderr
    assert not (tmp_path / "runs" / "a").exists()


def _is_server(pid: str) -> bool:
    return b"mlxlora_core.server.watching" in Path(f"/proc/{pid}/cmdline").read_bytes()
