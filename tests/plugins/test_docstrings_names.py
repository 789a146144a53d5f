"""Dataset builder ``docstrings``: both modes find the same public names, held against counts of their own.

The suite reads two of five large packages; ``MLXLORA_TEST_ALL=1`` reads all.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from mlxlora_docstrings import DocstringOptions, build

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
MODES = ("import", "static")

Found = tuple[dict[str, str], dict[str, str]]
Read = Callable[..., Found]


def found(package: str, mode: str, **values: Any) -> Found:
    """Path -> docstring, and source -> reason."""
    made = build(
        DocstringOptions(packages=(package,), mode=mode, seq_limit=10**6, time_limit=500.0, **values)
    )
    rows = {row.content["text"].split("\nA: ")[1].split(" ")[0]: row.group for row in made.rows}
    return rows, {skip.source: skip.reason for skip in made.skipped}


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Write files below a folder that is imported from; read a package in a mode."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def read(mode: str, package: str, **files: str) -> Found:
        for name, source in files.items():
            path = tmp_path / name.replace("__in__", "__init__").replace("_S_", "/").replace("_DOT_", ".")
            path = path if path.suffix else path.with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return found(package, mode)

    return read


# --- where modules lie --------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_namespace_is_read_through_the_namespaces_in_it(read: Read, mode: str) -> None:
    doc = '"""Doc of {}."""\n'
    files = {f"spaced_S_{at}": doc.format(at) for at in ("a", "sub_S_b", "deep_S_er_S_m", "pack_S_c")}
    files |= {"spaced_S_pack_S___in__": "", "spaced_S_pack_S_scripts_S_s": "raise SystemExit\n"}
    files |= {"spaced_S_data_S_notes_DOT_txt": "no module", "spaced_S__own_S_p": doc.format("private")}
    rows, skipped = read(mode, "spaced", **files)
    assert sorted(rows) == ["spaced.a", "spaced.deep.er.m", "spaced.pack.c", "spaced.sub.b"]
    assert skipped == {}


def test_the_source_of_what_is_frozen_into_python_is_found() -> None:
    rows, _ = found("posixpath", "static")
    assert rows["posixpath.dirname"] == inspect.getdoc(os.path.dirname)


# --- members of classes -------------------------------------------------------

MEMBERS = '''"""Members."""
import abc, enum, functools
from functools import cached_property, partialmethod, singledispatchmethod

class lazy:
    """A descriptor of the package."""
    def __init__(self, function):
        functools.update_wrapper(self, function)
    def __get__(self, owner, kind=None):
        raise RuntimeError

class Box:
    """A box."""
    @property
    def width(self):
        """Width."""
    @width.setter
    def width(self, value):
        """Another text, which nobody sees."""
    @cached_property
    def volume(self):
        """Volume."""
    @functools.cached_property
    def area(self):
        """Area."""
    @singledispatchmethod
    def put(self, thing):
        """Put."""
    @put.register
    def _(self, thing: int):
        """Put a number."""
    @classmethod
    def make(cls):
        """Make."""
    @staticmethod
    def measure():
        """Measure."""
    @classmethod
    @singledispatchmethod
    def load(cls, thing):
        """Load."""
    @abc.abstractmethod
    def abstract(self):
        """Abstract."""
    @property
    @abc.abstractmethod
    def size(self):
        """Size."""
    @functools.lru_cache
    def cached(self):
        """Cached."""
    @lazy
    def late(self):
        """Late."""
    @functools.wraps(print)
    def printed(self):
        """Its text is that of print."""
    async def wait(self):
        """Wait."""
    def _height(self):
        """Height."""
    height = property(_height)
    depth = property(_height, doc="Depth.")
    tall = property(fget=_height)
    moved = partialmethod(put, 1)
    again = make
    def get_name(self):
        """Name."""
    get_name.__doc__ = "Changed " + "name."
    number = 3
    class Lid:
        """A lid."""
        @cached_property
        def colour(self):
            """Colour."""

class Small(Box):
    """A small box."""
    @cached_property
    def volume(self):
        """Less."""
'''
BOX = {
    "width": "Width.", "volume": "Volume.", "area": "Area.", "put": "Put.", "make": "Make.",
    "measure": "Measure.", "load": "Load.", "abstract": "Abstract.", "size": "Size.", "cached": "Cached.",
    "late": "Late.", "wait": "Wait.", "height": "Height.", "depth": "Depth.", "tall": "Height.",
    "get_name": "Changed name.", "Lid": "A lid.", "Lid.colour": "Colour.",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_member_has_a_row(read: Read, mode: str) -> None:
    rows, _ = read(mode, "boxes", boxes=MEMBERS)
    named = {
        path.removeprefix("boxes.Box."): doc for path, doc in rows.items() if path.startswith("boxes.Box.")
    }
    assert {name: doc for name, doc in named.items() if name != "printed"} == BOX
    assert rows["boxes.Small.volume"] == "Less."
    assert rows["boxes.Box"] == "A box." and rows["boxes.lazy"] == "A descriptor of the package."


# --- names that come when they are asked for -----------------------------------

FUNCTIONS = '"""Hidden."""\n' + "".join(
    f"def {name}():\n    '{name}.'\n" for name in ("one", "two", "_three")
)
ASK = "import importlib\n{table}\ndef __getattr__(name):\n{body}    raise AttributeError(name)\n"
GET = "getattr(importlib.import_module({module}, __name__), {name})\n"
FROM = "            return " + GET.format(module="'.' + module", name="name")
TOLD = """    if name in _where:
        module, _, thing = _where[name].partition(':')
        return getattr(importlib.import_module(__name__ + '.' + module), thing)
"""
CHAIN = """    if name == 'one':
        from ._impl import one
        return one
    if name in ('two',):
        from . import _impl
        return _impl.two
"""
LAZY = {
    "chain": ASK.format(table="", body=CHAIN),
    "table": ASK.format(
        table="_where = {'one': '._impl', 'two': '._impl'}",
        body="    if name in _where:\n        return " + GET.format(module="_where[name]", name="name"),
    ),
    "listed": ASK.format(
        table="__all__ = ['one', 'two']",
        body="    if name in __all__:\n        return " + GET.format(module="'._impl'", name="name"),
    ),
    "modules": ASK.format(
        table="_names = {'_impl': ['one', 'two']}",
        body="    for module, names in _names.items():\n        if name in names:\n" + FROM,
    ),
    "told": ASK.format(
        table="_where = {'one': '_impl:one', 'two': '_impl:two'}\ndef __dir__():\n    return list(_where)",
        body=TOLD,
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", LAZY)
def test_names_of_a_modules_getattr_have_their_public_path(read: Read, way: str, mode: str) -> None:
    name = f"{way}_lazy"
    files = {f"{name}_S___in__": '"""Top."""\n' + LAZY[way], f"{name}_S__impl": FUNCTIONS}
    rows, skipped = read(mode, name, **files)
    assert rows == {name: "Top.", f"{name}.one": "one.", f"{name}.two": "two."}
    assert skipped == {}


ATTACHED = '''"""Top."""
import lazy_loader as _lazy
__getattr__, __dir__, __all__ = _lazy.attach(
    __name__, submodules=["part"], submod_attrs={"_impl": ["one", "two"]}
)
'''
STUBBED = '''"""Top."""
import lazy_loader as _lazy
__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
'''


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", [ATTACHED, STUBBED])
def test_names_of_lazy_loader_have_their_public_path(read: Read, source: str, mode: str) -> None:
    pytest.importorskip("lazy_loader")
    files = {
        "attached_S___in__": source,
        "attached_S___in___DOT_pyi": "from . import part\nfrom ._impl import one, two\n",
        "attached_S__impl": FUNCTIONS,
        "attached_S_part": '"""Part."""\n',
    }
    files = {name.replace("__in___DOT_pyi", "__init___DOT_pyi"): text for name, text in files.items()}
    rows, skipped = read(mode, "attached", **files)
    want = {"attached": "Top.", "attached.one": "one.", "attached.two": "two.", "attached.part": "Part."}
    assert (rows, skipped) == (want, {})


@pytest.mark.parametrize("mode", MODES)
def test_a_name_from_another_package_has_a_row_or_is_listed(read: Read, mode: str) -> None:
    far = 'import importlib\n__all__ = ["far"]\ndef __getattr__(name):\n    if name == "far":\n'
    far += '        return importlib.import_module("far_impl").far\n    raise AttributeError(name)\n'
    rows, skipped = read(
        mode, "lazy_far", lazy_far_S___in__='"""Top."""\n' + far, far_impl="def far():\n    'Far.'\n"
    )
    assert "lazy_far.far" in (rows if mode == "import" else skipped)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_module_declares_and_cannot_give_is_listed(read: Read, mode: str) -> None:
    source = '__all__ = ["good", "bare", "number", "absent"]\ndef good():\n    "Good."\ndef bare(): pass\n'
    source += 'number = 3\ndef __getattr__(name):\n    raise AttributeError("no " + name)\n'
    rows, skipped = read(mode, "declares", declares=source)
    assert rows == {"declares.good": "Good."}
    assert sorted(skipped) == ["declares.absent", "declares.bare", "declares.number"]
    assert skipped["declares.bare"] == "it has no docstring of its own"


CHANGES = {
    "__in__": '"""Top."""\nfrom ._core import *\nfrom ._core import _late as late\nimport sys\n'
    "if sys.platform == 'an island':\n    def other():\n        'Other.'\n"
    "try:\n    import no_such_module\nexcept ImportError:\n    def instead():\n        'Instead.'\n"
    "else:\n    def never():\n        'Never.'\n"
    "from .part import part\ndel helper\n",
    "_core": '"""Hidden."""\ndef helper():\n    "Helper."\ndef made():\n    "Made."\n'
    "def _late():\n    'Late.'\nmade.__doc__ = 'Made {}.'.format('anew')\n"
    "alias = made\nclass Base:\n    'Base.'\n    def method(self):\n        'Method.'\n",
    "part": '"""The module."""\nfrom .__in__ import x\n'.replace("from .__in__ import x\n", "")
    + "def part():\n    'The function.'\nfrom ._core import Base\nclass Child(Base):\n    'Child.'\n"
    "    method = Base.method\n    def __init__(self): 'Init.'\n",
}


def test_statements_bind_what_they_bind_when_they_run(read: Read) -> None:
    files = {f"changes_S_{name}": source for name, source in CHANGES.items()}
    live, static = (read(mode, "changes", **files) for mode in MODES)
    assert static == live
    assert live[0] == {
        "changes": "Top.",
        "changes.made": "Made anew.",
        "changes.late": "Late.",
        "changes.instead": "Instead.",
        "changes.part": "The function.",
        "changes.Base": "Base.",
        "changes.Base.method": "Method.",
        "changes.part.Child": "Child.",
        "changes._core.helper": "Helper.",
    }


MAKES = {
    "__in__": '''"""Top."""
import functools
from . import _impl, changed
from ._impl import decorate, kept, Part
for name in ("one", "two"):
    globals()[name] = getattr(_impl, name)
del name
HAS_ISLAND = True
try:
    import no_such_module
except ImportError:
    HAS_ISLAND = False
if HAS_ISLAND:
    def ashore():
        """Ashore."""
else:
    def afloat():
        """Afloat."""
_impl.kept = decorate(_impl.kept)
setattr(Part, "late", _impl.helper)
class Silent:
    """Nobody reads this."""
    @property
    def __doc__(self):
        """Another text."""
    def loud(self):
        """Loud."""
''',
    "_impl": FUNCTIONS
    + '''
import functools
def decorate(function):
    return functools.wraps(function)(lambda: function())
def kept():
    """Kept."""
def helper():
    """Helper."""
class Part:
    """Part."""
    def first(self):
        """First."""
    second = first
class Copy:
    """Copy."""
    first = Part.first
''',
    "changed": "from ._impl import kept, Copy\n",
}


def test_names_that_statements_make_are_found(read: Read) -> None:
    files = {f"makes_S_{name}": source for name, source in MAKES.items()}
    live, static = (read(mode, "makes", **files) for mode in MODES)
    assert static == live
    assert live[0] == {
        "makes": "Top.",
        "makes.one": "one.",
        "makes.two": "two.",
        "makes.afloat": "Afloat.",
        "makes.kept": "Kept.",
        "makes.Part": "Part.",
        "makes.Part.first": "First.",
        "makes.Part.late": "Helper.",
        "makes.Silent.loud": "Loud.",
        "makes.changed.Copy": "Copy.",
    }
    assert live[1] == {
        "makes.Part.second": "it is another name of makes.Part.first",
        "makes.changed.Copy.*": "it has members that are those of another class, as first of makes.Part",
    }


TOLD = '''"""Top."""
import dataclasses, functools
from ._impl import *
def _cached(cls):
    return dataclasses.dataclass(cls)
@_cached
class Pair:
    left: int
class Adder:
    def __init__(self, function):
        self.__doc__ = "Adds " + function.__name__ + "."
    def __call__(self):
        return 0
wrap = functools.partial(Adder)
@wrap
def made():
    return 1
def _base():
    class Base:
        def inside(self):
            """Inside."""
    return Base
class Part:
    """Part."""
for _name, _value in vars(_base()).items():
    if _name == "inside":
        setattr(Part, _name, _value)
for _name in [name.lower() for name in ("Left",)]:
    globals()[_name] = Adder(_base)
for left_over in filter(None, [Adder(_base)]):
    pass
'''


def test_what_only_running_tells_is_listed(read: Read) -> None:
    impl = FUNCTIONS + "globals()['thr' + 'ee'.strip()] = one\nfor _n in filter(None, ['four']):\n"
    impl += "    globals()[_n] = lambda: 0\n    globals()[_n].__doc__ = 'Four.'\n"
    files = {"told_S___in__": TOLD, "told_S__impl": impl}
    live, static = (read(mode, "told", **files) for mode in MODES)
    only = {"Pair", "made", "Part.inside", "left", "left_over", "four"}
    assert live[0].keys() - static[0].keys() == {f"told.{name}" for name in only}
    assert (untold(live[0], static), untold(static[0], live)) == ([], [])
    assert {"told.*", "told.Part.inside", "told.Pair", "told.made", "told.left_over"} <= static[1].keys()


# --- the yardsticks -----------------------------------------------------------

YARDSTICKS = ["mlx", "networkx", *(["skimage", "numpy", "torch"] if ALL else [])]


@functools.cache
def both(package: str) -> tuple[Found, Found]:
    return found(package, "import"), found(package, "static")


def is_public(path: str) -> bool:
    return not any(part.startswith("_") for part in path.split("."))


def heads(path: str) -> list[str]:
    """``a``, ``a.b``, ``a.b.c`` of ``a.b.c``."""
    parts = path.split(".")
    return [".".join(parts[: length + 1]) for length in range(len(parts))]


def untold(paths: Iterable[str], other: Found) -> list[str]:
    """The public paths that another mode has no row for and does not list.

    It lists a path, a module or class of which it knows nothing, or whatever it
    does not know of one (``a.b.*``). What is listed of a package excuses nothing
    in its modules.
    """
    rows, skipped = other
    known = {head for path in (*rows, *skipped) if not path.endswith(".*") for head in heads(path)}
    looked_into = {path.rpartition(".")[0] for path in known}
    left = []
    for path in filter(is_public, paths):
        above = heads(path)
        told = path in rows or path in skipped
        for head, child in pairwise(above):
            told |= f"{head}.*" in skipped and child not in known
            told |= head in skipped and head not in looked_into
        if not told:
            left.append(path)
    return sorted(left)


@pytest.mark.parametrize("package", YARDSTICKS)
def test_both_modes_find_the_same_public_names_or_list_them(package: str) -> None:
    pytest.importorskip(package)
    live, static = both(package)
    assert (untold(live[0], static), untold(static[0], live)) == ([], [])


def test_the_comparison_finds_what_is_missing() -> None:
    other = ({"a.b.c": "C."}, {"a.*": "More.", "a.b.d": "D.", "a.e": "Not read."})
    assert untold(["a.b.c", "a.b.d", "a.x", "a.x.y", "a.e.f", "a._b.c"], other) == []
    assert untold(["a", "a.b", "a.b.x", "a.b.c.y"], other) == ["a", "a.b", "a.b.c.y", "a.b.x"]


#: walks a package in its own way and prints the docstrings of the properties of its public classes,
#: each with the paths under which it stands
COUNT = """
import functools, importlib, inspect, json, os, pkgutil, sys, types, warnings
warnings.simplefilter("ignore")
answer = os.dup(1)
os.dup2(2, 1)
package = importlib.import_module(sys.argv[1])
kinds = (property, functools.cached_property, types.GetSetDescriptorType)
for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda name: None):
    parts = info.name.split(".")[1:]
    if not any(p.startswith("_") or "test" in p or p == "conftest" for p in parts):
        try:
            importlib.import_module(info.name)
        except BaseException:
            pass
docs = {}
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] != package.__name__ or "test" in name or "._" in name:
        continue
    for attribute, cls in sorted(vars(module).items()):
        if inspect.isclass(cls) and not attribute.startswith("_"):
            if str(cls.__module__).split(".")[0] != package.__name__:
                continue
            for member, value in vars(cls).items():
                if not member.startswith("_") and isinstance(value, kinds):
                    doc = inspect.getdoc(value) if value.__doc__ else None  # its own, and no base class's
                    if doc and doc != inspect.getdoc(type(value)):
                        docs.setdefault(doc, []).append(f"{name}.{attribute}.{member}")
with open(answer, "w") as file:
    json.dump(docs, file)
os._exit(0)
"""

#: docstrings of properties, at least
PROPERTIES = {"mlx": 20, "networkx": 20, "skimage": 4, "numpy": 80, "torch": 110}


@pytest.mark.parametrize("package", YARDSTICKS)
def test_no_docstring_of_a_property_is_missing(package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-c", COUNT, package], stdout=subprocess.PIPE, cwd=tmp_path, check=True
    )
    want: dict[str, list[str]] = json.loads(done.stdout)
    assert len(want) >= PROPERTIES[package]
    for path, doc in both(package)[0][0].items():
        if doc in want:
            want[doc].append(path)  # a name that comes when somebody asks
    for made in both(package):
        docs = set(made[0].values())
        missing = {doc: paths for doc, paths in want.items() if doc not in docs}
        listed = {doc for doc, paths in missing.items() if len(untold(paths, made)) < len(paths)}
        assert {doc: paths for doc, paths in missing.items() if doc not in listed} == {}


@pytest.mark.skipif(not ALL, reason="takes long: MLXLORA_TEST_ALL=1")
def test_skimages_functions_have_the_path_that_its_users_write() -> None:
    pytest.importorskip("skimage")
    (live, _), (static, not_seen) = both("skimage")
    count = 0
    for submodule in ("filters", "color", "measure", "morphology", "transform", "draw"):
        module = importlib.import_module(f"skimage.{submodule}")
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing) and inspect.getdoc(thing):
                paths = [path for path, doc in live.items() if doc == inspect.getdoc(thing)]
                assert any(map(is_public, paths)), (submodule, name)
                assert not untold(paths[:1], (static, not_seen)), paths
                count += 1
    assert count > 200
