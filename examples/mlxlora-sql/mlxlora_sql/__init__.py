"""Evaluator ``sqlite``: whether the query of an answer gives what that of its row gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import Answer, Evaluator, hookimpl, option

mlxlora_api = 2


@dataclass(frozen=True)
class SqliteOptions:
    """What queries are run on, and for how long."""

    database: Path = option(help="SQLite file, which is only read, or SQL that makes a database in memory")
    seconds: float = option(
        1.0, help="processor time that a query may take", unit="seconds", above=0, maximum=60
    )
    most_rows: int = option(10_000, help="rows that a query may give", minimum=1)


def score(answer: Answer, options: SqliteOptions) -> float:
    """See :func:`mlxlora_sql.compare.score`."""
    from mlxlora_sql import compare

    return compare.score(answer.text, answer.expected, options)


def prepare(options: SqliteOptions) -> None:
    """See :func:`mlxlora_sql.databases.check`."""
    from mlxlora_sql import databases

    databases.check(options.database)


@hookimpl
def mlxlora_evaluators() -> Iterable[Evaluator]:
    """What queries give."""
    summary = "whether the SQL of an answer gives, in SQLite, what that of its row gives"
    return [Evaluator(name="sqlite", summary=summary, options=SqliteOptions, score=score, prepare=prepare)]
