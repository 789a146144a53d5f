"""A worker as peers.py and gpu.py see it: a process that is asked for samples."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from workers.channel import Job


class Failed(Exception):
    """A worker went away; the text is what it said last."""


class Worker:
    """A process that answers each line with one sample, and is ended when it is silent for ``patience`` s."""

    def __init__(
        self, python: str, module: str, job: Job, environment: Mapping[str, str], patience: float = 3600.0
    ) -> None:
        self.ready: dict[str, Any] = {}
        self.patience = patience
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [python, "-m", f"workers.{module}", json.dumps(asdict(job))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def read(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            Failed: it says nothing more.
        """
        assert self.process.stdout is not None
        watch = threading.Timer(self.patience, self.process.kill)
        watch.start()
        line = self.process.stdout.readline()
        if line:
            watch.cancel()
            said: dict[str, Any] = json.loads(line)
            return said
        late = not watch.is_alive()
        watch.cancel()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        last = lines[-1] if lines else "it ended without a word"
        raise Failed(f"it said nothing for {self.patience:g} s; {last}" if late else last)

    def ask(self) -> None:
        """Ask for one sample, which is read then."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading tells why
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def sample(self) -> dict[str, Any]:
        """One measured sample.

        Raises:
            Failed: the worker went away.
        """
        self.ask()
        return self.read()

    def close(self) -> int:
        """End it; its peak resident memory in bytes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.process.stdout.close()
        self.errors.close()
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
