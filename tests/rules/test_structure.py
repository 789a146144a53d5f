"""How the code is built: no circles of imports, short functions and modules, public things documented."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "mlxlora_core"
FILES = sorted([*CORE.rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])

FUNCTION_LINES, MODULE_LINES, MOST_FUNCTION_LINES = 60, 400, 22
FILES_AT_THE_DOOR = 14

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    """``mlxlora_core.files.lock`` or ``mlxlora_torch``: a plugin lies on the shelf at the top level."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "plugins" else parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported, and what its types need: functions are left out."""
    for statement in body:
        yield statement
        if not isinstance(statement, Function):
            for name in ("body", "orelse", "finalbody"):
                yield from statements(getattr(statement, name, []))
            for handler in getattr(statement, "handlers", []):
                yield from statements(handler.body)


def is_for_types(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING")


def imported(path: Path, *, types: bool) -> set[str]:
    """The modules of ours that a module imports at its top, with those for the type checker or without."""
    found = set()
    body = ast.parse(path.read_text("utf-8"), path).body
    body = body if types else [statement for statement in body if not is_for_types(statement)]
    for statement in statements(body):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            home = str(statement.module)
            # from mlxlora_core.files import lock: lock is meant, which brings the package's __init__ with it
            inner = {f"{home}.{alias.name}" for alias in statement.names}
            found |= (
                (inner & MODULES.keys()) if inner <= MODULES.keys() else {home} | (inner & MODULES.keys())
            )
    return found & MODULES.keys()


@pytest.mark.parametrize("types", [False, True], ids=["as it runs", "with imports for types"])
def test_no_modules_import_each_other(types: bool) -> None:
    graph = {name: imported(path, types=types) - {name} for name, path in MODULES.items()}
    if types:  # the door names for the type checker what it gives out once it is asked for
        graph["mlxlora_core"] = imported(MODULES["mlxlora_core"], types=False)
    assert sum(map(len, graph.values())) > 200, "or nothing was read"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as fault:
        pytest.fail(" <- ".join(fault.args[1]))


# --- sizes --------------------------------------------------------------------


@cache
def functions() -> list[tuple[str, int]]:
    """(place, lines with the docstring and without decorators) of each function."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8"), path))
        if isinstance(node, Function)
    ]


def test_functions_are_short() -> None:
    assert [f"{place}: {n}" for place, n in functions() if n > FUNCTION_LINES] == []


def test_nine_functions_in_ten_are_seen_at_a_glance() -> None:
    lengths = sorted(lines for _, lines in functions())
    assert len(lengths) > 500, "or nothing was read"
    assert lengths[len(lengths) * 9 // 10] <= MOST_FUNCTION_LINES


def test_modules_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert [f"{path}: {n}" for path, n in lengths.items() if n > MODULE_LINES] == []


def test_the_door_of_core_has_few_files() -> None:
    found = sorted(path.name for path in CORE.iterdir() if path.is_file())
    assert len(found) <= FILES_AT_THE_DOOR, found


def test_no_two_modules_of_the_tests_have_one_name() -> None:
    """Nor one that a folder of programs has: pytest imports them all by their names, from one process."""
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    programs = [path for name in ("benchmarks", "tools") for path in (ROOT / name).iterdir()]
    names = [path.stem for path in (*files, *programs)]
    assert [name for name, count in Counter(names).items() if count > 1 and name != "__pycache__"] == []


# --- docstrings ---------------------------------------------------------------


def undocumented(node: ast.AST, place: str) -> Iterator[str]:
    """Public modules, classes and functions without a docstring; what is in a function is its own affair."""
    if isinstance(node, ast.Module | ast.ClassDef | Function) and not ast.get_docstring(node):
        yield place
    if isinstance(node, ast.Module | ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | Function) and not inner.name.startswith("_"):
                yield from undocumented(inner, f"{place} {inner.name}")


def test_everything_public_has_a_docstring() -> None:
    trees = [(ast.parse(path.read_text("utf-8"), path), str(path.relative_to(ROOT))) for path in FILES]
    assert [place for tree, name in trees for place in undocumented(tree, name)] == []


# --- output -------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((CORE / "cli").glob("*.py")), ids=lambda path: path.name)
def test_results_and_messages_go_through_one_place(path: Path) -> None:
    """``show.result`` and ``show.progress``: what ``click.echo`` prints within a verb is no result."""
    calls = [
        ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)
    ]
    assert not {"click.echo", "click.secho", "print", "sys.stdout.write"} & set(calls)
