"""What queries give, asked of a process that may die of them."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlxlora_core.api import UsageError
from mlxlora_core.files import open_regular

_PROGRAM = Path(__file__).with_name("worker.py")


class QueryError(Exception):
    """A query that cannot be run, and why."""


def check(database: Path) -> None:
    """Open a database.

    Raises:
        UsageError: it is not there, is no database, or the SQL in it cannot be run.
    """
    open_regular(database, UsageError).close()
    try:
        rows_of(database, "SELECT count(*) FROM sqlite_master", 1, 1)
    except QueryError as fault:
        raise UsageError(
            f"is no database for evaluator sqlite: {fault}",
            where=database,
            fix="name an SQLite file, or a file of SQL that makes one",
        ) from fault


def rows_of(database: Path, query: str, seconds: float, most_rows: int) -> list[tuple[Any, ...]]:
    """What a query gives.

    Args:
        database: an SQLite file, or a file of SQL.
        query: one statement.
        seconds: processor time that it may take.
        most_rows: how many rows it may give.

    Raises:
        QueryError: it cannot be run, would do more than read, or takes or gives too much.
    """
    asked = {"database": str(database.absolute()), "query": query}
    said = _WORKER.ask(json.dumps({**asked, "seconds": seconds, "most_rows": most_rows}))
    if not said:
        raise QueryError(f"it does not end in {seconds:g} seconds, or takes all memory")
    answer = json.loads(said)
    if "fault" in answer:
        raise QueryError(answer["fault"])
    return [tuple(map(_cell, row)) for row in answer["rows"]]


def _cell(cell: Any) -> Any:
    return bytes.fromhex(cell[0]) if isinstance(cell, list) else cell


class _Worker:
    """The process that runs queries; it is started for the first, and again where one has ended it."""

    _process: subprocess.Popen[str] | None = None

    def ask(self, line: str) -> str:
        """What it answers; nothing where that has ended it."""
        if self._process is not None and self._process.poll() is not None:
            self.end()  # something else has ended it since
        process = self._process = self._process or _started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
        except BaseException as fault:  # such as Ctrl-C: what it answers later is for nobody
            self.end()
            if not isinstance(fault, BrokenPipeError):
                raise
            return ""
        if not said.endswith("\n"):
            self.end()
            return ""
        return said

    def end(self) -> None:
        """End the process, whatever it is at."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _started() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", str(_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="ascii",
        start_new_session=True,  # Ctrl-C is its caller's
    )


_WORKER = _Worker()
atexit.register(_WORKER.end)
