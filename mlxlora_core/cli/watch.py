"""The page of a run while it goes on: a server in a process of its own, from before the work to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from mlxlora_core.cli import show
from mlxlora_core.errors import UsageError
from mlxlora_core.machine.children import safe_environment, safe_python

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8080

_END_SECONDS = 3.0  # that the server is given to end
_LAST_LOOK_SECONDS = 1.5  # in which an open page learns how the run has ended


@contextmanager
def watched(folder: Path, port: int) -> Iterator[None]:
    """Serve the page of a run as long as the block goes on; its address is told on stderr.

    Args:
        folder: of the run.
        port: of the loopback address; 0 is one that is free.

    Raises:
        UsageError: the port is taken, or the libraries of the server are not installed.
    """
    require_extra()
    from mlxlora_core.server.run import listen, url_of

    try:
        taken = listen(LOOPBACK, port)
    except UsageError as fault:
        fault.fix = "choose another with --watch-port"
        raise
    with taken as listening:
        address = url_of(listening)
        child = _started(folder, listening.fileno())
    show.progress(f"the run can be watched at {address}/run")
    try:
        yield
    finally:
        _end(child)


def require_extra() -> None:
    """Refuse to go on without the libraries of the extra.

    Raises:
        UsageError: one is absent.
    """
    absent = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if absent:
        raise UsageError(f"{absent[0]} is not installed", fix="pip install 'mlxlora[serve]'")


def _started(folder: Path, descriptor: int) -> subprocess.Popen[bytes]:
    """The server; it gets the signals of the terminal and leaves them to the run."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # in the background of a shell, for one
    stop = signal.SIGTERM if ignored else signal.SIGINT
    module = ["-m", "mlxlora_core.server.watching", os.path.abspath(folder), str(descriptor), str(int(stop))]
    return subprocess.Popen(
        safe_python(*module),
        env=safe_environment(),
        pass_fds=(descriptor,),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    """Let the server end, once an open page has had time to see how the run ended."""
    if child.poll() is None:
        time.sleep(_LAST_LOOK_SECONDS)
    assert child.stdin is not None
    with suppress(OSError):
        child.stdin.close()
    try:
        child.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
