"""The command line: where a process begins and ends.

Signals and the standard streams are seen to before anything else is imported,
so that Ctrl-C in the first moments is no traceback either.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from contextlib import suppress

from mlxlora_core.cli import streams
from mlxlora_core.machine import signals
from mlxlora_core.machine.children import forget_working_folder

_end = os._exit  # as it is before plugins are kept from it

#: how long threads and exit functions of plugins may go on when all is done
GRACE_SECONDS = 5.0


def main() -> None:
    """Run the command line and leave with a documented exit code."""
    signals.install()
    forget_working_folder()
    streams.open_streams()
    warnings.showwarning = streams.tell_warning
    code = execute(sys.argv[1:])
    signals.uninstall()
    _see_to_the_end(code)
    sys.exit(code)


def execute(arguments: list[str]) -> int:
    """The exit code of a command line; every failure is one line on stderr."""
    try:
        signals.let_in()
        from mlxlora_core.cli import verbs

        return verbs.execute(arguments)
    except (signals.Interrupted, KeyboardInterrupt) as fault:
        from mlxlora_core.errors import one_line

        sys.stderr.write(f"mlxlora: {one_line(fault) or 'interrupted'}\n")
        return fault.exit_code if isinstance(fault, signals.Interrupted) else 128 + signal.SIGINT
    except (OSError, MemoryError) as fault:  # too little of the machine is left to import anything more
        sys.stderr.write(f"mlxlora: {str(fault) or 'there is not enough memory'}\n")
        return 6


def _see_to_the_end(code: int) -> None:
    """Let the process end with ``code`` also when a thread or an exit function of a plugin does not end."""

    def watch() -> None:
        time.sleep(GRACE_SECONDS)
        left = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
        what = ", ".join(map(_described, left)) or "an exit function"
        sys.stderr.write(f"mlxlora: warning: still at work, and left behind: {what}\n")
        _end(code)

    with suppress(RuntimeError):  # no thread can be had, and so there is none to wait for
        threading.Thread(target=watch, daemon=True).start()


def _described(thread: threading.Thread) -> str:
    """A thread and the file that it is at work in."""
    frame = sys._current_frames().get(thread.ident or 0)
    file = ""
    while frame is not None and frame.f_code.co_filename != threading.__file__:
        file = frame.f_code.co_filename
        frame = frame.f_back
    return f"thread {thread.name}{f' of {file}' if file else ''}"
