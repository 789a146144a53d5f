"""The process between mlxlora and the one that reads: whatever a package starts ends with it.

A package that kills its parent kills this one. Standard input is a lifeline:
its other end is mlxlora's alone, so it closes when mlxlora is gone in whatever
way, and then everything below ends and the temporary folder goes.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from mlxlora_docstrings import child

_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of prctl
_PATIENCE_SECONDS = 5.0


def main(request: dict[str, Any]) -> None:
    """Start the reader, wait until it or mlxlora is gone, end what is left, and end as the reader did.

    Args:
        request: as :func:`mlxlora_docstrings.child.main` takes it.
    """
    _prctl(_SET_CHILD_SUBREAPER, 1)  # what loses its parent becomes ours, in whatever session it is
    reader = os.fork()
    if not reader:
        os.setsid()
        _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        child.main(request)
    os.close(1)  # the pipe closes with the reader
    status = _wait(reader)
    end_below(os.getpid(), reader)
    if status is None:
        shutil.rmtree(request["folder"], ignore_errors=True)
        status = signal.SIGKILL
    _leave(status)


def end_below(parent: int, group: int) -> None:
    """Kill a process group and the children of this process until there are none.

    Args:
        parent: this process.
        group: the reader's, which is the whole tree where the system has no ``/proc``.
    """
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        for pid in processes():
            with suppress(OSError):
                if _parent_of(pid) == parent:
                    os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def processes() -> Iterator[int]:
    """The numbers of all processes, where the system tells them in ``/proc``."""
    with suppress(OSError):
        yield from (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


def _wait(reader: int) -> int | None:
    """The status that the reader ended with, or None when mlxlora is gone."""
    bell, ringer = os.pipe()
    os.set_blocking(ringer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ringer, warn_on_full_buffer=False)
    lifeline = select.poll()
    for end in (0, bell):
        lifeline.register(end, select.POLLIN | select.POLLHUP)
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == reader:
            return status
        if not pid:
            ready = [end for end, _ in lifeline.poll()]
            if 0 in ready:
                return None
            os.read(bell, 4096)


def _leave(status: int) -> None:
    """End this process as another one has ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with suppress(ImportError):
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def _prctl(what: int, value: int) -> None:
    """A setting that only Linux has."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(what, value, 0, 0, 0)
