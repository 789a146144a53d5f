"""Signals in processes of their own, since it is the process that they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlxlora_core.machine import signals

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

#: raises a signal at each line that comes in, and tells what came of it
RAISES = """
import os, signal, sys
from mlxlora_core.machine import signals
signals.install()
try:
    os.kill(os.getpid(), int(sys.argv[1]))
    print("went on")
except signals.Interrupted as fault:
    print(fault, fault.signum, fault.exit_code)
"""


def run(program: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("number", ALL)
def test_the_first_signal_raises(number: int) -> None:
    assert run(RAISES, int(number)).stdout == f"interrupted {int(number)} {128 + number}\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_one_that_was_ignored_from_the_start_stays_ignored(number: int) -> None:
    name = signal.Signals(number).name.removeprefix("SIG")
    done = run(RAISES, int(number), prefix=("bash", "-c", f"trap '' {name}; exec \"$@\"", "bash"))
    assert done.stdout == "went on\n"


@pytest.mark.parametrize("number", ALL)
def test_a_second_one_ends_the_process_although_the_first_is_being_dealt_with(number: int) -> None:
    program = RAISES + f"    os.kill(os.getpid(), {int(number)})\n    print('still here', flush=True)\n"
    done = run(program, int(signal.SIGTERM))
    assert done.returncode == -number
    assert "still here" not in done.stdout


@pytest.mark.parametrize("number", ALL)
def test_deferred_notes_the_first_and_dies_of_the_second(number: int) -> None:
    program = """
import os, signal, sys
from mlxlora_core.machine import signals
signals.install()
with signals.deferred() as pending:
    assert pending.signum is None
    os.kill(os.getpid(), int(sys.argv[1]))
    print(pending.signum, flush=True)
    os.kill(os.getpid(), int(sys.argv[1]))
    print("still here", flush=True)
"""
    done = run(program, int(number))
    assert done.stdout == f"{int(number)}\n"
    assert done.returncode == -number


def test_where_nothing_was_installed_the_second_does_what_it_did_before() -> None:
    """In Python, Ctrl-C twice is KeyboardInterrupt and not the end of the process."""
    before = {number: signal.getsignal(number) for number in ALL}
    with pytest.raises(KeyboardInterrupt), signals.deferred() as pending:
        os.kill(os.getpid(), signal.SIGTERM)
        assert pending.signum == signal.SIGTERM
        assert {number: signal.getsignal(number) for number in ALL} == before
        os.kill(os.getpid(), signal.SIGINT)
    assert {number: signal.getsignal(number) for number in ALL} == before


def test_handlers_are_put_back_even_when_a_signal_came() -> None:
    before = {number: signal.getsignal(number) for number in ALL}
    for send in (False, True):
        with signals.deferred() as pending:
            assert all(signal.getsignal(number) != before[number] for number in ALL)
            if send:
                os.kill(os.getpid(), signal.SIGHUP)
        assert pending.signum == (signal.SIGHUP if send else None)
        assert {number: signal.getsignal(number) for number in ALL} == before


def test_an_exception_in_the_block_puts_them_back_too() -> None:
    before = {number: signal.getsignal(number) for number in ALL}
    with pytest.raises(ZeroDivisionError), signals.deferred():
        raise ZeroDivisionError
    assert {number: signal.getsignal(number) for number in ALL} == before


def test_noted_notes_it_as_often_as_it_comes_and_leaves_the_others() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with signals.noted() as pending:
        assert pending.signum is None and signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
        for _ in range(3):
            pending.signum = None
            os.kill(os.getpid(), signal.SIGINT)
            assert pending.signum == signal.SIGINT
    assert {n: signal.getsignal(n) for n in before} == before


def test_noted_passes_over_one_that_is_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.noted() as pending:
            os.kill(os.getpid(), signal.SIGINT)
            assert pending.signum is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing() -> None:
    before = {number: signal.getsignal(number) for number in ALL}
    found = []

    def work() -> None:
        with signals.deferred() as pending:
            found.append((pending.signum, {number: signal.getsignal(number) for number in ALL}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


def test_one_that_was_kept_back_comes_to_a_child_when_it_lets_it_in() -> None:
    child = """
import sys
from mlxlora_core.machine import signals
sys.stdin.readline()  # it has come
signals.install()
print("ready", flush=True)
try:
    signals.let_in()
except signals.Interrupted as fault:
    print(fault.signum)
"""
    with signals.kept_back():
        process = subprocess.Popen(
            [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    process.send_signal(signal.SIGTERM)
    assert process.communicate("go\n", timeout=60)[0] == f"ready\n{int(signal.SIGTERM)}\n"


def test_undeferred_one_ends_the_process() -> None:
    program = """
import os, sys
from mlxlora_core.machine import signals
signals.install()
with signals.undeferred():
    pass
try:
    os.kill(os.getpid(), 15)
except signals.Interrupted:
    print("as before", flush=True)
signals.install()
with signals.undeferred():
    os.kill(os.getpid(), 15)
print("still here")
"""
    done = run(program)
    assert done.stdout == "as before\n" and done.returncode == -signal.SIGTERM


def test_one_that_comes_where_a_class_is_made_is_no_defect() -> None:
    """Python 3.11 makes a RuntimeError of whatever is raised there."""
    program = """
import os, sys
from mlxlora_core import cli
from mlxlora_core.cli import verbs
from mlxlora_core.machine import signals

class Named:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), 15)

def main(*_, **__):
    class Owner:
        named = Named()

signals.install()
verbs.group.main = main
sys.exit(cli.execute(["plugins"]))
"""
    done = run(program)
    assert (done.returncode, done.stderr) == (143, "mlxlora: interrupted\n")


def test_no_handler_of_faults_takes_it_for_one(tmp_path: Path) -> None:
    """A plugin that is being imported does not become a plugin that failed to load."""
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    command = [sys.executable, "-m", "mlxlora_core", "components", "-P", str(tmp_path / "slow.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (143, "mlxlora: interrupted\n")
