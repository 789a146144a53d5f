"""The state of the process that a plugin must leave as it is: working folder, signals, streams, limits.

A plugin that changes them, on import or in one of its functions, is named in a warning, and they are
put back. A plugin that tries to end the process gets an exception instead, which ends the verb with an
error that names the plugin.
"""

from __future__ import annotations

import builtins
import fcntl
import gc
import locale
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mlxlora_core.errors import PluginError, one_line
from mlxlora_core.machine import signals

_HIGH = (60_000, 4_000, 500, 3)  # lowest numbers for copies of standard streams: few close these
_UNTOUCHED = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}  # numpy's own settings
_end = os._exit  # the real one: refuse_endings replaces it
_CORE = str(Path(__file__).parents[1])
_TIMERS = {signal.ITIMER_REAL: "real", signal.ITIMER_VIRTUAL: "virtual", signal.ITIMER_PROF: "profiling"}
_LIMITS = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
_SIGNALS = sorted(n for n in signal.valid_signals() if n < 32 and n not in (signal.SIGKILL, signal.SIGSTOP))
_told: set[str] = set()  # warnings already given: once is enough
_STREAMS = ("stdin", "stdout", "stderr")


class PluginWarning(UserWarning):
    """A plugin has changed state of the process."""


class ProcessEnded(SystemExit):
    """A plugin has called a function that ends the process.

    Attributes:
        call: that call, as source code.
    """

    def __init__(self, call: str) -> None:
        self.call = call
        super().__init__(70)


@dataclass
class Watch:
    """What happens at the end of a block of :func:`kept`.

    Attributes:
        environ: whether all environment variables are put back, or only those that were deleted.
        changed: what was changed, in words; set when the block is left.
    """

    environ: bool = False
    changed: tuple[str, ...] = ()


@contextmanager
def kept(who: str, look: bool = True) -> Iterator[Watch]:
    """Inside, prints go to stderr; on leaving, changed state of the process is put back.

    In a thread other than the main one, it does neither.

    Args:
        who: the plugin, and its function that is called.
        look: whether to look for changes, which takes a fraction of a millisecond.

    Warns:
        PluginWarning: names what was changed, the first time.

    Raises:
        PluginError: standard streams were closed and cannot be opened again.
    """
    watch, process = Watch(), os.getpid()
    # Other threads receive no signals, and the main thread may change all else meanwhile, stdout included.
    is_main = threading.current_thread() is threading.main_thread()
    look = look and is_main
    before = _Before() if look else None
    try:
        with redirect_stdout(sys.stderr) if is_main else nullcontext():
            yield watch
    finally:
        if os.getpid() != process:  # a child that a plugin has forked must not go on with our work
            _end(70)
        if before is not None:
            watch.changed = tuple(dict.fromkeys(before.put_back(watch.environ)))
        if watch.changed:
            what = one_line(", ".join(watch.changed))
            if before is not None and before.lost:
                raise PluginError(f"{who} has closed {what}, which cannot be opened again")
            told = f"{one_line(who)} has changed {what}, which is put back"
            if told not in _told:
                _told.add(told)
                warnings.warn(told, PluginWarning, 1)


class _Before:
    """The state of the process when it is made.

    Attributes:
        lost: whether something could not be put back.
    """

    lost = False

    def __init__(self) -> None:
        self._folder = _working_folder()
        self._umask = _umask()
        self._signal_changes, self._handlers = signals.changes(), {n: signal.getsignal(n) for n in _SIGNALS}
        self._timers = {which: signal.getitimer(which) for which in _TIMERS}
        self._recursion, self._collects = sys.getrecursionlimit(), gc.isenabled()
        self._locale = locale.setlocale(locale.LC_ALL)
        self._filters = list(warnings.filters)
        self._path, self._arguments = list(sys.path), list(sys.argv)
        self._streams = {name: getattr(sys, name) for name in _STREAMS}
        self._builtins = dict(vars(builtins))
        self._limits = {number: resource.getrlimit(number) for number in _LIMITS.values()}
        self._environ = dict(os.environ)
        self._floating = _numpy().geterr() if _numpy() else _UNTOUCHED
        self._modules = dict(sys.modules)
        self._files = {number: _file(number) for number in (0, 1, 2)}
        self._copies = {n: _copy(n) for n, file in self._files.items() if file is not None}

    def put_back(self, environ: bool) -> list[str]:
        """Put everything back; returns what had been changed, in words."""
        parts: list[Callable[[], Iterator[str]]] = [
            self._put_interpreter, self._put_files, self._put_places, self._put_handlers, self._put_path
        ]  # fmt: skip
        changed = [what for part in parts for what in part()]
        wanted = self._environ if environ else {**self._environ, **os.environ}
        if dict(os.environ) != wanted:
            os.environ.clear()
            os.environ.update(wanted)
            changed.append("environment variables")
        return changed

    def _put_files(self) -> Iterator[str]:
        """The standard streams, as descriptors and as objects."""
        for number, file in self._files.items():
            copy = self._copies.get(number)
            if file is not None and _file(number) != file:
                if copy is not None and _file(copy) == file:
                    os.dup2(copy, number, inheritable=True)
                else:
                    os.dup2(os.open(os.devnull, os.O_RDWR), number, inheritable=True)
                    self.lost = True
                yield _STREAMS[number]
            if copy is not None and _file(copy) == file:
                os.close(copy)
        for name, stream in self._streams.items():
            if getattr(sys, name) is not stream:
                setattr(sys, name, stream)
                yield f"sys.{name}"

    def _put_places(self) -> Iterator[str]:
        """The working folder, the umask, and limits that were lowered."""
        if _working_folder() != self._folder and self._folder is not None:
            with suppress(OSError):
                os.chdir(self._folder)
            yield "the working folder"
        if _umask() != self._umask:
            os.umask(self._umask)
            yield "the umask"
        for name, number in _LIMITS.items():
            (soft, hard), (old, _) = resource.getrlimit(number), self._limits[number]
            if _height(soft) < _height(old):
                with suppress(OSError, ValueError):
                    resource.setrlimit(number, (min(old, hard, key=_height), hard))
                yield name

    def _put_handlers(self) -> Iterator[str]:
        """Signal handlers and timers."""
        # A signal that comes in the block changes handlers too, and should.
        ours = signals.changes() != self._signal_changes
        for number, handler in () if ours else self._handlers.items():
            if signal.getsignal(number) is not handler and handler is not None:
                signal.signal(number, handler)
                yield f"the handler of {signal.Signals(number).name}"
        for which, timer in self._timers.items():
            if (signal.getitimer(which)[0] > 0) != (timer[0] > 0):
                signal.setitimer(which, *timer)
                yield f"the {_TIMERS[which]} timer"

    def _put_interpreter(self) -> Iterator[str]:
        """Modules that were removed, and settings of Python and its libraries."""
        if self._modules.keys() - sys.modules.keys():
            sys.modules.update(self._modules)
            yield "sys.modules"
        if sys.getrecursionlimit() != self._recursion:
            sys.setrecursionlimit(self._recursion)
            yield "the recursion limit"
        if gc.isenabled() != self._collects:
            (gc.enable if self._collects else gc.disable)()
            yield "garbage collection"
        if locale.setlocale(locale.LC_ALL) != self._locale:
            locale.setlocale(locale.LC_ALL, self._locale)
            yield "the locale"
        if _numpy() and _numpy().geterr() != self._floating:
            _numpy().seterr(**self._floating)
            yield "numpy's error handling"
        for name, value in self._builtins.items():
            if name != "_" and vars(builtins).get(name) is not value:
                setattr(builtins, name, value)
                yield f"builtins.{name}"
        yield from self._put_filters()

    def _put_filters(self) -> Iterator[str]:
        """Warning filters; new ones for particular warnings, as libraries set them, may stay."""
        new = [one for one in warnings.filters if one not in self._filters and not _silences_all(one)]
        wanted = [*new, *self._filters]
        if len(wanted) != len(warnings.filters):
            warnings.resetwarnings()
            filters: list[Any] = warnings.filters  # type: ignore[assignment]  # typeshed: a sequence
            filters[:] = wanted
            yield "warning filters"

    def _put_path(self) -> Iterator[str]:
        """``sys.path``, where additions stay, but after the old entries; and ``sys.argv``."""
        wanted = [*self._path, *(entry for entry in sys.path if entry not in self._path)]
        if sys.path != wanted:
            sys.path[:] = wanted
            yield "sys.path"
        if sys.argv != self._arguments:
            sys.argv[:] = self._arguments
            yield "sys.argv"


# --- what ends the process ----------------------------------------------------


def refuse_endings(is_foreign: Callable[[str], bool]) -> None:
    """From now on, functions that end the process raise :class:`ProcessEnded` when a plugin calls them.

    Args:
        is_foreign: whether a source file belongs to a third-party plugin.
    """
    import posix

    for module in (os, posix):
        for name in ("_exit", "abort", "execv", "execve"):
            known = getattr(module, name)
            real = getattr(known, "real", known)
            setattr(module, name, _refusing(name, real, is_foreign))


def _refusing(name: str, real: Callable[..., Any], is_foreign: Callable[[str], bool]) -> Callable[..., Any]:
    owner = os.getpid()

    def call(*arguments: Any, **named: Any) -> Any:
        files = _calling_files()
        if os.getpid() != owner or not any(map(is_foreign, files)):  # a forked child may end itself
            return real(*arguments, **named)
        if any(file.startswith(_CORE) for file in files):
            raise ProcessEnded(f"os.{name}({', '.join(map(repr, arguments))})")
        return None  # called at interpreter exit, with no caller left to raise to

    call.real = real  # type: ignore[attr-defined]  # so that it is wrapped once
    return call


def _calling_files() -> list[str]:
    """The source files of all functions on the call stack, except this one."""
    files = []
    caller: FrameType | None = sys._getframe(2)
    while caller is not None:
        files.append(caller.f_code.co_filename)
        caller = caller.f_back
    return files


# --- reading ------------------------------------------------------------------


def _working_folder() -> str | None:
    """The working folder; None if it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _file(number: int) -> tuple[int, int] | None:
    """The device and inode of an open descriptor; None if it is closed."""
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _copy(number: int) -> int | None:
    """A duplicate of a descriptor, with a number as high as the limits allow."""
    for lowest in _HIGH:
        with suppress(OSError, ValueError):
            return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, lowest)
    return None


def _silences_all(one: Any) -> bool:
    """Whether a warning filter applies to every warning."""
    _, message, category, module, _ = one
    return message is None and module is None and category is Warning


def _height(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def _numpy() -> Any:
    """numpy, if it has been imported."""
    return sys.modules.get("numpy")
