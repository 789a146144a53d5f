"""The conformance suite over evaluator ``sqlite``, what counts as the same, and what no query can do."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import mlxlora_sql
import pytest
from mlxlora_sql import SqliteOptions, compare, databases
from mlxlora_sql.statements import first_statement, is_ordered

from mlxlora_core.api import DataError, UsageError
from mlxlora_core.testing.evaluator import EvaluatorSuite, answer

HERE = Path(__file__).parents[1]
SHOP = HERE / "shop.sql"
ROWS = [json.loads(line) for line in (HERE / "rows.jsonl").read_text().splitlines()]
NAMES = "SELECT name FROM customers WHERE city = 'Oslo'"
ALL = "SELECT id FROM products"


def scored(text: str, expected: str, **options: Any) -> float:
    """The score of a query for that of a row."""
    return compare.score(text, expected, SqliteOptions(**{"database": SHOP, **options}))


class TestSqlite(EvaluatorSuite):
    """Evaluator ``sqlite``."""

    spec = next(iter(mlxlora_sql.mlxlora_evaluators()))
    option_sets = ({"database": str(SHOP)}, {"database": str(SHOP), "seconds": 0.1, "most_rows": 1})
    bad_options: Sequence[Mapping[str, Any]] = (
        {},
        {"database": str(HERE / "absent.db")},
        {"database": str(HERE)},
        {"database": str(HERE / "rows.jsonl")},
        {"database": str(SHOP), "seconds": 0},
        {"database": str(SHOP), "most_rows": 0},
    )
    known = (
        (answer(f"{NAMES};", NAMES), {"database": str(SHOP)}, 1.0),
        (answer(f"```sql\n{NAMES}\n```\nThat is it.", NAMES), {"database": str(SHOP)}, 1.0),
        (answer("SELECT 'Ada'", NAMES), {"database": str(SHOP)}, 0.0),
        (answer("", NAMES), {"database": str(SHOP)}, 0.0),
        (answer("DROP TABLE customers", NAMES), {"database": str(SHOP)}, 0.0),
    )


# --- what is the same ---------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "score"),
    [
        ("SELECT id FROM products ORDER BY id DESC", ALL, 1),
        ("SELECT id FROM products ORDER BY id DESC", f"{ALL} ORDER BY id", 0),
        (f"{ALL} ORDER BY id", f"{ALL} ORDER BY id", 1),
        ("SELECT id AS number FROM products", ALL, 1),
        ("SELECT id, id FROM products", ALL, 0),
        ("SELECT name, id FROM products", "SELECT id, name FROM products", 0),
        (f"{ALL} UNION ALL {ALL}", ALL, 0),
        (f"{ALL} UNION ALL {ALL}", f"{ALL} UNION ALL {ALL}", 1),
        ("SELECT 1", "SELECT 1.0", 1),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", 1),
        ("SELECT 0.3001", "SELECT 0.3", 0),
        ("SELECT '1'", "SELECT 1", 0),
        ("SELECT NULL", "SELECT NULL", 1),
        ("SELECT NULL", "SELECT 0", 0),
        ("SELECT x'00'", "SELECT x'00'", 1),
        ("SELECT 1 WHERE 0", "SELECT name FROM customers WHERE 0", 1),
        ("SELECT 1 WHERE 0", "SELECT 1", 0),
    ],
)
def test_the_same_rows(text: str, expected: str, score: int) -> None:
    """Order counts where the row says one, columns by their place, numbers up to their last digits."""
    assert scored(text, expected) == score


def test_rows_with_numbers_that_are_nearly_the_same_are_matched() -> None:
    """Sorting by the first column alone would pair the wrong ones."""
    ours = [(0.1 + 0.2, "b"), (0.3, "a"), (None, "c"), ("x", b"y")]
    theirs = [(0.3, "b"), (0.1 + 0.2, "a"), ("x", b"y"), (None, "c")]
    assert compare.same_rows(ours, theirs, ordered=False)
    assert not compare.same_rows(ours, theirs, ordered=True)


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 1", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("SELECT a FROM t ORDER /* by */ BY a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'ORDER BY' FROM t", False),
        ('SELECT a AS "x ORDER BY y" FROM t -- ORDER BY a', False),
        ("SELECT [ORDER BY], `ORDER BY` FROM t", False),
        ("SELECT ')' FROM t ORDER BY a", True),
        ("SELECT border BY", False),
    ],
)
def test_whether_a_query_says_an_order(sql: str, ordered: bool) -> None:
    """Outside of brackets, texts, names and comments."""
    assert is_ordered(sql) is ordered


@pytest.mark.parametrize(
    ("text", "statement"),
    [
        (" SELECT 1 ; SELECT 2", "SELECT 1"),
        ("SELECT ';' -- ;\n, 2; x", "SELECT ';' -- ;\n, 2"),
        ("Here:\n```sql\nSELECT 1;\n```\nor\n```\nSELECT 2\n```", "SELECT 1"),
        ("```\nSELECT 1", "SELECT 1"),
        ("", ""),
    ],
)
def test_the_first_statement_of_an_answer(text: str, statement: str) -> None:
    """Of its first fenced block, where there is one."""
    assert first_statement(text) == statement


def test_all_rows_of_the_example_score_1_against_themselves_and_0_against_others() -> None:
    """And a wrong row is an error that names it."""
    queries = [row["completion"] for row in ROWS]
    assert [scored(query, query) for query in queries] == [1.0] * len(ROWS)
    with pytest.raises(
        DataError, match=r"shop.sql: the query of a row cannot be run: no such table: nowhere"
    ):
        scored("SELECT 1", "SELECT * FROM nowhere")


def test_against_sqlite_by_hand() -> None:
    """Rows as a connection without any bounds gives them."""
    with closing(sqlite3.connect(":memory:")) as plain:
        plain.executescript(SHOP.read_text())
        for row in ROWS:
            want = plain.execute(row["completion"]).fetchall()
            assert databases.rows_of(SHOP, first_statement(row["completion"]), 1.0, 100) == want


# --- what no query can do -----------------------------------------------------

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
HARM = {
    "writes": "INSERT INTO customers VALUES (9, 'X', 'Y')",
    "returns what it writes": "INSERT INTO customers VALUES (9, 'X', 'Y') RETURNING id",
    "drops": "DROP TABLE customers",
    "deletes": "DELETE FROM orders",
    "attaches": "ATTACH '{folder}/other.db' AS other",
    "copies": "VACUUM INTO '{folder}/other.db'",
    "writes again": "PRAGMA query_only = OFF",
    "changes the file": "PRAGMA journal_mode = DELETE",
    "makes a table": "CREATE TEMP TABLE x AS SELECT 1",
    "begins": "BEGIN EXCLUSIVE",
    "loads": "SELECT load_extension('/lib/x.so')",
    "draws": "SELECT RANDOM()",
    "draws bytes": "SELECT hex(randomblob(4))",
    "never ends": f"{ENDLESS} SELECT count(*) FROM n",
    "gives rows without end": f"{ENDLESS} SELECT i FROM n",
    "joins without end": "SELECT count(*) FROM " + ", ".join(f"orders o{number}" for number in range(12)),
    "makes long texts": f"{ENDLESS} SELECT printf('%.*c', 900000, 'x') FROM n",
    "says nothing": "-- nothing",
    "is no SQL": "the answer is 3",
    "has a zero byte": "SELECT 1 \x00",
    "is half a letter": "SELECT '\ud83d'",
    "is too deep": "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "is too long": f"SELECT '{'x' * 200_000}'",
}


@pytest.fixture(params=["script", "file"])
def shop(request: Any, tmp_path: Path) -> Path:
    """The shop as SQL, and as an SQLite file."""
    if request.param == "script":
        return SHOP
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SHOP.read_text())
    return path


@pytest.mark.parametrize("sql", HARM.values(), ids=HARM)
def test_a_query_only_reads_and_ends(shop: Path, tmp_path: Path, sql: str) -> None:
    """It is refused; the database and its folder are as before, and the next query is answered."""
    before = {path: path.read_bytes() for path in shop.parent.glob("shop*")}
    query, folder = sql.replace("{folder}", str(tmp_path)), sorted(tmp_path.iterdir())
    with pytest.raises(databases.QueryError):
        databases.rows_of(shop, query, 0.2, 10_000)
    assert {path: path.read_bytes() for path in shop.parent.glob("shop*")} == before
    assert sorted(tmp_path.iterdir()) == folder
    assert scored(ALL, ALL, database=shop) == 1


def worker() -> subprocess.Popen[str]:
    """The process that answers now."""
    assert scored(ALL, ALL) == 1
    process = databases._WORKER._process
    assert process is not None
    return process


def test_a_query_that_sqlite_cannot_stop() -> None:
    """3.40 takes 15 s until it finds that text too long, and looks at no clock meanwhile."""
    process = worker()
    with pytest.raises(databases.QueryError, match="interrupted"):
        databases.rows_of(SHOP, HARM["never ends"], 0.1, 1)
    assert worker() is process, "SQLite has ended the query itself"
    assert scored("SELECT printf('%.*c', 1000000000, 'x')", ALL, seconds=0.1) == 0
    assert process.returncode in (-signal.SIGXCPU, -signal.SIGKILL), "the system has ended it"
    assert scored(ALL, ALL) == 1


def test_a_worker_that_is_gone_is_started_again() -> None:
    """Whoever has ended it."""
    process = worker()
    process.kill()
    process.wait()
    assert scored(ALL, ALL) == 1


def test_the_worker_ends_with_its_caller(tmp_path: Path) -> None:
    """However that ends."""
    program = (
        "import os, signal; from pathlib import Path; from mlxlora_sql import databases as d;"
        f"d.rows_of(Path({str(SHOP)!r}), 'SELECT 1', 1, 1);"
        "print(d._WORKER._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for _ in range(500):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail("it still runs")


def test_a_database_that_changes_is_read_again(tmp_path: Path) -> None:
    """The SQL that makes it is kept only while the file is the same."""
    path = tmp_path / "made.sql"
    path.write_text("CREATE TABLE t (a); INSERT INTO t VALUES (1);")
    assert databases.rows_of(path, "SELECT a FROM t", 1, 9) == [(1,)]
    path.write_text("CREATE TABLE t (a); INSERT INTO t VALUES (1), (2);")
    assert databases.rows_of(path, "SELECT a FROM t", 1, 9) == [(1,), (2,)]


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    """With the reason, before any work."""
    for name, content, reason in (
        ("a.db", b"SQLite format 3\x00" + bytes(200), "file is not a database"),
        ("b.sql", b"CREATE TABLE", "incomplete input"),
        ("c.sql", b"\xff", "invalid start byte"),
        ("d.sql", f"ATTACH '{tmp_path}/e.db' AS e; CREATE TABLE e.t (a);".encode(), "too many attached"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=rf"{name}: is no database for evaluator sqlite: .*{reason}"):
            databases.check(tmp_path / name)
    assert not (tmp_path / "e.db").exists()
