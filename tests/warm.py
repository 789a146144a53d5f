"""``mlxlora`` in processes that are forked from one which has imported everything.

A process of its own costs a second of imports, and three where torch is
needed; a fork costs some hundredths. It is a real process, with its own pid,
standard streams, working folder, environment and signals, in which the command
line begins as in the installed script and looks for plugins anew. What a test
says about the start of the interpreter itself needs a process of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Done = subprocess.CompletedProcess[str]

_PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.002


class Warm:
    """The process that others are forked from; started when the first is.

    Args:
        python: the interpreter, which decides what is installed.
        environ: of the server, and by default of what is forked from it.
        more: modules to import beside those that nearly every verb needs.
    """

    def __init__(
        self,
        python: str | Path = sys.executable,
        environ: Mapping[str, str] | None = None,
        more: Sequence[str] = (),
    ) -> None:
        self._command = [str(python), __file__, *more]
        self._environ = environ
        self._server: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="mlxlora-warm-")
        self._count = 0

    def start(
        self, *arguments: object, cwd: str | Path = ".", environ: Mapping[str, str] | None = None
    ) -> Running:
        """A process with this command line, of ``mlxlora``, that has begun; its stdin is empty."""
        self._count += 1
        output = Path(self._folder.name) / str(self._count)
        given = self._environ if environ is None else environ
        job = {
            "arguments": [os.fsencode(str(argument)).decode("latin-1") for argument in arguments],
            "cwd": os.path.abspath(cwd),
            "environ": dict(os.environ if given is None else given),
            "output": str(output),
        }
        return Running(self, [str(argument) for argument in arguments], self.ask(job), output)

    def run(
        self, *arguments: object, cwd: str | Path = ".", environ: Mapping[str, str] | None = None
    ) -> Done:
        """What a process with this command line left behind."""
        running = self.start(*arguments, cwd=cwd, environ=environ)
        out, err = running.communicate()
        return subprocess.CompletedProcess(running.args, running.returncode, out, err)

    def ask(self, job: Mapping[str, Any]) -> Any:
        """The server's answer."""
        if self._server is None:
            self._server = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environ
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(job).encode() + b"\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.communicate()
        self._folder.cleanup()


class Running:
    """One process: as much of :class:`subprocess.Popen` as tests need.

    Attributes:
        args: the arguments of ``mlxlora``.
        returncode: the exit code once it has ended; minus the number of a signal that ended it.
    """

    def __init__(self, server: Warm, args: list[str], pid: int, output: Path) -> None:
        self.args, self.pid, self.returncode = args, pid, -999
        self._server, self._output, self._has_ended = server, output, False

    def poll(self) -> int | None:
        """The exit code, or None as long as it runs."""
        if not self._has_ended:
            code = self._server.ask({"wait": self.pid})
            self._has_ended = code is not None
            self.returncode = code if self._has_ended else self.returncode
        return self.returncode if self._has_ended else None

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        if not self._has_ended:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = _PATIENCE_SECONDS) -> tuple[str, str]:
        """Wait for its end: what it wrote to stdout and stderr."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(_POLL_SECONDS)
        out, err = (self._output.with_suffix(f".{name}").read_bytes() for name in ("out", "err"))
        return out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


# --- in the server and its children -------------------------------------------

# As they are before plugins are kept from them.
_end, _fork, _wait = os._exit, os.fork, os.waitpid


def _import_everything() -> None:
    """What the verbs and the built-in plugins import when they work, and what that needs.

    MLX must not compute anything here: its threads are not in what is forked.
    """
    from mlxlora_core.cli import verbs
    from mlxlora_core.plugins import load

    for module in ("model.convert", "model.fuse", "model.generate", "training.session"):
        importlib.import_module(f"mlxlora_core.{module}")
    for verb in verbs.VERBS:
        importlib.import_module(f"mlxlora_core.cli.{verb}")
    names = ["sentencepiece", "safetensors", "numpy", *sys.argv[1:]]
    built_in = [p for p in load(environ={"MLXLORA_PLUGINS": ""}).plugins if p.origin == "built-in"]
    for plugin in built_in:
        folder = importlib.import_module(plugin.value).__path__
        names += [module.name for module in pkgutil.iter_modules(folder, f"{plugin.value}.")]
    for name in names:
        with suppress(ImportError):  # what is not installed, and a library that is no module
            importlib.import_module(name)
    for name in list(sys.modules):  # these read the environment once, as they are imported
        if name.partition(".")[0] in ("huggingface_hub", "trackio"):
            del sys.modules[name]


def _serve() -> None:
    del sys.path[0]  # the tests
    _import_everything()
    ended: dict[int, int] = {}
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin.buffer:
        job = json.loads(line)
        if "wait" not in job:
            answer: int | None = _fork()
            if answer == 0:
                _child(job)
        else:
            with suppress(ChildProcessError):
                while (found := _wait(-1, os.WNOHANG))[0]:
                    ended[found[0]] = os.waitstatus_to_exitcode(found[1])
            answer = ended.get(job["wait"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _child(job: Mapping[str, Any]) -> None:
    """Be a process that has just begun, and end as one."""
    code: Any = 1
    try:
        _begin(job)
        from mlxlora_core.cli import main

        main()
    except SystemExit as ending:
        code = ending.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(BaseException):
                stream.flush()
        _end(code if isinstance(code, int) else 1)


def _begin(job: Mapping[str, Any]) -> None:
    files = [os.open(os.devnull, os.O_RDONLY)]
    for name in ("out", "err"):
        files.append(os.open(f"{job['output']}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600))
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 256)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as the interpreter does
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]  # final there
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environ"])
    sys.path[:0] = filter(None, job["environ"].get("PYTHONPATH", "").split(os.pathsep))
    sys.dont_write_bytecode = bool(job["environ"].get("PYTHONDONTWRITEBYTECODE"))
    sys.argv = ["mlxlora", *(os.fsdecode(argument.encode("latin-1")) for argument in job["arguments"])]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    importlib.invalidate_caches()


if __name__ == "__main__":
    _serve()
