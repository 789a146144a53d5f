"""What is changed around a block is put back and named, whoever changes it and however the block ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from pathlib import Path

import pytest

from mlxlora_core.errors import MlxloraError
from mlxlora_core.machine import signals
from mlxlora_core.plugins import surroundings
from mlxlora_core.plugins.surroundings import PluginWarning, kept


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_told", set())


def test_nothing_is_said_where_nothing_changes() -> None:
    before = (os.getcwd(), list(sys.path), signal.getsignal(signal.SIGTERM))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with kept("plugin p") as watch:
            import fractions  # noqa: F401  # an import is no change
    assert watch.changed == ()
    assert (os.getcwd(), list(sys.path), signal.getsignal(signal.SIGTERM)) == before


def test_what_is_changed_is_put_back_when_the_block_raises(tmp_path: Path) -> None:
    here, mask = os.getcwd(), os.umask(0o027)
    try:
        told = pytest.warns(PluginWarning, match="plugin p has changed the working folder, the umask, which")
        with told, pytest.raises(ZeroDivisionError), kept("plugin p"):
            os.chdir(tmp_path)
            os.umask(0)
            1 / 0  # noqa: B018  # what a plugin may do
        assert os.getcwd() == here and os.umask(0o027) == 0o027
    finally:
        os.umask(mask)


def test_it_is_told_once() -> None:
    with pytest.warns(PluginWarning) as told:
        for _ in range(3):
            with kept("plugin p"):
                sys.setrecursionlimit(sys.getrecursionlimit() + 1)
    assert len(told) == 1


def test_a_signal_that_comes_in_the_block_changes_handlers_as_it_should() -> None:
    """The first Ctrl-C makes a second one end the process, also while a plugin is at work."""
    with signals.deferred() as pending:
        with kept("plugin p") as watch:
            os.kill(os.getpid(), signal.SIGINT)
        assert pending.signum == signal.SIGINT and watch.changed == ()
        assert signal.getsignal(signal.SIGINT) is not None


def test_what_is_added_to_the_path_stays_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    with pytest.warns(PluginWarning, match=r"sys\.path"), kept("plugin p"):
        sys.path.insert(0, "/added")
    assert sys.path == [*before, "/added"]


def test_variables_may_be_set_but_not_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERE", "1")
    monkeypatch.delenv("NEW", raising=False)
    with pytest.warns(PluginWarning, match="environment variables"), kept("plugin p"):
        del os.environ["THERE"]
        os.environ["NEW"] = "1"
    assert os.environ["THERE"] == os.environ["NEW"] == "1"
    with pytest.warns(PluginWarning), kept("plugin of another name") as watch:
        watch.environ = True
        del os.environ["NEW"]
        os.environ["NEWER"] = "1"
    assert os.environ["NEW"] == "1" and "NEWER" not in os.environ


def test_filters_for_some_warnings_may_stay() -> None:
    with warnings.catch_warnings():
        with kept("plugin p") as watch:
            warnings.filterwarnings("ignore", message="one of many")
        assert watch.changed == ()
        assert any(one[1] and one[1].pattern == "one of many" for one in warnings.filters)


def test_another_thread_looks_at_nothing() -> None:
    found: list[tuple[str, ...]] = []

    def work() -> None:
        with kept("plugin p") as watch:
            sys.setrecursionlimit(sys.getrecursionlimit() + 1)
        found.append(watch.changed)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [()]
    sys.setrecursionlimit(sys.getrecursionlimit() - 1)


def test_only_a_plugin_is_kept_from_ending_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    surroundings.refuse_endings(lambda file: file == "plugin.py")
    try:
        os._exit(3)
        assert ended == [3]
        assert not issubclass(surroundings.ProcessEnded, MlxloraError)
    finally:
        for name in ("abort", "execv", "execve"):
            setattr(os, name, getattr(os, name).real)
