"""Runs queries that nobody has looked at, in a process of its own: this file is a program.

A line of JSON in, ``{"database", "query", "seconds", "most_rows"}``; a line out, ``{"rows"}`` or
``{"fault"}``. Whatever the clock of SQLite does not end, the system does: the process dies then,
and its caller starts another. Nothing but the standard library is imported, so that it starts at once.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

_MAGIC = b"SQLite format 3\0"
_MEMORY = 2 << 30  # bytes of the process
_MAKING = 60  # seconds of processor time that SQL may take which makes a database
_STEPS = 1000  # of SQLite's machine, between looks at the clock
_MOST_BYTES = 16 << 20  # of all rows of a query

#: what a query may do; all else is refused, such as attaching another file
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
#: functions that give something else each time, or reach outside
_FUNCTIONS = {"random", "randomblob", "load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,  # bytes of a text
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}


class Refused(Exception):
    """A query that is not answered, and why."""


def main() -> None:
    """Answer lines until there are no more."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for line in sys.stdin:
        print(json.dumps(_answer(**json.loads(line))), flush=True)  # noqa: T201 - it is a program


def _answer(database: str, query: str, seconds: float, most_rows: int) -> dict[str, Any]:
    try:
        _end_after(_MAKING)
        with _opened(database) as connection:
            _end_after(seconds)
            _bound(connection, seconds)
            cursor = connection.execute(query)
            if cursor.description is None:
                raise Refused("it is no query")
            return {"rows": _some(cursor, most_rows)}
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, OSError, Refused) as fault:
        return {"fault": str(fault)}
    except MemoryError:
        return {"fault": "it takes too much memory"}


def _end_after(seconds: float) -> None:
    """Let the system end this process when it has taken so much more processor time, and a second."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    end = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (end if most < 0 else min(end, most), most))


@contextmanager
def _opened(database: str) -> Iterator[sqlite3.Connection]:
    """A connection for one query, by which nothing can be written."""
    status = os.stat(database)
    contents = _made(database, status.st_size, status.st_mtime_ns)
    uri = f"{Path(database).absolute().as_uri()}?mode=ro"
    opened = sqlite3.connect(":memory:") if contents is not None else sqlite3.connect(uri, uri=True)
    with closing(opened) as connection:
        if contents is not None:
            connection.deserialize(contents)
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        connection.execute("PRAGMA query_only = ON")
        yield connection


@lru_cache(maxsize=4)
def _made(database: str, size: int, changed: int) -> bytes | None:
    """The database that a file of SQL makes; None for one that is a database itself."""
    with open(database, "rb") as file:
        if file.peek(len(_MAGIC))[: len(_MAGIC)] == _MAGIC:
            return None
        script = file.read()
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)  # it opens no other file
        connection.executescript(script.decode("utf-8-sig"))
        return connection.serialize()


def _bound(connection: sqlite3.Connection, seconds: float) -> None:
    """Let a connection read, for so long."""
    for limit, value in _LIMITS.items():
        connection.setlimit(limit, value)
    end = time.process_time() + seconds

    def allow(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        good = action in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second not in _FUNCTIONS)
        return sqlite3.SQLITE_OK if good else sqlite3.SQLITE_DENY

    connection.set_authorizer(allow)
    connection.set_progress_handler(lambda: time.process_time() > end, _STEPS)


def _some(cursor: sqlite3.Cursor, most_rows: int) -> list[list[Any]]:
    rows, held = list[list[Any]](), 0
    for row in cursor:
        held += sum(len(cell) if isinstance(cell, str | bytes) else 8 for cell in row)
        if len(rows) == most_rows or held > _MOST_BYTES:
            raise Refused(f"it gives more than {most_rows} rows or {_MOST_BYTES >> 20} MiB")
        # A list is what JSON has no other use for here.
        rows.append([[cell.hex()] if isinstance(cell, bytes) else cell for cell in row])
    return rows


if __name__ == "__main__":
    main()
