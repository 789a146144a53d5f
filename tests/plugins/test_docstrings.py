"""Dataset builder ``docstrings``: what the rows say, and which there are."""

from __future__ import annotations

import doctest
import hashlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
from mlxlora_docstrings import DocstringOptions, build, graph, inputs, normalise

from mlxlora_core.errors import DataError, UsageError
from mlxlora_core.options import parse
from mlxlora_core.values import Row, Rows, Skipped

ALL = ("mlx", "numpy", "torch")


@cache
def read(*packages: str) -> Rows:
    return build(DocstringOptions(packages=packages))


def path_of(row: Row) -> str:
    return str(row.content["text"]).split("\nA: ", 1)[1].split(" ", 1)[0]


def by_path(rows: Rows) -> dict[str, str]:
    return {path_of(row): row.group for row in rows.rows}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a package from {file: source} and build its rows."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, files: dict[str, str], **values: Any) -> Rows:
        for file, source in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return build(DocstringOptions(packages=(name,), **values))

    return make


# --- the installed packages ---------------------------------------------------


@pytest.mark.parametrize("name", ["ReLU", "relu", "Linear"])
def test_a_row_is_the_docstring_byte_for_byte(name: str) -> None:
    import mlx.nn

    doc = inspect.getdoc(getattr(mlx.nn, name))
    want = f"Q: What is {name} in mlx?\nA: mlx.nn.{name} {doc}"
    assert [row for row in read(*ALL).rows if row.content["text"] == want] == [Row({"text": want}, group=doc)]


def test_three_packages_in_one_call_give_what_they_have() -> None:
    docs: dict[str, set[str]] = {}
    for path, doc in by_path(read(*ALL)).items():
        docs.setdefault(path.partition(".")[0], set()).add(doc)
    assert len(docs["mlx"]) >= 519
    assert len(docs["numpy"]) >= 1500
    assert len(docs["torch"]) >= 7371
    assert dict(read(*ALL).versions).keys() == set(ALL)


def test_every_path_leads_to_its_docstring() -> None:
    for path, doc in by_path(read(*ALL)).items():
        if path.startswith(("mlx.", "numpy.linalg.", "numpy.ma.")):
            assert inspect.getdoc(resolve(path)) == doc, path


def resolve(path: str) -> Any:
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return reduce(getattr, parts[length:], module)
    raise AssertionError(path)


def test_paths_are_public_where_there_is_a_public_one_and_short() -> None:
    paths = by_path(read(*ALL))
    assert [path for path in paths if path.startswith("mlx.") and "._" in path] == []
    assert not [path for path in paths if path.rpartition(".")[2].startswith("_")]
    for short, long in (
        ("mlx.nn.ReLU", "mlx.nn.layers.activations.ReLU"),
        ("mlx.nn.Module.train", "mlx.nn.GRU.train"),
        ("numpy.linalg.det", "numpy.linalg.linalg.det"),
        ("torch.Tensor.argsort", "torch._C.TensorBase.argsort"),
        ("torch.nn.functional.relu", "torch.nn.modules.activation.F.relu"),
    ):
        assert short in paths
        assert long not in paths


def test_rows_are_sorted_and_each_path_stands_once() -> None:
    paths = [path_of(row) for row in read(*ALL).rows]
    assert paths == sorted(set(paths))


def test_what_changes_from_run_to_run_is_left_out() -> None:
    text = "\n".join(row.content["text"] for row in read(*ALL).rows)
    assert re.search(r"\bat 0x[0-9a-f]|0x7f[0-9a-f]{4}", text) is None
    assert "/tmp/mlxlora-" not in text
    reasons = Counter(skip.reason for skip in read(*ALL).skipped)
    assert reasons["its docstring holds what may be a memory address"] > 0


def test_what_was_left_out_of_torch_is_told() -> None:
    skipped = {skip.source: skip.reason for skip in read(*ALL).skipped}
    assert ("torch.utils.tensorboard" in skipped) == (importlib.util.find_spec("tensorboard") is None)
    assert len(set(skipped) - set(by_path(read(*ALL)))) == len(skipped)


_DIGEST = """
import hashlib, json, sys
from mlxlora_docstrings import DocstringOptions, build
made = build(DocstringOptions(packages=("mlx", "numpy")))
rows = [[dict(row.content), row.group] for row in made.rows]
print(hashlib.sha256(json.dumps([rows, [[s.source, s.reason] for s in made.skipped]]).encode()).hexdigest())
"""


def test_two_builds_in_different_processes_and_folders_are_the_same(tmp_path: Path) -> None:
    def digest(seed: str, folder: Path) -> str:
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.check_output(
            [sys.executable, "-c", _DIGEST], cwd=folder, env=environment, text=True
        ).strip()

    first, second = digest("1", tmp_path / "a"), digest("2", tmp_path / "b")
    assert first == second
    assert len(first) == hashlib.sha256().digest_size * 2


# --- one row an object --------------------------------------------------------

SHAPES = {
    "__init__.py": '''"""Top."""
from shapes._core import public, Base, B, Shared, Longest
from shapes.long.winding import Class, renamed as other
import os, json
''',
    "_core.py": '''"""Hidden module."""
def public():
    """Public."""
def lonely():
    """Lonely."""
def _private():
    """Private."""
class Base:
    """Base class."""
    def method(self):
        """Method of the base."""
class _Hidden:
    def inherited(self):
        """Inherited from a hidden base."""
class Shared(_Hidden):
    """Shared."""
class Longest:
    inherited = _Hidden.inherited
class B(Base):
    """Of a shorter name than its base."""
class Maker:
    """Maker."""
    def __call__(self):
        """Call."""
maker = Maker()
def tucked():
    """Its shortest path is private."""
def again():
    """Public."""
''',
    "long/__init__.py": "",
    "long/winding.py": '''
from shapes._core import Base, Maker, maker, tucked
import shapes._core as core
class Class(Base):
    def method(self):
        pass
    def own(self):
        """Own method."""
    @property
    def prop(self):
        """A property."""
    @staticmethod
    def static():
        """A static method."""
    @classmethod
    def klass(cls):
        """A class method."""
    class Inner:
        """An inner class."""
        def deep(self):
            """Deep."""
    def __dunder__(self):
        """Dunder."""
class Sub(Base):
    """A subclass."""
def renamed():
    """Renamed."""
same = renamed
def twin():
    """Renamed."""
lambda_ = lambda: 0
lambda_.__doc__ = "Lambda."
number = 3
''',
    "tests/__init__.py": '"""Tests."""\nraise SystemExit("tests must not be imported")\n',
    "__main__.py": 'raise SystemExit("a script must not be imported")\n',
}

WANT = {
    "shapes": "Top.",
    "shapes.public": "Public.",
    "shapes.Base": "Base class.",
    "shapes.Base.method": "Method of the base.",
    "shapes.B": "Of a shorter name than its base.",
    "shapes.Shared": "Shared.",
    "shapes.Shared.inherited": "Inherited from a hidden base.",
    "shapes.Class.own": "Own method.",
    "shapes.Class.prop": "A property.",
    "shapes.Class.static": "A static method.",
    "shapes.Class.klass": "A class method.",
    "shapes.Class.Inner": "An inner class.",
    "shapes.Class.Inner.deep": "Deep.",
    "shapes.long.winding.Sub": "A subclass.",
    "shapes.other": "Renamed.",
    "shapes.long.winding.twin": "Renamed.",
    "shapes.long.winding.lambda_": "Lambda.",
    "shapes.long.winding.Maker": "Maker.",
    "shapes.long.winding.tucked": "Its shortest path is private.",
    "shapes._core.lonely": "Lonely.",
}


def test_each_object_has_one_row_under_its_shortest_public_path(package: Any) -> None:
    made = package("shapes", SHAPES)
    assert by_path(made) == WANT
    told = "it has members that are those of another class, as inherited of shapes.Shared"
    assert list(made.skipped) == [Skipped("shapes.Longest.*", told)]


def test_one_docstring_is_one_group(package: Any) -> None:
    groups = Counter(row.group for row in package("shapes", SHAPES).rows)
    assert groups["Renamed."] == 2


def test_a_package_may_be_named_by_a_path_inside_it(package: Any) -> None:
    package("shapes", SHAPES)
    paths = by_path(build(DocstringOptions(packages=("shapes.long",))))
    assert paths["shapes.long.winding.Class.own"] == "Own method."
    assert all(path.startswith("shapes.long.") for path in paths)
    (row,) = (row for row in read("mlx.nn.losses").rows if path_of(row) == "mlx.nn.losses.mse_loss")
    assert row.content["text"].startswith("Q: What is mse_loss in mlx?\nA: mlx.nn.losses.mse_loss ")


@pytest.mark.parametrize("mode", ["import", "static"])
def test_a_function_hides_the_module_of_its_name(package: Any, mode: str) -> None:
    tool = '"""The module."""\ndef tool():\n    """The function."""\ndef other():\n    """Another."""\n'
    made = package("hides", {"__init__.py": "from hides.tool import tool", "tool.py": tool}, mode=mode)
    assert by_path(made) == {"hides.tool": "The function.", "hides.tool.other": "Another."}


@pytest.mark.parametrize("mode", ["import", "static"])
def test_tests_are_read_when_they_are_asked_for(package: Any, mode: str) -> None:
    package("checked", {"__init__.py": '"""Top."""', "tests/__init__.py": "", "tests/test_a.py": '"""A."""'})
    rows = build(DocstringOptions(packages=("checked.tests.test_a",), mode=mode))
    assert by_path(rows) == {"checked.tests.test_a": "A."}


def test_names_that_a_module_lists_are_its_own(package: Any) -> None:
    source = '''from collections import OrderedDict, Counter
__all__ = ["OrderedDict"]
def f():
    """F."""
'''
    paths = by_path(package("lists", {"__init__.py": source}))
    assert "lists.OrderedDict" in paths
    assert "lists.Counter" not in paths


def test_docstrings_come_as_getdoc_gives_them(package: Any) -> None:
    source = 'def f():\n    """First.\n\n        Indented é \\u2028 \\x1b\\x00.\n    Last.\n\n    """\n'
    assert by_path(package("dented", {"__init__.py": source})) == {
        "dented.f": "First.\n\n    Indented é \u2028 \x1b\x00.\nLast."
    }


# --- options ------------------------------------------------------------------


def test_long_docstrings_are_left_out_and_told(package: Any) -> None:
    source = "".join(f"def f{n}():\n    {'x' * n!r}\n" for n in (9, 10, 11))
    made = package("longish", {"__init__.py": source}, seq_limit=10)
    assert list(by_path(made)) == ["longish.f10", "longish.f9"]
    assert [(skip.source, skip.reason) for skip in made.skipped] == [
        ("longish.f11", "its docstring has 11 characters, the limit is 10")
    ]


def test_preprocessing_changes_the_docstring_and_not_the_question(package: Any) -> None:
    source = (
        "def ReLU():\n    'Applies the Rectified Linear Units, element-wise!'\ndef of():\n    'Of the.'\n"
    )
    made = package("prep", {"__init__.py": source}, preprocess=True)
    assert [dict(row.content) for row in made.rows] == [
        {"text": "Q: What is ReLU in prep?\nA: prep.ReLU apply rectify linear unit element wise"}
    ]
    assert made.rows[0].group == "apply rectify linear unit element wise"
    assert [skip.source for skip in made.skipped] == ["prep.of"]


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(normalise) == doctest.TestResults(failed=0, attempted=2)


@pytest.mark.parametrize(
    ("word", "lemma"),
    [
        ("bias", "bias"),
        ("loss", "loss"),
        ("layers", "layer"),
        ("queries", "query"),
        ("computed", "compute"),
        ("running", "run"),
        ("boxes", "box"),
        ("x_ed", "x_ed"),
        ("red", "red"),
    ],
)
def test_lemmas(word: str, lemma: str) -> None:
    assert normalise.lemma(word) == lemma


@pytest.mark.parametrize("workers", [None, 0, 1, 8])
def test_any_number_of_workers_gives_the_same(workers: int | None) -> None:
    packages = ("json", "mlx.nn.losses", "string")
    assert build(DocstringOptions(packages=packages, workers=workers)) == read(*packages)


def test_the_same_package_twice_is_read_once() -> None:
    assert build(DocstringOptions(packages=("json", "json"))) == read("json")
    assert dict(read("json").versions) == {"json": ".".join(map(str, sys.version_info[:3]))}


@pytest.mark.parametrize(
    "values",
    [
        {"packages": []},
        {"seq_limit": 0},
        {"workers": -1},
        {"mode": "guess"},
        {"time_limit": 0},
        {"package": "mlx"},
    ],
)
def test_options_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        parse(DocstringOptions, values, owner="builder 'docstrings'")


def test_packages_that_are_not_there_are_told() -> None:
    made = build(DocstringOptions(packages=("json", "no_such_package", "scikit-learn", "../json", "json.no")))
    assert {path.partition(".")[0] for path in by_path(made)} == {"json"}
    missing = ["../json", "json.no", "no_such_package", "scikit-learn"]
    assert [skip.source for skip in made.skipped][:4] == missing, "packages come before single docstrings"
    reasons = {skip.source: skip.reason for skip in made.skipped}
    assert reasons["no_such_package"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert "no name that import takes" in reasons["scikit-learn"]
    assert "no name that import takes" in reasons["../json"]
    assert reasons["json.no"].startswith("ModuleNotFoundError")


def test_without_any_row_the_reasons_are_the_error() -> None:
    with pytest.raises(DataError, match=r"no_such_package: ModuleNotFoundError.*x-y: it is no name"):
        build(DocstringOptions(packages=("no_such_package", "x-y")))


def test_inputs_are_versions_and_the_state_of_the_sources(package: Any, tmp_path: Path) -> None:
    (tmp_path / "loose.py").write_text('"""Loose."""\n')
    package("shapes", SHAPES)
    told = inputs(DocstringOptions(packages=("mlx", "shapes", "loose", "no_such_package")))
    version = re.escape(read("mlx.nn.losses").versions["mlx.nn.losses"])
    assert re.fullmatch(rf"{version} \d+ files [0-9a-f]{{16}}", told["mlx"])
    assert re.fullmatch(r"6 files [0-9a-f]{16}", told["shapes"])
    assert re.fullmatch(r"1 files [0-9a-f]{16}", told["loose"])
    assert told["no_such_package"] == "not installed"
    assert json.loads(json.dumps(dict(told))) == told
    (tmp_path / "loose.py").write_text('"""Looser."""\n')
    assert inputs(DocstringOptions(packages=("loose",)))["loose"] != told["loose"]


# --- the search ---------------------------------------------------------------


def test_of_two_things_with_one_path_the_child_has_it() -> None:
    tree: dict[str, list[graph.Child[str]]] = {
        "a": [graph.Child("x", False, "function")],
        "module": [graph.Child("y", False, "inside")],
    }
    found = graph.shortest_paths(
        [("a.x", "module"), ("a", "a")], lambda _, thing: tree.get(thing, []), lambda thing: thing
    )
    assert list(found) == [("a", "a"), ("a.x", "function"), ("a.x.y", "inside")]


def test_a_graph_without_an_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def children(path: str, thing: int) -> list[graph.Child[int]]:
        return [graph.Child(name, False, 2 * thing + i) for i, name in enumerate("ab")]

    monkeypatch.setattr(graph, "PARTS_LIMIT", 5)
    assert len(list(graph.shortest_paths([("r", 1)], children, int))) == 2**5 - 1
    monkeypatch.setattr(graph, "PATHS_LIMIT", 20)
    with pytest.raises(OverflowError, match="more than 20 names"):
        list(graph.shortest_paths([("r", 1)], children, int))
