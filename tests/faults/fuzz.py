"""Damages every kind of file that mlxlora parses and has child processes parse what comes out.

    python tests/faults/fuzz.py --count 10000
    python tests/faults/fuzz.py --kind npz --only 137 --keep bad.npz

A mutation passes when it is refused by a :class:`mlxlora_core.errors.MlxloraError`
in one line, or accepted with what an independent reader finds in it. It
fails when anything else is raised, the child dies, takes more than 256 MB above
what it had before, or more than 2 s of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import file_kinds
import structures
from mutations import mutation, summary

MEMORY_BYTES = 256 << 20
SECONDS = 2.0
_PATIENCE_SECONDS = 60.0  # for a child on a busy machine, whose own clock counts


@dataclass
class Tally:
    """What became of the mutations of one kind.

    Attributes:
        kind: of file.
        same: accepted with the content of the good file.
        equal: accepted with other content, which an independent reader finds too.
        refused: refused in one line.
        faults: number of the mutation -> what went wrong.
        slowest_seconds: of processor time for one.
        largest_bytes: of memory above the start for one.
        seconds: for all.
    """

    kind: str
    same: int = 0
    equal: int = 0
    refused: int = 0
    faults: dict[int, str] = field(default_factory=dict)
    slowest_seconds: float = 0.0
    largest_bytes: int = 0
    seconds: float = 0.0

    def add(self, number: int, answer: dict[str, Any]) -> None:
        """Count one answer of a child."""
        verdict = answer["verdict"]
        if verdict in ("same", "equal", "refused"):
            setattr(self, verdict, getattr(self, verdict) + 1)
        else:
            self.faults[number] = verdict
        self.slowest_seconds = max(self.slowest_seconds, answer.get("seconds", 0.0))
        self.largest_bytes = max(self.largest_bytes, answer.get("bytes", 0))
        if answer.get("seconds", 0.0) > SECONDS:
            self.faults[number] = f"took {answer['seconds']:.1f} s ({verdict})"
        if answer.get("bytes", 0) > MEMORY_BYTES:
            self.faults[number] = f"took {answer['bytes'] >> 20} MB ({verdict})"

    def __str__(self) -> str:
        return (
            f"{self.kind:12} {self.refused:6} refused {self.same:6} same {self.equal:6} equal "
            f"{len(self.faults):4} faults; slowest {self.slowest_seconds:.2f} s, "
            f"most {self.largest_bytes / 1e6:.0f} MB, {self.seconds:.0f} s in all"
        )


def fuzz(kind: str, numbers: Sequence[int], material: Path) -> Tally:
    """Have children parse the mutations of ``numbers``, one after another.

    Args:
        kind: a key of :data:`file_kinds.KINDS`.
        numbers: which mutations.
        material: what :func:`file_kinds.prepare` has made.
    """
    tally = Tally(kind)
    began = time.monotonic()
    child: _Child | None = None
    for number in numbers:
        child = child or _Child(kind, material)
        answer = child.ask(number)
        tally.add(number, answer)
        if "seconds" not in answer or answer["bytes"] > MEMORY_BYTES // 2:
            child.end()
            child = None
    if child:
        child.end()
    tally.seconds = time.monotonic() - began
    return tally


class _Child:
    """A process that parses mutations of one kind until it dies of one."""

    def __init__(self, kind: str, material: Path) -> None:
        self.folder = tempfile.mkdtemp(prefix="mlxlora-fuzz-")
        command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, str(material), self.folder]
        variables = {**os.environ, "MLXLORA_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=variables,
            bufsize=0,
        )

    def ask(self, number: int) -> dict[str, Any]:
        """What the child says of one mutation, or how it ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(b"%d\n" % number)
        except BrokenPipeError:
            return {"verdict": f"the child was gone ({self.process.wait()})"}
        if not select.select([self.process.stdout], [], [], _PATIENCE_SECONDS)[0]:
            return {"verdict": f"no answer within {_PATIENCE_SECONDS:g} s"}
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            return {"verdict": f"the child died with {self.process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """End it, and its folder."""
        self.process.kill()
        self.process.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)


def serve(kind: str, material: Path, folder: Path) -> None:
    """What a child does: numbers in, an answer a line out."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a parser prints is no answer
    subject = file_kinds.KINDS[kind](material, folder)
    wanted = {}
    for i, good in enumerate(subject.good):
        subject.path.write_bytes(good)
        wanted[i] = subject.parse()
        found = subject.reference()
        assert wanted[i] == found, (kind, i, wanted[i], found)
    before = _memory("VmRSS")
    for line in sys.stdin:
        number = int(line)
        which = number % len(subject.good)
        subject.path.write_bytes(damaged(subject, kind, number))
        _forget_peak()
        began = time.process_time()
        verdict = _verdict(subject, wanted[which])
        seconds = time.process_time() - began
        answer = {"verdict": verdict, "seconds": seconds, "bytes": _memory("VmHWM") - before}
        answers.write(json.dumps(answer) + "\n")


def damaged(subject: file_kinds.Subject, kind: str, number: int) -> bytes:
    """The bytes of one mutation."""
    data = subject.good[number % len(subject.good)]
    if subject.is_document and number // len(subject.good) % 2:
        draw = random.Random(f"{kind}/{number}")
        return structures.as_json(structures.changed(json.loads(data), draw))
    return mutation(data, subject.good, subject.header_bytes, kind, number // len(subject.good))


def _verdict(subject: file_kinds.Subject, wanted: object) -> str:
    from mlxlora_core.errors import MlxloraError

    try:
        got = subject.parse()
    except MlxloraError as fault:
        told = str(fault)
        return "refused" if told.isprintable() and len(told) < 2000 else f"told in {told[:100]!r}..."
    except BaseException as fault:
        return f"raised {type(fault).__name__}: {fault}"[:300]
    if got == wanted:
        return "same"
    try:
        found = subject.reference()
    except Exception as fault:
        return f"accepted what another reader refuses ({type(fault).__name__}: {fault})"[:300]
    return "equal" if got == found else f"accepted as {got!r:.200}, another reader finds {found!r:.200}"


def _memory(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since :func:`_forget_peak`."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(what + ":"))


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _parts(count: int, jobs: int) -> Iterator[range]:
    return (range(start, count, jobs) for start in range(jobs))


def main() -> int:
    """Run from the command line; 1 when a mutation went wrong."""
    if sys.argv[1:2] == ["--child"]:
        serve(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="mutations of each kind")
    parser.add_argument("--kind", action="append", choices=list(file_kinds.KINDS), help="these kinds only")
    parser.add_argument("--jobs", type=int, default=1, help="children side by side")
    parser.add_argument("--only", type=int, help="this mutation only")
    parser.add_argument("--keep", type=Path, help="with --only: write its bytes there")
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="mlxlora-fuzz-") as name:
        material = Path(name)
        file_kinds.prepare(material)
        for kind in options.kind or file_kinds.KINDS:
            if options.only is not None:
                parts = [range(options.only, options.only + 1)]
            else:
                parts = list(_parts(options.count, options.jobs))
            if options.keep:
                subject = file_kinds.KINDS[kind](material, Path(tempfile.mkdtemp(dir=name)))
                options.keep.write_bytes(damaged(subject, kind, options.only))
            with ThreadPoolExecutor(options.jobs) as pool:
                tallies = list(pool.map(partial(fuzz, kind, material=material), parts))
            for tally in tallies:
                sys.stdout.write(f"{tally}\n")
                sys.stdout.writelines(summary(tally.faults))
                bad += len(tally.faults)
            sys.stdout.flush()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
