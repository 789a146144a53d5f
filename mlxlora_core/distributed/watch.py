"""The ranks watch one another: one that is lost ends all of them, with one line that names it.

Each has a thread that says once a second, on a connection beside MLX's own, that the process lives and
what it does. A process that waits for others in MLX cannot be interrupted, so that the thread ends it.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlxlora_core.distributed import environment
from mlxlora_core.distributed.environment import Meeting
from mlxlora_core.distributed.line import Line
from mlxlora_core.distributed.meeting import Ranks, go, listening, own_addresses, receive
from mlxlora_core.distributed.starting import met_before
from mlxlora_core.errors import ExitCode, MlxloraError, RankError, bounded
from mlxlora_core.machine.signals import Interrupted

if TYPE_CHECKING:
    from mlxlora_core.distributed.group import Group

BEAT_SECONDS = 1.0
#: after which a rank that is not heard of is lost
SILENCE_SECONDS = 15.0
#: for how long no rank may get on, beside five times the longest phase of the kind so far
HANG_SECONDS = 600.0
#: for how long a rank may still end by a fault of its own after another has
GRACE_SECONDS = 10.0
_TELL_SECONDS = 2.0
_NOISE_SECONDS = 0.3  # in which MLX says, piece by piece, that a connection broke
#: first words of phases: of the one in which nobody is waited for, and of those that all are in together
_SAVING, _TOGETHER = "saving", ("step", "validation")

_FIX = "see there what became of it, and go on: train with --resume, run as before"
_end = os._exit  # as it is before plugins are kept from it


class Watch:
    """What the other ranks are told of this one; :func:`watching` makes it."""

    def phase(self, words: str) -> None:
        """Say what this rank does from here on, such as ``step 12``: it is told when the rank is lost."""

    def leave(self, fault: BaseException) -> None:
        """Say that this rank ends by a fault, so that the others end too and tell why."""

    def finish(self) -> None:
        """Say that this rank is done, and wait until all are."""

    def explain(self, fault: BaseException) -> None:
        """Wait for the loss of a rank to be noticed, where a fault comes of a connection that broke.

        Raises:
            RankError: it does, and no rank is lost.
        """


@contextmanager
def watching(group: Group) -> Iterator[Watch]:
    """Watch the other ranks until the block ends, and let them watch this one; one block a process.

    Whatever the block raises ends the others too. Where it raises nothing, its end is reached when
    all ranks have come there.

    Raises:
        RankError: the connection to another rank broke in the block. A rank that is lost ends this
            process instead, with a line of the same kind.
    """
    if group.size == 1:
        yield Watch()
        return
    watch = _Watching(met_before() or _meet_by_message(group))
    try:
        yield watch
    except BaseException as fault:
        try:
            watch.explain(fault)
        finally:
            watch.leave(sys.exception() or fault)
        raise
    watch.finish()


def _meet_by_message(group: Group) -> Ranks:
    """The ranks met at a place that rank 0 tells by a message of MLX."""
    if group.rank != 0:
        told = json.loads(group.share(b"")[0])
        return go(Meeting(tuple(told["hosts"]), told["port"], told["proof"]), group.rank)
    server, proof = listening("", 0), secrets.token_hex(16)
    port = server.getsockname()[1]
    group.share(json.dumps({"hosts": own_addresses(), "port": port, "proof": proof}).encode())
    return receive(server, group.size, proof)


class _Watching(Watch):
    """The watch of a process that has others beside it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._rank, self._lines = ranks, ranks.rank, ranks.lines
        self._phase, self._moves, self._since = "the start", 0, time.monotonic()
        #: this rank needs nobody any more; it ends by itself; it has lost a connection, and only waits
        self._finished, self._left, self._broken = False, False, False
        self._launcher = environment.launcher()
        self._over = threading.Event()  # no rank needs another
        self._pace = _Pace()
        self._fault, self._grace = "", _Grace()
        threading.Thread(target=self._run, name="watch of the ranks", daemon=True).start()

    def phase(self, words: str) -> None:
        self._pace.took(self._phase, time.monotonic() - self._since)
        self._phase, self._moves, self._since = words, self._moves + 1, time.monotonic()
        self._beat()

    def leave(self, fault: BaseException) -> None:
        self._left = True
        plain = isinstance(fault, MlxloraError | Interrupted)
        self._ranks.tell_left(self._phase, fault if plain else f"{type(fault).__name__}: {fault}")

    def finish(self) -> None:
        self.phase("the end")
        self._finished = True
        if self._rank == 0:
            self._check_done()
        else:
            self._tell(done=True)
        self._over.wait()

    def explain(self, fault: BaseException) -> None:
        if not (isinstance(fault, RuntimeError) and str(fault).startswith("[")):  # as MLX begins them
            return
        self._broken = True
        self._over.wait(SILENCE_SECONDS + 2 * BEAT_SECONDS)  # in which the thread ends the process
        raise RankError(f"the connection to other ranks broke at {self._phase}: {fault}", fix=_FIX) from fault

    def _tell(self, but: Line | None = None, **message: Any) -> None:
        for line in self._lines:
            if line is not but:
                line.send(**message)

    def _beat(self) -> None:
        self._tell(phase=self._phase, moves=self._moves)

    def _check_done(self) -> None:
        """As rank 0: let all go when nobody needs anybody any more."""
        if self._finished and all(line.done for line in self._lines):
            self._tell(done=True)
            self._over.set()

    # --- the thread -----------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for line in self._lines:
                selector.register(line, selectors.EVENT_READ, line)
            beaten = time.monotonic()
            while not self._over.is_set():
                for key, _ in selector.select(max(0.0, beaten + BEAT_SECONDS - time.monotonic())):
                    self._read(key.data, selector)
                passed = time.monotonic() - beaten
                if passed >= BEAT_SECONDS:
                    beaten += passed
                    self._beat()
                    # A process that was stopped itself has not listened for longer than that.
                    self._judge(min(passed, 2 * BEAT_SECONDS))

    def _read(self, line: Line, selector: selectors.BaseSelector) -> None:
        messages = line.received()
        if messages is None:
            selector.unregister(line)
            if not line.done:
                self._lose(line, "its connection has ended, as when a process is killed")
        for message in messages or ():
            self._take(line, message)

    def _take(self, line: Line, message: dict[str, Any]) -> None:
        """Do what a message of another rank asks for."""
        line.phase = str(message.get("phase", line.phase))
        line.moves = message.get("moves", line.moves)
        if "lost" in message:
            self._end(str(message["lost"]))
        elif "left" in message:
            line.done = line.done or message.get("rank") == line.rank  # and ends now
            self._tell(but=line, left=message["left"], rank=message.get("rank"))
            self._fault = self._fault or str(message["left"])
        elif "done" in message:
            line.done = True
            if self._rank == 0:
                self._check_done()
            else:
                self._over.set()

    def _judge(self, seconds: float) -> None:
        """Look at what was heard in the last seconds."""
        if self._launcher and os.getppid() != self._launcher:  # it was killed: nobody shows this any more
            self._launcher = 0
            os.kill(os.getpid(), signal.SIGTERM)
        for line in self._lines:
            line.silent_seconds += seconds
            if line.silent_seconds > SILENCE_SECONDS and not line.done:
                said = f"nothing was heard of it for {SILENCE_SECONDS:.0f} s"
                self._lose(line, f"{said}, as when it is stopped or its network is cut")
        if self._fault and (self._broken or self._grace.is_over(seconds, self._phase)):
            self._end(self._fault)
        moves = self._moves + sum(line.moves for line in self._lines)
        if self._rank == 0 and self._pace.hangs(seconds, moves, self._phase):
            places = ", ".join(f"{self._ranks.called(line.rank)} at {line.phase}" for line in self._lines)
            what = f"no rank gets on: {self._ranks.called(0)} at {self._phase}, {places}"
            what += ". Fix: see which one hangs, or to the network between them, and go on as after a kill"
            self._tell(lost=what)
            self._end(what)

    def _lose(self, line: Line, why: str) -> None:
        what = f"{self._ranks.called(line.rank)} is lost at {line.phase}: {why}. Fix: {_FIX}"
        self._tell(but=line, lost=what)
        self._end(what)

    def _end(self, what: str) -> None:
        """End this process with a line, unless it does so by itself."""
        if self._left or self._over.is_set():
            return
        time.sleep(_NOISE_SECONDS)
        line = f"mlxlora: {bounded(what)}\n"
        teller = threading.Thread(target=sys.stderr.write, args=[line], daemon=True)
        teller.start()
        teller.join(_TELL_SECONDS)  # which nobody may take any more, while this process holds the stream
        _end(ExitCode.RANK)


class _Pace:
    """How the ranks get on, in phases that all are in together.

    MLX waits for a message as busily as it computes, so that only time tells one from the other.
    """

    def __init__(self) -> None:
        self._longest: dict[str, float] = {}  # of a phase, by its first word
        self._seconds, self._seen = 0.0, -1

    def took(self, phase: str, seconds: float) -> None:
        """Note how long a phase was."""
        kind = phase.partition(" ")[0]
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def hangs(self, seconds: float, moves: int, phase: str) -> bool:
        """Whether nobody has begun a phase for too long, some seconds later.

        Args:
            seconds: since it was asked before.
            moves: how many phases all ranks have begun.
            phase: that rank 0 is in.
        """
        kind = phase.partition(" ")[0]
        if moves != self._seen or kind not in _TOGETHER or kind not in self._longest:
            self._seconds, self._seen = 0.0, moves
            return False
        self._seconds += seconds
        return self._seconds > HANG_SECONDS + 5 * self._longest[kind]


class _Grace:
    """How long a rank may still end by itself after another has ended by a fault."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def is_over(self, seconds: float, phase: str) -> bool:
        """Whether it is, some seconds later; what is being saved is let be saved."""
        if not phase.startswith(_SAVING):
            self._seconds += seconds
        return self._seconds > GRACE_SECONDS
