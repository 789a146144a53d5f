"""Dataset builder ``docstrings``: packages that break, exit, hang, crash and lie."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlxlora_docstrings import DocstringOptions, build
from mlxlora_docstrings.attempt import STUCK, search_path
from mlxlora_docstrings.packages import RESTARTS

GOOD = '"""A good module."""\ndef f():\n    """F."""\n'

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module: its path below a folder that is imported from, and its source."""
    folder = tmp_path / "importable"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(path: str, source: str) -> Path:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        return file

    return write


def read(*packages: str, **values: Any) -> tuple[list[str], dict[str, str]]:
    """Paths of the rows, and source -> reason of what was left out."""
    made = build(DocstringOptions(packages=packages, **values))
    paths = [str(row.content["text"]).split("\nA: ")[1].split(" ")[0] for row in made.rows]
    return paths, {skip.source: skip.reason for skip in made.skipped}


# --- what a package does at import --------------------------------------------

ENDS = {
    "raise RuntimeError('out of\\n order')": "RuntimeError: out of order",
    "import no_such_dependency": "ModuleNotFoundError: No module named 'no_such_dependency'",
    "def f(:": "SyntaxError: invalid syntax (bad_package.py, line 1)",
    "import sys; sys.exit(3)": "it called sys.exit",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "raise GeneratorExit('odd')": "GeneratorExit: odd",
    "import os; os._exit(0)": "ended the process with exit status 0",
    "import os; os._exit(7)": "ended the process with exit status 7",
    "import ctypes; ctypes.string_at(0)": "died with SIGSEGV",
    "import os; os.abort()": "died with SIGABRT",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "died with SIGKILL",
    "import sys; sys.modules[__name__] = 3": "TypeError: it is no module but of type int",
    "x = input()": "EOFError: EOF when reading a line",
}


def test_a_package_that_ends_at_import_is_told_and_the_others_go_on(write: Write) -> None:
    names = {f"bad_{i}": (source, reason) for i, (source, reason) in enumerate(ENDS.items())}
    for name, (source, _) in names.items():
        write(f"{name}.py", source)
    write("good.py", GOOD)
    paths, skipped = read(*names, "good")
    assert paths == ["good", "good.f"]
    assert skipped == {name: reason.replace("bad_package", name) for name, (_, reason) in names.items()}


def is_alive(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


def test_what_a_package_sets_up_for_its_exit_does_not_run(write: Write, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    write("leaves.py", f"import atexit\natexit.register(open, {str(canary)!r}, 'w')\n" + GOOD)
    assert read("leaves") == (["leaves.f"], {})
    assert not canary.exists()


def test_what_a_package_prints_goes_nowhere(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    write(
        "loud.py",
        "import os, sys\nprint('out')\nprint('err', file=sys.stderr)\n"
        "os.write(1, b'raw')\nos.write(2, b'raw')\nimport warnings, logging\n"
        "warnings.warn('w')\nlogging.warning('l')\nimport atexit\natexit.register(print, 'bye')\n" + GOOD,
    )
    assert read("loud") == (["loud.f"], {})
    assert capfd.readouterr() == ("", "")


def test_a_package_finds_a_home_of_its_own_and_no_secrets(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    before = sorted(os.listdir()), os.getcwd(), dict(os.environ)
    seen = tmp_path / "seen"
    write(
        "curious.py",
        "import os, pathlib, tempfile\nopen('left_here', 'w').write('x')\n"
        "os.environ['SECRET_TOKEN_2'] = 'x'\n"
        "pathlib.Path.home().joinpath('left_at_home').touch()\ntempfile.mkstemp()\n"
        f"open({str(seen)!r}, 'w').write(repr((os.getcwd(), dict(os.environ), os.path.expanduser('~'))))\n"
        "os.chdir('/')\ndef f():\n    pass\n"
        "f.__doc__ = 'Lives in ' + tempfile.gettempdir()\ndef g():\n    'G.'\n",
    )
    paths, skipped = read("curious")
    assert paths == ["curious.g"]
    assert skipped == {"curious.f": "its docstring holds the path of a temporary folder"}
    folder, environment, home = eval(seen.read_text())
    assert folder == home == environment["HOME"] == environment["TMPDIR"]
    assert "SECRET_TOKEN" not in environment
    assert not Path(home).exists()
    assert (sorted(os.listdir()), os.getcwd(), dict(os.environ)) == before


def test_a_module_in_the_working_folder_takes_no_other_ones_place(write: Write, tmp_path: Path) -> None:
    write("good.py", "import json\n" + GOOD)
    here = tmp_path / "here"
    here.mkdir()
    canary = tmp_path / "canary"
    for name in ("json", "inspect", "mlxlora_docstrings", "ctypes", "ast"):
        (here / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    known = filter(None, [os.environ.get("PYTHONPATH")])
    code = """
import sys
sys.path.pop(0)
from mlxlora_docstrings import DocstringOptions, build
import mlxlora_docstrings.packages
sys.path[:0] = [sys.argv[1], ""]
for mode in ("import", "static"):
    print([row.group for row in build(DocstringOptions(packages=("good",), mode=mode)).rows])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(here)],
        cwd=here,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path / "importable"), *known))},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("['F.']\n['F.']\n", 0), done.stderr
    assert not canary.exists()


def test_a_package_that_eats_memory_or_disk_is_stopped_and_named(write: Write) -> None:
    write("eats_memory.py", "held = bytearray(10 << 30)\n" + GOOD)
    write("eats_pages.py", "held = [bytes(1 << 30) for _ in range(10)]\n" + GOOD)
    write("eats_below.py", "import ctypes\nheld = ctypes.create_string_buffer(10 << 30)\n" + GOOD)
    write("eats_disk.py", "file = open('large', 'wb')\nfile.truncate(2 << 30)\n" + GOOD)
    write("good.py", GOOD)
    paths, skipped = read("eats_memory", "eats_pages", "eats_below", "eats_disk", "good")
    assert paths == ["good", "good.f"]
    assert skipped == {
        **dict.fromkeys(("eats_memory", "eats_pages", "eats_below"), "MemoryError"),
        "eats_disk": "OSError: [Errno 27] File too large",
    }


def test_what_a_package_starts_is_bound_too(write: Write, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    program = "import resource as r; kinds = r.RLIMIT_DATA, r.RLIMIT_FSIZE, r.RLIMIT_CPU;"
    program += "print(*map(r.getrlimit, kinds))"
    write(
        "starts_one.py",
        "import subprocess, sys\n"
        f"done = subprocess.run([sys.executable, '-c', {program!r}], capture_output=True, text=True)\n"
        f"open({str(seen)!r}, 'w').write(done.stdout)\n" + GOOD,
    )
    read("starts_one", time_limit=50.0)
    cpu = 60 * (os.cpu_count() or 1)
    assert seen.read_text().split("\n")[0] == f"({8 << 30}, {8 << 30}) ({1 << 30}, {1 << 30}) ({cpu}, {cpu})"


def test_processor_time_is_bound_where_no_clock_looks(tmp_path: Path) -> None:
    # The limit itself is minutes: a process that has it lowered to a second dies as the other would.
    code = "import mlxlora_docstrings.child as c, resource as r\nc._contain(5)\n"
    code += "r.setrlimit(r.RLIMIT_CPU, (1, r.getrlimit(r.RLIMIT_CPU)[1]))\nwhile True: pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGXCPU


@pytest.mark.skipif(sys.platform != "linux", reason="counts the processes of a user")
def test_a_package_that_forks_for_ever_runs_into_a_limit() -> None:
    code = """
import os, resource, signal, sys  # while the libraries may still be read
import mlxlora_docstrings.child as child
if os.getuid() == 0:  # whom this limit does not bind
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
child._contain(60)
children = []
try:
    while len(children) < 600:
        pid = os.fork()
        if not pid:
            signal.pause()
        children.append(pid)
except BlockingIOError:
    print(len(children))
finally:
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 100 < int(done.stdout) <= 256


# --- what takes too long: all of it in one call, since each waits for the limit ---

HANG = "while True: pass\n"
LIMIT = 12.0  # seconds; a busy machine must start twenty interpreters in a fifth of it
LATE = f"no answer within {LIMIT:g} s (option time_limit)"

SLOW = {
    "spins.py": HANG,
    "swallows.py": "import time\nwhile True:\n  try: time.sleep(60)\n  except BaseException: pass\n",
    "lasting/__init__.py": GOOD,
    **{f"lasting/m{i:02}.py": "import time; time.sleep(0.8)\n" for i in range(20)},
    **{f"sleepy/m{i}.py": "import time; time.sleep(999)\n" for i in range(9)},
    "sleepy/__init__.py": GOOD,
    "partly/__init__.py": GOOD,
    "partly/a.py": "raise ValueError('no')\n",
    "partly/b.py": "import os; os._exit(1)\n",
    "partly/c/__init__.py": "import ctypes; ctypes.string_at(0)\n",
    "partly/c/below.py": "'Below.'\n",
    "partly/d.py": HANG,
    "partly/e.py": "'E.'\n",
    "objects/__init__.py": GOOD,
    "objects/sub.py": "class Meta(type):\n  __module__ = property(lambda cls: cls.hang())\n"
    "  def hang(cls):\n    while True: pass\nclass Bad(metaclass=Meta):\n  'Bad.'\n",
    "starts.py": "START" + GOOD,
    "starts_and_hangs.py": "START" + HANG,
    "good.py": GOOD,
}
START = """import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
open({note!r}, "a").write(f"{{child.pid}} ")
"""


@dataclass(frozen=True)
class Slow:
    """What came of SLOW: rows, reasons, the processes that its packages started, and how long it took."""

    paths: list[str]
    skipped: dict[str, str]
    started: list[int]
    seconds: float


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Slow:
    folder = tmp_path_factory.mktemp("slow")
    for path, source in SLOW.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source.replace("START", START.format(note=str(folder / "pids"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        packages = sorted({path.partition("/")[0].removesuffix(".py") for path in SLOW})
        began = time.monotonic()
        paths, skipped = read(*packages, time_limit=LIMIT, workers=len(packages))
        seconds = time.monotonic() - began
    return Slow(paths, skipped, [int(pid) for pid in (folder / "pids").read_text().split()], seconds)


def test_the_limit_is_for_all_attempts_at_a_package(slow: Slow) -> None:
    assert slow.skipped["sleepy"].startswith((LATE, STUCK))
    # Nine attempts of the whole limit would take nine times as long; the rest is for a busy machine.
    assert slow.seconds < 4 * LIMIT


def test_a_package_that_hangs_is_ended_and_the_others_go_on(slow: Slow) -> None:
    assert [slow.skipped[name] for name in ("spins", "swallows", "starts_and_hangs")] == [LATE] * 3
    assert {"good", "good.f"} <= set(slow.paths)


def test_submodules_that_fail_end_or_hang_are_left_out_of_the_package(slow: Slow) -> None:
    assert [path for path in slow.paths if path.startswith("partly")] == ["partly", "partly.e", "partly.f"]
    assert {name: reason for name, reason in slow.skipped.items() if name.startswith("partly")} == {
        "partly.a": "ValueError: no",
        "partly.b": "ended the process with exit status 1",
        "partly.c": "died with SIGSEGV",
        "partly.d": STUCK,
    }


def test_an_object_that_hangs_costs_its_own_module_only(slow: Slow) -> None:
    assert [path for path in slow.paths if path.startswith("objects")] == ["objects", "objects.f"]
    assert slow.skipped["objects.sub"] == STUCK


def test_a_package_that_is_only_long_is_given_up_and_not_cut(slow: Slow) -> None:
    assert not [path for path in slow.paths if path.startswith("lasting")]
    assert slow.skipped["lasting"].partition(" in lasting.m")[0] == LATE
    assert " others " not in slow.skipped["lasting"], "no module was blamed"


def test_what_a_package_starts_is_ended_with_it(slow: Slow) -> None:
    assert "starts.f" in slow.paths
    assert len(slow.started) == 2
    assert not any(map(is_alive, slow.started))


# --- what a package starts, and whom it kills -----------------------------------

PROGRAM = "[sys.executable, '-c', 'import time; time.sleep(999)']"
STARTS = {
    "group": f"child = subprocess.Popen({PROGRAM})",
    "session": f"child = subprocess.Popen({PROGRAM}, start_new_session=True)",
    "nameless": f"child = subprocess.Popen({PROGRAM}, start_new_session=True, env={{}})",
    "forks": "pid = os.fork()\nif not pid:\n    os.setsid()\n    time.sleep(999)",
    "daemon": "pid = os.fork()\nif not pid:\n    os.setsid()\n    pid = os.fork()\n    if pid: os._exit(0)\n"
    "    open(NOTE, 'a').write(f'{os.getpid()} ')\n    time.sleep(999)\nos.waitpid(pid, 0)\n"
    "while not os.path.getsize(NOTE): time.sleep(0.01)\npid = 0",
}
NOTED = "pid = pid or 0 if 'pid' in dir() else child.pid\nif pid: open(NOTE, 'a').write(f'{pid} ')\n"
ENDS_SO = {
    "well": "",
    "exits": "os._exit(3)\n",
    "dies": "os.kill(os.getpid(), signal.SIGKILL)\n",
    "kills_its_parent": "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(99)\n",
    "kills_its_group": "os.killpg(os.getpgid(0), signal.SIGKILL)\ntime.sleep(99)\n",
    "kills_the_group_of_its_parent": "os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)\ntime.sleep(99)\n",
    "ends_its_parent": "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(99)\n",
    "stops_its_parent": "os.kill(os.getppid(), signal.SIGSTOP)\nos._exit(0)\n",
}


@pytest.mark.skipif(sys.platform != "linux", reason="finds what has left its group in /proc")
@pytest.mark.parametrize("end", ENDS_SO)
def test_nothing_that_a_package_started_outlives_it(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    imports = "import os, signal, subprocess, sys, time\n"
    for name, start in STARTS.items():
        note = tmp_path / name
        note.touch()
        write(
            f"{name}_.py",
            f"{imports}NOTE = {str(note)!r}\n{start}\n{NOTED}{ENDS_SO[end]}{GOOD.partition(chr(10))[2]}",
        )
    write("good.py", GOOD)
    names = [f"{name}_" for name in STARTS]
    paths, skipped = read(*names, "good", time_limit=5.0, workers=6)
    assert {"good", "good.f"} <= set(paths)
    assert sorted(skipped) == ([] if end == "well" else sorted(names))
    pids = {name: int((tmp_path / name).read_text().split()[0]) for name in STARTS}
    # What left its session and kept nothing of its environment is found as long as its warden lives.
    hidden = {"nameless"} if "parent" in end else set()
    assert [name for name, pid in pids.items() if name not in hidden and is_alive(pid)] == []
    for name in hidden:
        with suppress(ProcessLookupError):
            os.kill(pids[name], signal.SIGKILL)
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="finds what has left its group in /proc")
def test_when_mlxlora_is_killed_everything_ends(write: Write, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    note.touch()
    write(
        "hangs.py",
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen({PROGRAM}, start_new_session=True, env={{}})\n"
        f"open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}} {{child.pid}} ' + os.getcwd())\n"
        "time.sleep(999)\n",
    )
    code = "from mlxlora_docstrings import *; build(DocstringOptions(packages=('hangs',), time_limit=300.0))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "importable")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    while note.read_text().count(" ") < 3:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    *pids, home = note.read_text().split()
    assert [pid for pid in pids if is_alive(int(pid))] == []
    for _ in range(100):
        if not Path(home).parent.exists():
            break
        time.sleep(0.02)
    assert not Path(home).parent.exists()


def test_sources_have_the_time_limit_too(write: Write) -> None:
    write("tangled/__init__.py", GOOD)
    doubled = "d = 'a'\n" + "d = d + d\n" * 19  # a text that is put together to the end costs 0.1 ms
    write("tangled/a.py", doubled + "e = d.replace('a', 'b')\n" * 600_000)
    write("good.py", GOOD)
    paths, skipped = read("tangled", "good", mode="static", time_limit=LIMIT)
    assert paths == ["good", "good.f", "tangled", "tangled.f"]
    assert skipped == {"tangled.a": STUCK}


@pytest.mark.parametrize(
    ("variable", "first", "has_it", "is_kept"),
    [
        (None, "here", True, False),
        ("", "here", True, False),
        (":/nowhere", "here", True, False),
        (".", "here", True, True),
        (".", "here", False, False),
        ("here", "here", True, True),
        ("here", "here", False, False),
    ],
)
def test_the_working_folder_is_searched_when_it_is_asked_for_and_has_the_package(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    first: str,
    has_it: bool,
    is_kept: bool,
) -> None:
    here = str(tmp_path)
    monkeypatch.chdir(tmp_path)
    if variable is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", variable.replace("here", here))
    monkeypatch.setattr(sys, "path", [here, *sys.path])
    if has_it:
        (tmp_path / "wanted").mkdir()
    assert (here in search_path("wanted.part")) == is_kept


# --- submodules ---------------------------------------------------------------


def test_a_package_of_nothing_but_bombs_is_given_up(write: Write) -> None:
    write("mines/__init__.py", GOOD)
    for i in range(RESTARTS + 1):
        write(f"mines/m{i}.py", "import os; os._exit(1)")
    write("good.py", GOOD)
    paths, skipped = read("mines", "good")
    assert paths == ["good", "good.f"]
    assert skipped == {
        "mines": f"ended the process with exit status 1 in mines.m{RESTARTS}, "
        f"after {RESTARTS} others that it was kept out of"
    }


def test_odd_source_files_are_told(write: Write) -> None:
    write("odd/__init__.py", GOOD)
    write("odd/nulls.py", "x = '\0'")
    write("odd/cookie.py", "# coding: no-such-encoding\n")
    write("odd/latin.py", "").write_bytes(b"# coding: latin-1\n'''\xe9'''\n")
    write("odd/mark.py", "").write_bytes(b"\xef\xbb\xbf'''Mark.'''\n")
    write("odd/bytes.py", "").write_bytes(b"'''\xff'''\n")
    write("odd/no-name.py", "raise SystemExit")
    write("odd/scripts/run.py", "raise SystemExit")
    for mode in ("import", "static"):
        paths, skipped = read("odd", mode=mode)
        assert paths == ["odd", "odd.f", "odd.latin", "odd.mark"]
        assert sorted(skipped) == ["odd.bytes", "odd.cookie", "odd.nulls"]


# --- objects ------------------------------------------------------------------


def test_objects_that_fight_back_are_passed_over(write: Write) -> None:
    write(
        "bombs.py",
        """
import sys, types
class Meta(type):
    def __getattr__(cls, name):
        raise SystemExit
    def __getattribute__(cls, name):
        raise KeyboardInterrupt
    def __instancecheck__(cls, other):
        raise SystemExit
class Bomb(metaclass=Meta):
    "Bomb."
class Proxy:
    def __getattr__(self, name):
        raise SystemExit
    @property
    def __class__(self):
        raise SystemExit
    @property
    def __doc__(self):
        raise KeyboardInterrupt
    def __call__(self):
        pass
    def __eq__(self, other):
        raise SystemExit
    __hash__ = None
proxy = Proxy()
class Number:
    __doc__ = 3
class Property:
    @property
    def raises(self):
        "A property that raises."
        raise SystemExit
class Endless:
    def __getattr__(self, name):
        return Endless()
    def __call__(self):
        "Call."
endless = Endless()
class Lazy(types.ModuleType):
    def __getattr__(self, name):
        raise SystemExit
lazy = sys.modules["bombs.lazy"] = Lazy("bombs.lazy")
class Evil:
    def __str__(self):
        raise SystemExit
nameless = types.ModuleType("nameless")
nameless.__name__ = Evil()
class Equal(type):
    def __eq__(cls, other):
        raise SystemExit
    __hash__ = type.__hash__
class Odd(metaclass=Equal):
    "Odd."
odd = Odd()
def f():
    "F."
def g(): pass
g.__doc__ = ["no text"]
class Text(str): pass
def h(): pass
h.__doc__ = Text("Of another type.")
globals()[3] = f
class Circle:
    "Circle."
Circle.again = Circle
""",
    )
    paths, skipped = read("bombs")
    assert {"bombs.f", "bombs.Property.raises", "bombs.Circle", "bombs.Odd"} <= set(paths)
    assert not {"bombs.g", "bombs.Number", "bombs.proxy", "bombs.endless", "bombs.Circle.again"} & set(paths)
    assert skipped == {
        "bombs.Circle.*": "it has members that are those of another class, as again of bombs",
        "bombs.lazy": "it has no docstring of its own",
    }


def test_text_that_differs_from_run_to_run_is_left_out(write: Write) -> None:
    source = """
from dataclasses import dataclass, field
@dataclass
class Auto:
    default: object = object()
@dataclass
class Sets:
    names: frozenset = frozenset({"one", "two", "three", "four"})
def bare(): pass
bare.__doc__ = f"At {hex(id(bare))}."
def literal():
    "An object at 0x..., and 0x7f."
def half(): pass
half.__doc__ = "half \\ud800"
"""
    write("addresses.py", source)
    first = read("addresses")
    made = [build(DocstringOptions(packages=("addresses",))).rows for _ in range(3)]
    assert made[0] == made[1] == made[2], "sets print in one order"
    assert first[0] == ["addresses.Sets", "addresses.literal"]
    assert first[1] == {
        "addresses.Auto": "its docstring holds what may be a memory address",
        "addresses.bare": "its docstring holds what may be a memory address",
        "addresses.half": "its docstring holds half a surrogate pair",
    }


def test_reasons_do_not_differ_from_run_to_run(write: Write) -> None:
    write("good.py", GOOD)
    write(
        "bad.py", "import tempfile\nraise ValueError(f'{object()} in {tempfile.gettempdir()} ' + 'x' * 999)"
    )
    first, second = read("good", "bad")[1], read("good", "bad")[1]
    assert first == second
    assert first["bad"].startswith("ValueError: <object object at 0x...> in <temporary folder>/home xxx")
    assert len(first["bad"]) == 200


def test_a_very_long_docstring_is_not_carried_over(write: Write) -> None:
    write("long.py", "def f(): pass\nf.__doc__ = 'x' * (50 << 20)\ndef g():\n  'G.'\n")
    assert read("long") == (
        ["long.g"],
        {"long.f": f"its docstring has {50 << 20} characters, the limit is 2048"},
    )


# --- the parent ---------------------------------------------------------------


def test_an_interrupt_ends_the_children_at_once(write: Write, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    for i in range(3):
        write(
            f"hangs_{i}.py",
            f"import os\nopen({str(note)!r}, 'a').write(f'{{os.getpid()}} ')\nwhile True: pass\n",
        )
    note.touch()

    def interrupt() -> None:
        while len(note.read_text().split()) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        build(DocstringOptions(packages=("hangs_0", "hangs_1", "hangs_2"), workers=2, time_limit=300.0))
    thread.join()
    pids = note.read_text().split()
    assert len(pids) == 2, "the third was not started any more"
    assert not any(is_alive(int(pid)) for pid in pids)
