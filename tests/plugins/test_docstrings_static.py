"""Dataset builder ``docstrings`` in mode static: sources are read and nothing in them runs."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
from mlxlora_docstrings import DocstringOptions, build


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a package from {file: source}; return path -> docstring, and source -> reason."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def read(files: dict[str, str], package: str = "pkg") -> tuple[dict[str, str], dict[str, str]]:
        for file, source in files.items():
            path = tmp_path / "pkg" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        made = build(DocstringOptions(packages=(package,), mode="static"))
        paths = {row.content["text"].split("\nA: ")[1].split(" ")[0]: row.group for row in made.rows}
        return paths, {skip.source: skip.reason for skip in made.skipped}

    return read


def test_nothing_of_a_hostile_package_runs(read: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    strike = f"open({str(canary)!r}, 'w').close()\n"
    paths, skipped = read(
        {
            "__init__.py": '"""Top."""\n' + strike + "import pkg.sub\n",
            "sub.py": strike + "def f(x=open('/nowhere')):\n    'F.'\nclass C(print('base')):\n    'C.'\n",
            "setup.py": strike + "'''Setup.'''\n",
            "__main__.py": strike,
            "conftest.py": strike,
        }
    )
    assert not canary.exists()
    assert paths == {"pkg": "Top.", "pkg.sub.f": "F.", "pkg.sub.C": "C."}
    assert skipped == {}


SHAPES = {
    "__init__.py": '''"""Top."""
from ._core import *
from .listed import *
from pkg.winding.deep import Class, renamed as other
from . import _alias as alias
import os, json
from json import loads
''',
    "_core.py": '''"""Hidden module."""
from .star import *
import pkg._alias as implementation
def public():
    """Public."""
class Base:
    """Base class."""
def _private():
    """Private."""
''',
    "star.py": '''from ._core import *
def starred():
    """Starred."""
''',
    "listed.py": '''from . import more
__all__ = ["_listed"] + more.__all__
__all__ += ["also"]
def _listed():
    """Listed, and private."""
def also():
    """Also."""
def unlisted():
    """Not listed."""
from .more import told
''',
    "more.py": '''__all__ = ["told"]
def told():
    """Told."""
''',
    "_alias.py": '''def inside():
    """Inside."""
''',
    "winding/__init__.py": "",
    "winding/deep.py": '''
from pkg._core import Base
class Class(Base):
    def method(self):
        """Method

            indented.
        Last.
        """
    @property
    def prop(self):
        """Property."""
    value = 1
    """An attribute, whose docstring nobody could ask for."""
    class Inner:
        """Inner."""
    def nothing(self):
        pass
def renamed():
    """Renamed."""
if True:
    def conditional():
        """Conditional."""
''',
    "tests/test_x.py": '"""Tests."""\n',
}


def test_rows_are_those_of_mode_import(read: Any) -> None:
    want = {
        "pkg": "Top.",
        "pkg.public": "Public.",
        "pkg.Base": "Base class.",
        "pkg.starred": "Starred.",
        "pkg.also": "Also.",
        "pkg.told": "Told.",
        "pkg.listed.unlisted": "Not listed.",
        "pkg.alias.inside": "Inside.",
        "pkg.Class.method": "Method\n\n    indented.\nLast.",
        "pkg.Class.prop": "Property.",
        "pkg.Class.Inner": "Inner.",
        "pkg.other": "Renamed.",
        "pkg.winding.deep.conditional": "Conditional.",
    }
    assert read(SHAPES) == (want, {})
    live = build(DocstringOptions(packages=("pkg",)))
    assert {row.content["text"].split("\nA: ")[1].split(" ")[0]: row.group for row in live.rows} == want


def test_a_package_may_be_named_by_a_path_inside_it(read: Any) -> None:
    paths, _ = read(SHAPES, "pkg.winding")
    assert paths["pkg.winding.deep.Class.prop"] == "Property."
    assert all(path.startswith("pkg.winding.") for path in paths)


def test_compiled_modules_are_read_from_their_stubs(read: Any) -> None:
    suffix = EXTENSION_SUFFIXES[0]
    paths, skipped = read(
        {
            "__init__.py": "from .fast import f\n",
            f"fast{suffix}": "",
            "fast.pyi": 'def f() -> int:\n    """Fast."""\n',
            "both.py": "def g():\n    'From the source.'\n",
            "both.pyi": "def g() -> None:\n    'From the stub.'\n",
            f"bare{suffix}": "",
        }
    )
    assert paths == {"pkg.f": "Fast.", "pkg.both.g": "From the source."}
    assert skipped == {
        "pkg.bare": "it is compiled and has no stub; mode=import reads it",
        "pkg.fast": "its docstring is compiled; mode=import reads it",
        "pkg.fast.*": "it is compiled, and its stub may not tell all that it has; mode=import reads it",
    }


def test_sources_that_cannot_be_read_are_told_and_the_others_go_on(read: Any) -> None:
    paths, skipped = read(
        {
            "__init__.py": '"""Top."""\n',
            "syntax.py": "def f(:\n",
            "deep.py": "x = " + "(" * 150_000 + ")" * 150_000 + "\n",
            "nested.py": "x = " + "-" * 30_000 + "1\n",
            "circle.py": "from .circle import *\nfrom .ring import a as b\ndef f():\n    'F.'\n",
            "ring.py": "from .circle import b as a\n",
        }
    )
    assert paths == {"pkg": "Top.", "pkg.circle.f": "F."}
    assert skipped["pkg.syntax"].startswith("SyntaxError: ")
    assert sorted(skipped) == ["pkg.deep", "pkg.nested", "pkg.ring.a", "pkg.syntax"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_package", "there is no module named 'no_such_package'"),
        ("_heapq", "it is compiled and has no stub"),
        ("sys", "it is compiled and has no stub"),
    ],
)
def test_a_package_without_sources_is_told(name: str, reason: str) -> None:
    made = build(DocstringOptions(packages=(name, "string"), mode="static"))
    assert made.rows
    assert [reason in skip.reason for skip in made.skipped if skip.source == name] == [True]


def test_the_installed_mlx() -> None:
    import inspect

    import mlx.core as mx
    import mlx.nn as nn

    made = build(DocstringOptions(packages=("mlx",), mode="static"))
    texts = {row.content["text"] for row in made.rows}
    assert f"Q: What is relu in mlx?\nA: mlx.nn.relu {inspect.getdoc(nn.relu)}" in texts
    assert f"Q: What is Linear in mlx?\nA: mlx.nn.Linear {inspect.getdoc(nn.Linear)}" in texts
    # Compiled: the stub has the text without the signature in front.
    stub = str(inspect.getdoc(mx.matmul)).partition("\n\n")[2]
    assert any(text.startswith("Q: What is matmul in mlx?\nA: mlx.core.matmul ") for text in texts), stub
    assert len({row.group for row in made.rows}) >= 500


DOCUMENTED = '''"""Top."""
import re
import textwrap
from ._told import merged, notes
from ._fast import _add_docstr as add_docstr, Array, one, two, three, four
from .writer import add_newdoc
def parse(text):
    """Arguments by their names."""
    split = re.compile(r"\\n\\s{4}(?!\\s)")
    parts = [part.strip() for part in split.split(text)]
    parts = [part for part in parts if len(part) > 0]
    return {part.split(" ")[0]: part for part in parts}
common = parse("""
    input (Array): what goes in,
        in two lines.
    out (Array): what comes out.
""")
add_docstr(one, r"""one(input) -> Array

{input}
{out}""".format(**common))
add_docstr(two, "Two, {size}, {out}.".format(**merged(common, {"size": "sized"}), **notes))
def add_method(name, given, text, *more):
    """Documents a method."""
    if "/" not in given:
        given = f"/, {given}" if given else "/"
    text = textwrap.dedent(text).strip() + "".join(more)
    add_newdoc("pkg._fast", "Array", (name, f"{name}($self, {given})\\n--\\n\\n{text}"))
add_method("all", "axis=None", """
    Whether all are.
      Indented.
    """, " More.", " And more.")
for name in ("any", "sum"):
    add_method(name, "", f"The {name} of it.")
common["out"] = common["out"].title()
add_docstr(three, "Three {out}".format(**common))
def told(text):
    if open("/etc/hostname").read() == "none":
        return text
    return "Never."
add_docstr(four, told("Four."))
'''


def test_docstrings_that_the_source_gives_to_what_is_compiled(read: Any) -> None:
    suffix = EXTENSION_SUFFIXES[0]
    stub = "def one(input): ...\ndef two(): ...\ndef three(): ...\ndef four(): ...\n"
    stub += "class Array:\n    def all(self): ...\n    def any(self): ...\n    def sum(self): ...\n"
    files = {
        "__init__.py": DOCUMENTED,
        f"_fast{suffix}": "",
        "_fast.pyi": stub,
        "_told.py": "# for add_docstr\nnotes = {'note': 'A note.'}\n"
        "def merged(*tables):\n    return {name: table[name] for table in tables for name in table}\n",
        "writer.py": "def add_newdoc(place, name, text): pass\n",
    }
    paths, skipped = read(files)
    assert paths == {
        "pkg": "Top.",
        "pkg.parse": "Arguments by their names.",
        "pkg.add_method": "Documents a method.",
        "pkg.one": "one(input) -> Array\n\ninput (Array): what goes in,\n        in two lines.\n"
        "out (Array): what comes out.",
        "pkg.two": "Two, sized, out (Array): what comes out..",
        "pkg.Array.all": "Whether all are.\nIndented. More. And more.",
        "pkg.Array.any": "The any of it.",
        "pkg.Array.sum": "The sum of it.",
    }
    together = "its docstring is put together when the package runs; mode=import reads it"
    assert skipped["pkg.three"] == skipped["pkg.four"] == together
