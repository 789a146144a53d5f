"""One child process that reads a package, from its start to the end of all that it has started."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import mlxlora_core.api
import mlxlora_docstrings
from mlxlora_docstrings import DocstringOptions
from mlxlora_docstrings.findings import decode, line_bytes
from mlxlora_docstrings.warden import processes

#: What a child may write in all; the largest packages write 25 MB in 30 000 records.
FINDINGS_BYTES, FINDINGS_RECORDS = 64 << 20, 200_000

#: Of the time that is left, what one module or class may take before the next attempt keeps out of it.
PLACE_SHARE = 1 / 3
STUCK = "no answer within a third of the time that was left (option time_limit)"

_CHUNK_BYTES = 1 << 16
_POLL_SECONDS = 0.05
_SWEEPS = 2  # what is just being started has no environment yet
_PATIENCE_SECONDS = 6.0  # for the end of a child that was told to end
# What a child needs of the environment to find an interpreter's libraries.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
_START = (
    "import json, sys; request = json.load(open(sys.argv[1], encoding='utf-8'));"
    "sys.path[:] = request.pop('sys_path');"
    "from mlxlora_docstrings.warden import main; main(request)"
)


@dataclass
class Attempt:
    """What one child process has told, as :mod:`mlxlora_docstrings.findings` describes it.

    Attributes:
        package: what it was to read.
        seq_limit: longest docstring in characters.
        documented: path -> docstring.
        skipped: source -> reason.
        death: how it ended before it was done, or nothing.
        place: the module or class that it worked on last, or nothing.
        stuck: whether that place is to blame, and not the package as a whole.
        pid: of the child, once it has told; it leads a process group.
        is_done: whether it has said that this is all.
    """

    package: str
    seq_limit: int
    documented: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    death: str = ""
    place: str = ""
    stuck: bool = False
    pid: int = 0
    is_done: bool = False
    _bytes: int = 0
    _records: int = 0
    _rest: bytes = b""

    def feed(self, chunk: bytes) -> None:
        """Take in some of what the child wrote.

        Raises:
            ValueError: it is more than a child of ours would write, or something else.
        """
        self._bytes += len(chunk)
        self._records += chunk.count(b"\n")
        if self._bytes > FINDINGS_BYTES or self._records > FINDINGS_RECORDS:
            raise ValueError("too much")
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > line_bytes(self.seq_limit):
            raise ValueError("a line without an end")
        for line in lines:
            if not self.is_done:
                self._take(decode(line, self.package, self.seq_limit))

    def _take(self, record: list[str]) -> None:
        kind = record[0]
        if (kind == "pid") != (self.pid == 0):
            raise ValueError("the number of the process comes first, and once")
        if kind == "pid":
            self.pid = int(record[1])
        elif kind == "at":
            self.place = record[1]
        elif kind == "row":
            self.documented[record[1]] = record[2]
        elif kind == "skip":
            self.skipped[record[1]] = record[2]
        else:
            self.is_done = True


def attempt(
    package: str, options: DocstringOptions, skip: list[str], deadline: float, stop: Event
) -> Attempt:
    """Run one child process to its end, in a temporary folder of its own.

    Args:
        package: what import takes.
        options: mode, seq_limit and time_limit are used.
        skip: places that it keeps out of.
        deadline: when it is ended, of :func:`time.monotonic`.
        stop: set by another thread to give up at once.
    """
    with tempfile.TemporaryDirectory(prefix="mlxlora-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        (folder / "home").mkdir()
        request = {
            "package": package,
            "mode": options.mode,
            "skip": skip,
            "seq_limit": options.seq_limit,
            "seconds": max(deadline - time.monotonic(), 0.0),
            "folder": str(folder),
            "sys_path": search_path(package),
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        return _run(folder, Attempt(package, options.seq_limit), options.time_limit, deadline, stop)


def _run(folder: Path, made: Attempt, time_limit: float, deadline: float, stop: Event) -> Attempt:
    """Run the child that ``folder`` has a request for.

    It has an environment, a home and a session of its own, reads nothing and
    prints nowhere; at the end, whatever it started is ended with it.
    """
    process = subprocess.Popen(
        # Not -I: that would also ignore PYTHONHASHSEED, and sets would print in any order.
        [sys.executable, "-P", "-s", "-W", "ignore", "-c", _START, str(folder / "request.json")],
        cwd=folder / "home",
        env=_environment(folder / "home"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        is_gone = _listen(process, made, deadline, stop)
        if is_gone and not made.is_done:
            with suppress(subprocess.TimeoutExpired):
                made.death = _ending(process.wait(max(deadline - time.monotonic(), 0.0)))
                made.stuck = True
    except ValueError:
        made.death, made.place = "it wrote into what the process that reads it tells", ""
    finally:
        _end(process, made.pid, folder)
    if not made.is_done and not made.death:
        made.death = f"no answer within {time_limit:g} s (option time_limit)"
    return made


def _listen(process: subprocess.Popen[bytes], made: Attempt, deadline: float, stop: Event) -> bool:
    """Take in what a child tells until it has told all or has had its time, or is gone, which gives True.

    Raises:
        ValueError: it is nothing that a child of ours tells.
    """
    assert process.stdout is not None
    place, since = "", time.monotonic()
    share = (deadline - since) * PLACE_SHARE
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not made.is_done and not stop.is_set() and (now := time.monotonic()) < deadline:
            if made.place != place:
                place, since = made.place, now
            if place not in ("", made.package) and now - since > share:
                made.death, made.stuck = STUCK, True
                return False
            ended = process.poll() is not None  # asked first: what it wrote before its end is there to read
            if selector.select(0 if ended else _POLL_SECONDS):
                chunk = os.read(process.stdout.fileno(), _CHUNK_BYTES)
                if not chunk:
                    return True
                made.feed(chunk)
            elif ended:
                return True  # and something that it started holds the pipe
    return False


def _end(process: subprocess.Popen[bytes], child: int, folder: Path) -> None:
    """Have the child and all that it started end; if the warden was killed or stopped, do its work."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE_SECONDS)
    for group in (process.pid, child):
        if group:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
    for _ in range(_SWEEPS if process.wait() < 0 else 0):
        _sweep(os.fsencode(f"HOME={folder / 'home'}"))
        time.sleep(_POLL_SECONDS)


def _sweep(home: bytes) -> None:
    """Kill what has this home: a warden that was killed could not see to it."""
    for pid in processes():
        with suppress(OSError):
            if home in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)


def _ending(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended the process with exit status {status}"
    try:
        return f"died with {signal.Signals(-status).name}"
    except ValueError:
        return f"died with signal {-status}"


def _environment(home: Path) -> dict[str, str]:
    """The variables of a child: none of the user's own, and nothing that differs from run to run."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    folders = dict.fromkeys(("HOME", "TMPDIR", "TMP", "TEMP"), str(home))
    fixed = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    return kept | folders | fixed


def search_path(package: str) -> list[str]:
    """Where this process imports from, without its working folder, which may hold anything.

    That stays only where PYTHONPATH names it and ``package`` lies in it, or
    where the installation names it, as it does a checkout that is installed in place.
    """
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        here = ""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep) if "PYTHONPATH" in os.environ else []
    named = {os.path.abspath(entry) for entry in entries if entry} if here else set(entries)
    top = package.partition(".")[0]
    wanted = here in named and any(path.name.partition(".")[0] == top for path in Path(here).iterdir())
    dropped = not wanted and (here in named or "" in entries or sys.path[:1] == [here])
    paths = [os.path.abspath(path) for path in sys.path if path and not (dropped and path == here)]
    ours = [str(Path(module.__file__ or "").parents[1]) for module in (mlxlora_core.api, mlxlora_docstrings)]
    return list(dict.fromkeys([*paths, *ours]))
