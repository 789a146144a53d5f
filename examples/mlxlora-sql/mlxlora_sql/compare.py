"""What two queries give, held against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxlora_core.api import DataError
from mlxlora_sql.databases import QueryError, rows_of
from mlxlora_sql.statements import first_statement, is_ordered

if TYPE_CHECKING:
    from mlxlora_sql import SqliteOptions

_Row = tuple[Any, ...]
_SAME = 1e-9  # relative difference of numbers that are one: sums depend on the order of rows


def score(text: str, expected: str, options: SqliteOptions) -> float:
    """1 where the query of an answer gives the rows that are wanted, else 0.

    Args:
        text: the answer; its first statement counts.
        expected: the query that gives the rows that are wanted. Their order counts where it has
            an ORDER BY. The names of columns never do, their order does.
        options: of the evaluator.

    Raises:
        DataError: the query that is expected cannot be run, so that no answer is right.
    """
    bounds = options.database, options.seconds, options.most_rows
    wanted = first_statement(expected)
    try:
        want = rows_of(bounds[0], wanted, *bounds[1:])
    except QueryError as fault:
        raise DataError(
            f"the query of a row cannot be run: {fault} ({wanted[:80]!r})",
            where=options.database,
            fix="mend the row, or name the database that it is for",
        ) from fault
    try:
        got = rows_of(bounds[0], first_statement(text), *bounds[1:])
    except QueryError:
        return 0.0
    return float(same_rows(got, want, ordered=is_ordered(wanted)))


def same_rows(got: Sequence[_Row], want: Sequence[_Row], *, ordered: bool) -> bool:
    """Whether rows are the same; those that come twice have to come twice."""
    if len(got) != len(want):
        return False
    if not ordered:
        got, want = sorted(got, key=_place), sorted(want, key=_place)
    return all(
        len(ours) == len(theirs) and all(map(_is_same, ours, theirs))
        for ours, theirs in zip(got, want, strict=True)
    )


def _place(row: _Row) -> list[tuple[int, Any]]:
    """What rows are sorted by: numbers that differ in their last digits alone have one place."""
    return [_cell(cell) for cell in row]


def _cell(cell: Any) -> tuple[int, Any]:
    if cell is None:
        return 0, 0
    if isinstance(cell, int | float):
        return 1, float(f"{cell:.6g}")
    return (2, cell) if isinstance(cell, str) else (3, cell)


def _is_same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return ours == theirs or math.isclose(ours, theirs, rel_tol=_SAME, abs_tol=1e-12)
    return type(ours) is type(theirs) and bool(ours == theirs)
