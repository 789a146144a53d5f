"""mlxlora in processes of its own, and what happens to them in the middle of their work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from warm import Done, Running, Warm

#: a plugin file that watches which files are opened, and at the first with $AT in its path does $DO:
#: sends the process that signal, or says so in $MARK and waits for $MARK.go; $AT may be function():n
#: for the n-th call of a function of that name instead
WATCH = """
import os, sys, time
from pathlib import Path
from mlxlora_core.api import hookimpl

@hookimpl
def mlxlora_samplers():
    return []

todo = [os.environ["DO"]]

def act():
    do = todo.pop()
    if do != "wait":
        os.kill(os.getpid(), int(do))
        return
    mark = Path(os.environ["MARK"])
    mark.touch()
    while not mark.with_name(mark.name + ".go").exists():
        time.sleep(0.01)

def watch(event, arguments):
    if event == "open" and todo and os.environ["AT"] in str(arguments[0]):
        act()

function, _, number = os.environ["AT"].partition("():")
left = int(number or 0)

def profile(frame, event, argument):
    global left
    if event == "call" and frame.f_code.co_name == function:
        left -= 1
        if left == 0:
            sys.setprofile(None)
            act()

if number:
    sys.setprofile(profile)
else:
    sys.addaudithook(watch)
"""

Process = subprocess.Popen[str] | Running


class Program:
    """``mlxlora`` in ``folder``, with a plugin that watches it when ``at`` is given."""

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder = folder
        self.watch = folder / "watch.py"
        self.mark = folder / "mark"
        self._warm = warm

    def start(
        self, *arguments: object, at: str = "", do: int | str = "wait", prefix: tuple[str, ...] = ()
    ) -> Process:
        """A process that has begun; one that is to wait has come to the place where it does.

        With ``prefix``, a command that starts another, it has an interpreter of its own.
        """
        verb, *rest = map(str, arguments)
        if at:
            self.watch.write_text(WATCH)
            rest = ["-P", str(self.watch), *rest]
        variables = {"AT": at, "DO": str(int(do) if isinstance(do, int) else do), "MARK": str(self.mark)}
        environ = {**os.environ, **variables}
        process: Process
        if prefix:
            command = [*prefix, sys.executable, "-m", "mlxlora_core", verb, *rest]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = subprocess.Popen(command, cwd=self.folder, env=environ, text=True, **pipes)
        else:
            process = self._warm.start(verb, *rest, cwd=self.folder, environ=environ)
        if at and do == "wait":
            wait_for(self.mark.exists, process)
        return process

    def run(
        self, *arguments: object, at: str = "", do: int | str = "wait", prefix: tuple[str, ...] = ()
    ) -> Done:
        """What a process left behind."""
        return ended(self.start(*arguments, at=at, do=do, prefix=prefix))

    def go_on(self) -> None:
        """Let the one that waits go on."""
        self.mark.with_name("mark.go").touch()


def wait_for(condition: Callable[[], object], process: Process | None = None) -> None:
    """Wait until something holds; fail when the process that is to bring it about has ended."""
    while not condition():
        assert process is None or process.poll() is None, ended(process)
        time.sleep(0.01)


def ended(process: Process) -> Done:
    """A process that has ended, with what it said."""
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
