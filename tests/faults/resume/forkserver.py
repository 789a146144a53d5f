"""Run ``mlxlora`` in processes that are forked from one that has imported everything.

A process of its own costs a second and a half of imports; a fork costs some
milliseconds, so that hundreds of runs can be killed, each at another instant.
The forked process is a real one: it has its own pid, gets real signals, and
what it wrote to the disk is all that it leaves.

In the child, what the durable writer asks of the operating system is counted
from outside, and the process kills itself with SIGKILL before the k-th of
these operations. The product knows nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: what the child can be told to break, by name
Mutant = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: exit code; minus the number of the signal that ended it.
        err: what it wrote to stderr.
        out: what it wrote to stdout.
        operations: durable operations, when it ended by itself.
    """

    code: int
    err: str
    out: str
    operations: int


class ForkServer:
    """The process that children are forked from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {**os.environ, "MLXLORA_PLUGINS": "", "MLXLORA_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def run(
        self,
        arguments: Sequence[object],
        *,
        kill: int = 0,
        signals: Sequence[int] = (signal.SIGKILL,),
        mutant: str = "",
        place: str = "",
        after_seconds: float = 0.0,
        limits: Mapping[str, int] | None = None,
    ) -> Ended:
        """Run one command line.

        Args:
            arguments: of ``mlxlora``.
            kill: send ``signals`` before this durable operation, counted from 1; 0 is never.
            signals: what to send.
            mutant: what to break first, a key of :data:`MUTANTS`.
            place: where the first of ``signals`` comes instead, a key of :data:`PLACES`.
            after_seconds: SIGKILL so long after it began; 0 is never.
            limits: resource limits by name, such as ``RLIMIT_FSIZE``.
        """
        job = {
            "arguments": [str(argument) for argument in arguments],
            "kill": kill,
            "signals": [int(signum) for signum in signals],
            "mutant": mutant,
            "place": place,
            "after_seconds": after_seconds,
            "limits": dict(limits or {}),
            "folder": str(self._folder),
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        texts = [(self._folder / name).read_text("utf-8", "replace") for name in ("err", "out")]
        return Ended(answer["code"], *texts, answer["operations"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


# --- in the server and its children -------------------------------------------


def _serve() -> None:
    from mlxlora_core import plugins as registry
    from mlxlora_core.cli import verbs

    # What the verbs and the stages import when they work, and what that needs.
    for module in ("model.convert", "model.fuse", "model.generate", "training.session"):
        __import__(f"mlxlora_core.{module}")
    for verb in verbs.VERBS:
        __import__(f"mlxlora_core.cli.{verb}")
    registry.load()
    for plugin in ("mlxlora_llama", "mlxlora_lora", "mlxlora_torch", "mlxlora_affine", "mlxlora_jsonl"):
        __import__(plugin)
    import sentencepiece
    import torch

    assert torch and sentencepiece
    for line in sys.stdin.buffer:
        job = json.loads(line)
        operations = Path(job["folder"]) / "operations"
        operations.write_text("0")
        child = os.fork()
        if child == 0:
            _child(job, operations)
        if job["after_seconds"]:
            signal.signal(signal.SIGALRM, lambda *_, child=child: _kill(child))
            signal.setitimer(signal.ITIMER_REAL, job["after_seconds"])
        _, status = os.waitpid(child, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        code = os.waitstatus_to_exitcode(status)
        told = operations.read_text()  # nothing of a child that was killed while it wrote it
        answer = {"code": code, "operations": int(told or 0)}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(child, signal.SIGKILL)


def _child(job: Mapping[str, Any], operations: Path) -> None:
    import resource

    import mlxlora_core.cli as cli
    from mlxlora_core.machine import signals

    code = 99
    try:
        for name, number in (("out", 1), ("err", 2)):
            file = os.open(Path(job["folder"]) / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            os.dup2(file, number)
        if job["mutant"]:
            MUTANTS[job["mutant"]]()
        for name, limit in job["limits"].items():
            resource.setrlimit(getattr(resource, name), (limit, limit))
        counter = Counter(job["kill"], job["signals"])
        counter.install()
        if job["place"]:
            _signalled(job["place"], job["signals"][0])
        signals.install()
        code = cli.execute(job["arguments"])
        counter.stop()
        operations.write_text(str(counter.count))
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Counter:
    """Counts what is asked of the disk, and sends this process signals before the k-th of it."""

    def __init__(self, kill: int, signals: Sequence[int]) -> None:
        self.count, self._kill, self._signals, self._on = 0, kill, signals, True

    def stop(self) -> None:
        """Count no more."""
        self._on = False

    def install(self) -> None:
        """Stand in front of the operating system's functions, and of files that the durable writer opens."""
        from mlxlora_core.files import durable

        for name in ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir"):
            setattr(os, name, self._counted(getattr(os, name)))
        opened = open

        def open_file(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if set(mode) & set("wxa+"):
                self.tick()
                return Writing(opened(path, mode, *rest, **more), self)
            return opened(path, mode, *rest, **more)

        durable.open = open_file  # type: ignore[attr-defined]  # before the builtin

    def tick(self) -> None:
        """One operation is about to be done."""
        if not self._on:
            return
        self.count += 1
        if self.count == self._kill:
            for signum in self._signals:
                os.kill(os.getpid(), signum)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            self.tick()
            return function(*arguments, **more)

        return call


class Writing:
    """A file whose every write is counted."""

    def __init__(self, file: Any, counter: Counter) -> None:
        self._file, self._counter = file, counter

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        """Write, unbuffered, so that a kill leaves what was written before it."""
        self._counter.tick()
        written: int = self._file.write(data)
        self._file.flush()
        return written


# --- what the children can be told to break -----------------------------------


def _keep_the_fresh_optimizer() -> None:
    from mlxlora_core.training.loop import Training

    def restore(self: Training, progress: Any, optimizer: Any) -> None:
        self._progress = progress

    Training.restore = restore  # type: ignore[method-assign]  # a mutant


def _draw_from_where_the_process_is() -> None:
    import mlx.core as mx

    from mlxlora_core.training import loop

    class Unseeded:
        def __getattr__(self, name: str) -> Any:
            return (lambda seed: None) if name == "seed" else getattr(mx.random, name)

    class Mlx:
        random = Unseeded()

        def __getattr__(self, name: str) -> Any:
            return getattr(mx, name)

    loop.mx = Mlx()  # type: ignore[assignment]  # a mutant


def _begin_the_rows_again() -> None:
    from mlxlora_core.training import loop

    real = loop.steps_from
    loop.steps_from = lambda examples, rows, seed, cursor, by_length: real(examples, rows, seed, 0, by_length)


def _be_off_by_one_row() -> None:
    from mlxlora_core.training import loop

    real = loop.steps_from
    loop.steps_from = lambda examples, rows, seed, cursor, by_length: real(
        examples, rows, seed, cursor + (cursor > 0), by_length
    )


def _forget_the_adapter() -> None:
    from mlxlora_core.model import adapters

    adapters.fill = lambda path, model, adapted: None


MUTANTS: dict[str, Mutant] = {
    "optimizer": _keep_the_fresh_optimizer,
    "random": _draw_from_where_the_process_is,
    "cursor": _begin_the_rows_again,
    "cursor off by one": _be_off_by_one_row,
    "adapter": _forget_the_adapter,
}
#: places in a training where a signal comes: the function that it comes in, and at which call
PLACES = {
    "mid step": ("training.loop", "learning_rate", 7),
    "mid validation": ("training.loop", "evaluate", 2),
}


def _signalled(place: str, signum: int) -> None:
    """Send this process a signal when it is in a place."""
    import importlib

    module_name, name, at = PLACES[place]
    module = importlib.import_module(f"mlxlora_core.{module_name}")
    real, calls = getattr(module, name), [0]

    def function(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signum)
        return real(*arguments, **more)

    setattr(module, name, function)


if __name__ == "__main__":
    _serve()
