"""The process in which plugins are checked: ended where it hangs, and begun again behind what ended it."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sysconfig
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mlxlora_core.cli import show
from mlxlora_core.errors import PluginError
from mlxlora_core.files import durable
from mlxlora_core.machine.children import safe_python

Finding = Mapping[str, Any]

#: what is tried before the files of an author's tests are read
CONFTEST = "conftest"
_CORE, _STANDARD = str(Path(__file__).parents[1]), sysconfig.get_path("stdlib")
_START_SECONDS = 120.0  # until the first line
_GRACE_SECONDS = 2.0  # more than a case may take, in which the process says where it stands
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in ', re.MULTILINE)


@dataclass
class Job:
    """What the process is to do, as far as it is not done.

    Attributes:
        given: ``plugins``, ``tests`` and ``settings`` as :mod:`mlxlora_core.testing.check` reads them.
        plain: a file of settings of pytest that says nothing.
        environment: variables of the process.
        folder: that it works in, and may fill.
        seconds: that one case may take.
        seen: names of all that was begun.
        failed: names of what has ended the process, or was ended.
    """

    given: Mapping[str, Any]
    plain: Path
    environment: Mapping[str, str]
    folder: Path
    seconds: float
    seen: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def written(self, out: int) -> Path:
        """The file of the job, for a process that tells its findings to ``out``."""
        told = {**self.given, "seen": self.seen, "failed": self.failed, "seconds": self.seconds, "out": out}
        if CONFTEST in self.failed:
            told |= {"tests": [], "settings": str(self.plain)}
        durable.write_json(self.folder / "job.json", told)
        return self.folder / "job.json"


def findings(job: Job) -> Iterator[Finding]:
    """What is found, as it comes; the bar shows how far it is.

    A case that ends the process, or does not end, is a finding of its own, and the others go on without it.

    Raises:
        PluginError: the process ended outside of all cases.
    """
    with show.Bar() as bar:
        while (stopped := (yield from _round(job, bar))) is not None:
            job.failed.append(stopped["name"])
            if stopped["about"]:
                yield stopped["about"]


def _round(job: Job, bar: show.Bar) -> Generator[Finding, None, Finding | None]:
    """The findings of one process; what stopped it, or None when it has come to its end."""
    reader, writer = os.pipe()
    command = safe_python("-m", "mlxlora_core.testing.check", str(job.written(writer)))
    with (job.folder / "stderr").open("w+b") as stderr:
        process = subprocess.Popen(
            command,
            env=job.environment,
            cwd=job.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=[writer],
            start_new_session=True,  # what a plugin starts ends with it
        )
        os.close(writer)
        running: Finding = {}
        ended: Finding = {}
        hung = False
        try:
            for told in _told(reader, _START_SECONDS):
                if told is None:
                    hung = process.poll() is None  # else a child of it has the pipe
                    break
                if "running" in told:
                    running = told
                    job.seen.append(told["running"])
                    if "count" in told:
                        bar.move("checking", told["done"], told["count"])
                elif "ended" in told:
                    ended = told
                else:
                    yield told
            code = None if hung else process.wait()
        finally:
            os.close(reader)
            _end(process)
        if ended.get("ended") == 0:
            return None
        return _stopped(job, running, _how(code, ended, job.seconds), _text(stderr), code)


def _told(reader: int, seconds: float) -> Iterator[Finding | None]:
    """The lines that a process tells, and None where it tells nothing for longer than the last has said."""
    held = b""
    while True:
        if not select.select([reader], [], [], seconds)[0]:
            yield None
        data = os.read(reader, 1 << 16)
        if not data:
            return
        *lines, held = (held + data).split(b"\n")
        for line in lines:
            told = json.loads(line)
            seconds = told.get("seconds", seconds - _GRACE_SECONDS) + _GRACE_SECONDS
            yield told


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _how(code: int | None, ended: Finding, seconds: float) -> str:
    """How a case has stopped the process, in words."""
    if code is None:
        return f"no end after {seconds:g} s"
    if ended:
        return f"the checks were ended by {ended['by']}"
    return f"the process was ended {_by(code)}"


def _by(code: int) -> str:
    """A signal or an exit code, in words."""
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _stopped(job: Job, running: Finding, how: str, stderr: str, code: int | None) -> Finding:
    """What has stopped the process, with the finding that tells it.

    Raises:
        PluginError: it was none of the cases, or one that has stopped it before.
    """
    said = [line for line in stderr.splitlines() if line.strip()]
    name = running.get("running", "")
    if not name or name in job.failed:
        what = f"the process that checks: {how}"
        raise PluginError(f"{what}: {said[-1].strip()}" if said else what)
    got = f"{how}: {said[-1].strip()}" if name == CONFTEST and said and code is not None else how
    told = {"result": "failed", "got": got, "where": _where(stderr)}
    return {"name": name, "about": running["about"] and {**running["about"], **told}}


def _where(stderr: str) -> str:
    """The last call that is neither of Python's library nor of mlxlora, where it has said so."""
    for path, line in _FRAME.findall(stderr.rpartition("(most recent call first)")[2]):
        if not path.startswith(_CORE) and (not path.startswith(_STANDARD) or "site-packages" in path):
            return f"{Path(path).name}:{line}"
    return ""


def _text(file: IO[bytes]) -> str:
    """What stands in a file, or its end where it is long."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
    return file.read().decode("utf-8", "replace")
