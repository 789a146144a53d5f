"""What pytest finds out about suites, test by test, told to whoever waits for it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from mlxlora_core.errors import UsageError, short
from mlxlora_core.plugins import Component
from mlxlora_core.plugins.surroundings import ProcessEnded
from mlxlora_core.testing import checked

_HERE = str(Path(__file__).parent)
_LETTERS = 600  # of a value that is told
ENDINGS = 3  # tests of a suite that may end the process, or not end, before the others are left out

_CALLED = "Its functions can be called."
_QUIET = "It prints nothing on stdout, where results go."
_READ = "The test file can be read."


class Progress(Protocol):
    """Who is told what begins and what is found: see :class:`mlxlora_core.testing.check.Progress`."""

    seen: frozenset[str]
    failed: frozenset[str]

    def tell(self, finding: Mapping[str, Any]) -> None:
        """Tell a finding."""

    def begin(self, name: str, about: Mapping[str, Any], **more: Any) -> None:
        """Tell that something begins."""


class Findings:
    """A plugin of pytest that has each component tried by one suite, and tells what comes of it.

    A suite that its author has written, in a test file of theirs, comes before a guessed one.

    Args:
        components: what is tried.
        progress: is told of each test and each finding, and knows what was tried by an earlier process.

    Attributes:
        left: tests that have not been begun.
    """

    def __init__(self, components: Sequence[Component], progress: Progress) -> None:
        self._components, self._progress = components, progress
        self._tell = progress.tell
        self._compared: tuple[str, str] | None = None
        self._count = self.left = 0
        self._suites: dict[str, type[Any]] = {}
        self._loud: set[str] = set()  # components that have printed something

    # --- which tests there are ---

    def pytest_configure(self) -> None:
        """Make the suites: not before pytest is there, so that their assertions explain themselves."""
        pytest.register_assert_rewrite(checked.__package__)
        from mlxlora_core.testing import defaults

        for component in self._components:
            self._suites[component.kind] = defaults.suite_of(component.kind)
            name = f"{component.kind} {component.id}"
            if f"guess {name}" not in self._progress.failed:
                about = {"component": component.id, "kind": component.kind, "test": "call", "tried": _CALLED}
                self._progress.begin(f"guess {name}", about)
                setattr(checked, f"Test {name}", defaults.guessed_suite(component))
        self._progress.begin("collection", {})

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what is no suite, and the guessed suite where there is one of the author's."""
        tried = [(item, c.id) for item in items if (c := self._component(item)) is not None]
        theirs = {name for item, name in tried if not _is_guessed(item)}
        items[:] = [item for item, name in tried if name not in theirs or not _is_guessed(item)]
        self._count = len(items)
        items[:] = [item for item in items if not self._is_over(item)]
        self.left = len(items)

    def _is_over(self, item: pytest.Item) -> bool:
        """Whether a test was begun by an earlier process, or is not worth another one; that is told once."""
        failed, test = self._progress.failed, _function(item.nodeid)
        if item.nodeid in self._progress.seen or test in {_function(name) for name in failed}:
            return True
        suite = test.rpartition("::")[0]
        if sum(name.startswith(f"{suite}::") for name in failed) < ENDINGS:
            return False
        why = f"not tried: {ENDINGS} tests before it have not come to an end"
        self._tell(self._about(item) | {"result": "left out", "why": why})
        return True

    def _about(self, item: pytest.Item) -> dict[str, str]:
        """What is told of a test, however it ends."""
        component = self._component(item)
        assert component is not None
        told = {"component": component.id, "kind": component.kind, "tried": _tried(item)}
        return told | {"test": item.name, "suite": "guessed" if _is_guessed(item) else "the author's"}

    def _component(self, item: pytest.Item) -> Component | None:
        """What a test tries, if it is one of a suite over a component."""
        cls: Any = getattr(item, "cls", None)
        spec = getattr(cls, "spec", None)
        alike = [
            component
            for component in self._components
            if (type(component.spec), component.spec.name) == (type(spec), getattr(spec, "name", None))
            and issubclass(cls, self._suites[component.kind])
        ]
        # Two plugins may give one name: a spec that is made anew at each call is equal to none.
        return next((c for c in alike if c.spec is spec or c.spec == spec), alike[0] if alike else None)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave out a test file that has ended an earlier process."""
        return True if f"file {collection_path}" in self._progress.failed else None

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        """Tell which test file is read, so that it can be named if the process ends in it."""
        if isinstance(collector, pytest.Module) and collector.path != Path(checked.__file__):
            about = {"test": collector.nodeid, "tried": _READ}
            self._progress.begin(f"file {collector.path}", about)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Tell of a test file of the author's that cannot be read."""
        if report.failed:
            said = str(getattr(report.longrepr, "longrepr", report.longrepr)).strip().splitlines()
            told = {"test": report.nodeid, "tried": _READ}
            self._tell(told | {"result": "failed", "got": said[-1].strip("E ")})

    # --- what comes of them ---

    def pytest_assertrepr_compare(self, op: str, left: object, right: object) -> None:
        """Keep what an assertion compares; pytest goes on to explain it."""
        want = _shown(right)
        self._compared = _shown(left), want if op == "==" else f"{op} {want}"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Tell which test begins, so that it can be named if the process ends in it."""
        done = self._count - self.left
        self._progress.begin(item.nodeid, self._about(item), done=done, count=self._count)
        self.left -= 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """Tell how a test has ended."""
        if call.when == "setup":
            self._compared = None
        report = yield
        if report.when == "call":
            self._note_printed(item, report.capstdout)
        if report.when == "call" or report.outcome != "passed":
            component = self._component(item)
            assert component is not None
            told = _left_out(call, component, _is_guessed(item)) or self._ending(call)
            self._tell(self._about(item) | told)
        return report

    def _note_printed(self, item: pytest.Item, text: str) -> None:
        """Tell the first time that a component prints something on stdout, which a command may."""
        component = self._component(item)
        assert component is not None
        if text and component.kind != "command" and _is_of_suite(item) and component.id not in self._loud:
            self._loud.add(component.id)
            told = self._about(item) | {"test": "stdout", "tried": _QUIET}
            self._tell(told | {"result": "failed", "got": short(text.strip(), _LETTERS)})

    def _ending(self, call: pytest.CallInfo[None]) -> dict[str, str]:
        """The result of a test, with what was got and wanted of one that has failed."""
        if call.excinfo is None:
            return {"result": "passed"}
        fault = call.excinfo.value
        if isinstance(fault, pytest.skip.Exception):
            empty = str(fault).startswith("got empty parameter set")  # in pytest's words
            return {
                "result": "does not apply",
                "why": "its author states none to try" if empty else str(fault),
            }
        last = call.excinfo.traceback[-1]
        told = {"result": "failed", "where": f"{Path(last.path).name}:{last.lineno + 1}"}
        if isinstance(fault, ProcessEnded):
            return told | {"got": f"it called {fault.call}"}
        if not isinstance(fault, AssertionError):
            return told | {"got": short(f"{type(fault).__name__}: {fault}", _LETTERS)}
        text = (str(fault).splitlines() or ["an assertion fails"])[0]
        if self._compared is not None and text.startswith("assert "):
            return told | {"got": self._compared[0], "want": self._compared[1]}
        return told | {"got": short(text, _LETTERS)}


def _left_out(call: pytest.CallInfo[None], component: Component, guessed: bool) -> dict[str, str] | None:
    """Why a test could not be tried, where that is so: the author says too little, or a library is absent.

    Args:
        call: of the test.
        component: that it tries.
        guessed: whether the suite is not the author's.
    """
    if call.excinfo is None:
        return None
    fault, last, why, missing = call.excinfo.value, call.excinfo.traceback[-1], "", ""
    needs: Mapping[str, str] = getattr(component.spec, "needs", {})
    library = (fault.name or "").partition(".")[0] if isinstance(fault, ImportError) else ""
    if isinstance(fault, NotImplementedError) and str(last.path).startswith(_HERE):
        missing = str(fault) or last.name
        why = f"define {missing} in {_suite_name(component.kind)}"
    elif library in needs:
        why = f"it needs {library}: pip install {needs[library]}"
    elif guessed and isinstance(fault, UsageError) and dataclasses.fields(component.spec.options):
        # It refuses options that are only a guess.
        missing = "option_sets"
        why = f"define {missing} in {_suite_name(component.kind)}: {fault}"
    return {"result": "left out", "why": why, "missing": missing} if why else None


def _suite_name(kind: str) -> str:
    """What an author subclasses in a test file, in words."""
    from mlxlora_core.testing import defaults

    module, _, name = defaults.SUITES[kind].partition(":")
    return f"a subclass of {checked.__package__}.{module}.{name} in tests/"


def _function(nodeid: str) -> str:
    """The name of a test without its parameters."""
    return nodeid.partition("[")[0]


def _is_of_suite(item: pytest.Item) -> bool:
    """Whether a test is mlxlora's own, and none that the author has added."""
    return str(getattr(getattr(item, "function", None), "__module__", "")).startswith(checked.__package__)


def _is_guessed(item: pytest.Item) -> bool:
    return getattr(item, "module", None) is checked


def _tried(item: pytest.Item) -> str:
    """What a test tries: the first sentence of its docstring."""
    function = getattr(item, "function", None)
    return (inspect.getdoc(function) or item.name).split("\n\n")[0].replace("\n", " ")


def _shown(value: object) -> str:
    try:
        return short(repr(value), _LETTERS)
    except Exception as fault:
        return f"(cannot be shown: {type(fault).__name__})"
