"""How the suite is shared out between two processes, where pytest-xdist is installed.

A file's tests stay together, and so do its fixtures. What measures time, or
takes much memory, is in files that one process works on, one after another.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

COUNT = 2
_WORKER = "PYTEST_XDIST_WORKER"  # set by pytest-xdist in its processes and in all that they start

#: files of which no two are worked on at once, below the folder of the tests; they come first
QUIET = (
    "core/chat/test_sandbox.py",
    "core/files/test_tensor_file.py",
    "faults/resume/test_kill.py",
    "faults/resume/test_saving.py",
    "faults/test_child_records.py",
    "faults/test_fuzz.py",
    "faults/test_own_files.py",
    "faults/verbs/test_memory_limits.py",
    "faults/verbs/test_system_limits.py",
    "journeys/test_bad_input.py",
    "plugins/test_docstrings_isolation.py",
    "plugins/test_openblas_guard.py",
)


def is_quiet(nodeid: str) -> bool:
    """Whether a test is in one of the files of which no two are worked on at once."""
    return nodeid.partition("::")[0].partition("tests/")[2] in QUIET


def is_one_of_several(config: pytest.Config) -> bool:
    """Whether this is one of the processes that tests are shared out to."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Have the whole suite run in processes, unless the command line says how many, or wants a debugger.

    A part of it runs in one: two take as long to begin as they save.
    """
    option = config.option
    # Without pytest-xdist; or in one of its processes, which has the same command line.
    if not hasattr(option, "numprocesses") or is_one_of_several(config) or _WORKER in os.environ:
        return
    if option.numprocesses is None and _is_whole(config) and not option.usepdb and processors() > 1:
        option.numprocesses = COUNT
    if option.numprocesses and option.dist == "no":
        option.dist, option.loadscopereorder = "loadfile", False


def _is_whole(config: pytest.Config) -> bool:
    """Whether all tests are asked for."""
    asked = {config.invocation_params.dir.joinpath(path).resolve() for path in config.option.file_or_dir}
    return not asked or not asked.isdisjoint({config.rootpath, config.rootpath / "tests"})


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What deals out the tests by files, or None where the command line says how."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        """Deals out files, and all that need a quiet machine to one process."""

        def _split_scope(self, nodeid: str) -> str:
            return "quiet" if is_quiet(nodeid) else super()._split_scope(nodeid)

    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what one process has to do alone, as that takes longest."""
    items.sort(key=lambda item: not is_quiet(item.nodeid))
