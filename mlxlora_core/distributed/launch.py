"""This command line again as several processes: rank 0 here, and each of the others here or by ssh.

This process waits for them, passes signals on, and ends those that are left when one has failed.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from mlxlora_core.distributed import environment
from mlxlora_core.distributed.hosts import Host, Hosts
from mlxlora_core.errors import ExitCode, RankError, UsageError
from mlxlora_core.files import durable
from mlxlora_core.machine import signals
from mlxlora_core.machine.children import safe_environment, safe_python
from mlxlora_core.machine.limits import exhausted
from mlxlora_core.machine.processors import THREADS, thread_count

#: how long ranks may go on when one has failed, which they see to themselves, such as by saving
FAILED_SECONDS = 600.0
#: and when one is lost, or rank 0 is done
ENDED_SECONDS = 8.0
#: and when rank 0 has failed, which alone has something to lose
VAIN_SECONDS = 1.0
_LOOK_SECONDS = 0.05
_LINES = 20  # of what a rank says that are kept
#: variables that ranks on other machines get too, by how their names begin; a command line is seen by others
_PASSED_ON, _SECRET = ("MLX", "HF_"), "TOKEN"


def launch(hosts: Hosts, arguments: Sequence[str], *, debug: bool = False) -> int:
    """Run ``mlxlora`` with these arguments once a rank; the exit code of rank 0.

    Args:
        hosts: where each rank runs.
        arguments: of the command line.
        debug: whether all that ranks other than 0 say is shown.

    Raises:
        RankError: rank 0 was ended from outside.
        UsageError: there are no ports for them, or no ssh.
        ResourceError: there is no room for so many processes.
    """
    with tempfile.TemporaryDirectory(prefix="mlxlora-") as folder:
        ring = hosts.ring()
        hostfile = Path(folder) / "hosts.json"
        durable.write_json(hostfile, ring)
        passed: list[int] = []
        with _ended() as ranks, signals.forwarded(lambda signum: _pass_on(ranks, signum, passed)):
            here = [host.is_here for host in hosts.ranks]
            for local in (True, False):
                # A signal that comes meanwhile goes to all that are here, as soon as they are ready for it.
                with signals.kept_back() if local else nullcontext():
                    for number in (number for number, is_here in enumerate(here) if is_here is local):
                        command, variables = _command(number, hosts, ring, hostfile, arguments)
                        ranks.append(_Rank(number, hosts.ranks[number], command, variables, debug=debug))
            _wait(ranks)
        return _result(ranks, passed)


class _Rank:
    """The process of one rank, or the ssh that leads to it."""

    def __init__(
        self, number: int, host: Host, command: Sequence[str], variables: Mapping[str, str], *, debug: bool
    ) -> None:
        self.number, self.host, self._debug = number, host, debug
        self.said: deque[str] = deque(maxlen=_LINES)
        first = number == 0
        reads = first and sys.stdin is not None and not sys.stdin.isatty()
        try:
            self.process = subprocess.Popen(
                command,
                env=variables,
                stdin=None if reads else subprocess.DEVNULL,
                stdout=None if first else subprocess.DEVNULL if host.is_here else subprocess.PIPE,
                stderr=None if first else subprocess.PIPE if host.is_here else subprocess.STDOUT,
                process_group=0,  # Ctrl-C comes to this process alone, which passes it on once
            )
        except OSError as fault:
            what = f"{command[0]} cannot start {self}: {fault.strerror}"
            raise exhausted(fault) or UsageError(what, fix="install it, or name fewer machines") from fault
        if not first:
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()

    def _listen(self) -> None:
        pipe = self.process.stderr or self.process.stdout
        assert pipe is not None
        for line in pipe:
            text = line.decode(errors="replace").strip()
            if text:
                self.said.append(text)
            if self._debug:
                sys.stderr.write(f"{self}: {text}\n")

    def __str__(self) -> str:
        return f"rank {self.number} on {self.host.name}"

    def signal(self, signum: int) -> None:
        """Send a signal, while there is somebody to get it."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signum)

    def last_words(self) -> str:
        """The last line that it has said, without who says it."""
        self._listener.join(1)
        last = self.said[-1] if self.said else f"it ended with exit code {self.process.returncode}"
        return last.rpartition("mlxlora: ")[2]  # MLX may have begun the line


def _command(
    number: int, hosts: Hosts, ring: list[list[str]], hostfile: Path, arguments: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """What starts a rank, and its variables."""
    program = [*safe_python("-m", "mlxlora_core"), *arguments]
    variables = {**hosts.environment, environment.RANK: str(number)}
    if hosts.ranks[number].is_here:
        local = {environment.HOSTFILE: str(hostfile), environment.LAUNCHER: str(os.getpid())}
        return program, {**_threads(hosts), **safe_environment(), **variables, **local}
    passed = {n: v for n, v in os.environ.items() if n.startswith(_PASSED_ON) and _SECRET not in n}
    script = _script(program, {**passed, **variables}, ring)
    return ["ssh", "-tt", "-o", "BatchMode=yes", hosts.ranks[number].name, script], dict(os.environ)


def _threads(hosts: Hosts) -> dict[str, str]:
    """A share of the processors for each rank on this machine, where nobody says how many to use."""
    count = sum(host.is_here for host in hosts.ranks)
    return {THREADS: str(max(1, thread_count() // count))}


def _script(program: Sequence[str], variables: Mapping[str, str], ring: list[list[str]]) -> str:
    """What a shell on another machine does: the same folder, the same command."""
    try:
        folder = os.getcwd()
    except FileNotFoundError as fault:
        what = "the working folder is gone, in which ranks on other machines begin"
        raise UsageError(what, fix="go to another one") from fault
    lines = [
        f"cd {shlex.quote(folder)} || exit {int(ExitCode.USAGE)}",
        "hosts=$(mktemp) || exit 6",
        f"printf %s {shlex.quote(json.dumps(ring))} > $hosts",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        f"{environment.HOSTFILE}=$hosts {shlex.join(program)} < /dev/null",
        "code=$?",
        "rm -f $hosts",
        "exit $code",
    ]
    return f"sh -c {shlex.quote('; '.join(lines))}"


@contextmanager
def _ended() -> Iterator[list[_Rank]]:
    """Ranks, of which none is left when the block ends."""
    ranks: list[_Rank] = []
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.signal(signal.SIGKILL)
        for rank in ranks:
            rank.process.wait()


def _pass_on(ranks: Sequence[_Rank], signum: int, passed: list[int]) -> None:
    """Give a signal to the ranks here, which agree with the others on the step that they end at."""
    passed.append(signum)
    for rank in ranks:
        if rank.host.is_here:
            rank.signal(signum)


def _wait(ranks: Sequence[_Rank]) -> None:
    """Wait until all have ended, or for long enough after one of them has."""
    left = math.inf
    while time.monotonic() < left:
        codes = [rank.process.poll() for rank in ranks]
        if None not in codes:
            return
        if codes[0] not in (None, ExitCode.OK, ExitCode.RANK):
            left = min(left, time.monotonic() + VAIN_SECONDS)
        elif codes[0] is not None or ExitCode.RANK in codes:
            left = min(left, time.monotonic() + ENDED_SECONDS)
        elif any(codes):
            left = min(left, time.monotonic() + FAILED_SECONDS)
        time.sleep(_LOOK_SECONDS)


def _result(ranks: Sequence[_Rank], passed: Sequence[int]) -> int:
    """The exit code of rank 0, and what others have said that it cannot know.

    Args:
        ranks: that have ended.
        passed: the signals that were passed on to them.

    Raises:
        RankError: it did not end by itself.
        Interrupted: it was ended by the one signal that was passed on, without a word.
    """
    code: int = ranks[0].process.returncode
    if passed and any(rank.process.returncode in (-passed[0], 128 + passed[0]) for rank in ranks):
        if code < 0 and len(passed) == 1:
            raise signals.Interrupted(passed[0])
        return 128 + passed[0]
    if code >= 0 and code != ExitCode.RANK:
        return code
    # Those that have failed for a reason of their own, before they could tell it to the others.
    told = [r for r in ranks[1:] if r.process.returncode > 0 and r.process.returncode != ExitCode.RANK]
    if code >= 0:
        for rank in told:
            sys.stderr.write(f"mlxlora: {rank}: {rank.last_words()}\n")
        return code
    witnesses = told or [r for r in ranks[1:] if r.process.returncode == ExitCode.RANK]
    if witnesses:
        raise RankError(witnesses[0].last_words())
    raise RankError(
        f"{ranks[0]} was ended by {signal.Signals(-code).name}",
        fix="go on: train with --resume, run as before",
    )
