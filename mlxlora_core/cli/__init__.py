"""The command line: where a process begins and ends.

Signals are seen to before anything else is imported, so that Ctrl-C in the
first moments is no traceback either.
"""

from __future__ import annotations

import signal
import sys

from mlxlora_core.machine import signals


def main() -> None:
    """Run the command line and leave with a documented exit code."""
    if hasattr(signal, "SIGPIPE"):
        # A reader that goes away ends us as it ends any program, without a word.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signals.install()
    code = execute(sys.argv[1:])
    signals.uninstall()
    sys.exit(code)


def execute(arguments: list[str]) -> int:
    """The exit code of a command line; every failure is one line on stderr."""
    try:
        from mlxlora_core.cli import verbs

        return verbs.execute(arguments)
    except (signals.Interrupted, KeyboardInterrupt) as fault:
        from mlxlora_core.errors import one_line

        sys.stderr.write(f"mlxlora: {one_line(fault) or 'interrupted'}\n")
        return fault.exit_code if isinstance(fault, signals.Interrupted) else 128 + signal.SIGINT
    except OSError as fault:  # so little is left of the machine that nothing more can be imported
        sys.stderr.write(f"mlxlora: {fault}\n")
        return 6
