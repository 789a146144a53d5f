"""What pytest finds out about suites, test by test, told to whoever waits for it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import UsageError, short
from mlxlora_core.plugins import Component
from mlxlora_core.testing import checked

Tell = Callable[[Mapping[str, Any]], None]

_HERE = str(Path(__file__).parent)
_LETTERS = 600  # of a value that is told


class Findings:
    """A plugin of pytest that has each component tried by one suite, and tells what comes of it.

    A suite that its author has written, in a test file of theirs, comes before a guessed one.

    Args:
        components: what is tried.
        tell: called with each finding.
    """

    def __init__(self, components: Sequence[Component], tell: Tell) -> None:
        self._components, self._tell = components, tell
        self._compared: tuple[str, str] | None = None
        self._count = self._done = 0
        self._suites: dict[str, type[Any]] = {}

    # --- which tests there are ---

    def pytest_configure(self) -> None:
        """Make the suites: not before pytest is there, so that their assertions explain themselves."""
        pytest.register_assert_rewrite(checked.__package__)
        from mlxlora_core.testing import defaults

        for number, component in enumerate(self._components):
            self._suites[component.kind] = defaults.suite_of(component.kind)
            setattr(checked, f"Test{number}", defaults.guessed_suite(component))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what is no suite, and the guessed suite where there is one of the author's."""
        tried = [(item, c.id) for item in items if (c := self._component(item)) is not None]
        theirs = {name for item, name in tried if not _is_guessed(item)}
        items[:] = [item for item, name in tried if name not in theirs or not _is_guessed(item)]
        self._count = len(items)

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

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Tell of a test file of the author's that cannot be read."""
        if report.failed:
            said = str(getattr(report.longrepr, "longrepr", report.longrepr)).strip().splitlines()
            told = {"test": report.nodeid, "tried": "The test file can be read."}
            self._tell(told | {"result": "failed", "got": said[-1].strip("E ")})

    # --- what comes of them ---

    def pytest_assertrepr_compare(self, op: str, left: object, right: object) -> None:
        """Keep what an assertion compares; pytest goes on to explain it."""
        want = _shown(right)
        self._compared = _shown(left), want if op == "==" else f"{op} {want}"

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell which test begins, so that it can be named if the process ends in it."""
        self._tell({"running": nodeid.rpartition("::")[2], "done": self._done, "count": self._count})
        self._done += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """Tell how a test has ended."""
        if call.when == "setup":
            self._compared = None
        report = yield
        if report.when == "call" or report.outcome != "passed":
            component = self._component(item)
            assert component is not None
            told = {"component": component.id, "kind": component.kind, "tried": _tried(item)}
            told |= {"test": item.name, "suite": "guessed" if _is_guessed(item) else "the author's"}
            self._tell(told | (_left_out(call, component, _is_guessed(item)) or self._ending(call)))
        return report

    def _ending(self, call: pytest.CallInfo[None]) -> dict[str, str]:
        """The result of a test, with what was got and wanted of one that has failed."""
        if call.excinfo is None:
            return {"result": "passed"}
        fault = call.excinfo.value
        if isinstance(fault, pytest.skip.Exception):
            empty = str(fault).startswith("got empty parameter set")  # in pytest's words
            return {
                "result": "does not apply",
                "why": "the suite states nothing to try" if empty else str(fault),
            }
        last = call.excinfo.traceback[-1]
        told = {"result": "failed", "where": f"{Path(last.path).name}:{last.lineno + 1}"}
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
    fault, last, why = call.excinfo.value, call.excinfo.traceback[-1], ""
    needs: Mapping[str, str] = getattr(component.spec, "needs", {})
    library = (fault.name or "").partition(".")[0] if isinstance(fault, ImportError) else ""
    if isinstance(fault, NotImplementedError) and str(last.path).startswith(_HERE):
        why = f"only a suite of your own can say: {str(fault) or last.name}"
    elif library in needs:
        why = f"it needs {library}: pip install {needs[library]}"
    elif guessed and isinstance(fault, UsageError) and dataclasses.fields(component.spec.options):
        # It refuses options that are only a guess.
        why = f"only a suite of your own can say which options: {fault}"
    return {"result": "left out", "why": why} if why else None


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
