"""``python -m mlxlora_core.server.watching FOLDER SOCKET SIGNAL``: the page of a run of another process.

A process of its own, so that nothing that goes wrong with the page or with those who
look at it costs the training anything. It ends when its stdin does, which the run holds.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

from mlxlora_core.machine.signals import Pending
from mlxlora_core.server.app import Part, make_app
from mlxlora_core.server.guard import Policy
from mlxlora_core.server.live_routes import OPEN_PATHS, live_routes
from mlxlora_core.server.run import serve

CONNECTIONS = 64
_NICE = 5  # the training comes first


def main(arguments: list[str]) -> None:
    """Serve until the run has ended."""
    folder, descriptor, signum = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Ctrl-C in a terminal is the run's
        signal.signal(ending, signal.SIG_IGN)
    os.nice(_NICE)
    run = os.getppid()
    pending = Pending()

    def wait() -> None:
        sys.stdin.buffer.read()
        pending.signum = signal.SIGTERM

    threading.Thread(target=wait, daemon=True).start()

    def stop() -> None:
        if os.getppid() == run:
            os.kill(run, signum)

    part = Part(live_routes(folder, stop), OPEN_PATHS)
    app = make_app(None, Policy(), [part])
    serve(app, socket.socket(fileno=descriptor), pending, connections=CONNECTIONS)


if __name__ == "__main__":
    main(sys.argv[1:])
