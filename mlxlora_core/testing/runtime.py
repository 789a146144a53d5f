"""The conformance suite of runtimes.

Subclass :class:`RuntimeSuite` in a test file and run it with pytest::

    class TestMyRuntime(RuntimeSuite):
        spec = my_plugin.RUNTIME
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from typing import IO, Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.errors import one_line
from mlxlora_core.plugins.surroundings import PluginWarning, kept
from mlxlora_core.runtime_started import RuntimeStarted
from mlxlora_core.specs import Runtime

ROWS, COLUMNS = 33, 130


class RuntimeSuite:
    """What every runtime must do. It is started once for all tests, as it is once a process.

    Attributes:
        spec: the runtime.
    """

    spec: Runtime

    # --- what the tests are made of ---

    def started(self) -> RuntimeStarted | None:
        """What the runtime has to say."""
        return _started(self.spec).note

    def handed(self, name: str) -> Any:
        """A function that it hands over; the test ends where there is none."""
        function = getattr(self.started(), name, None)
        if function is None:
            pytest.skip(f"it hands over no {name} here")
        return function

    # --- the tests ---

    def test_says_one_line_or_nothing(self) -> None:
        """It starts, and says in one line what is in force, or gives None where it has no business."""
        note: Any = self.started()
        assert isinstance(note, RuntimeStarted | None)
        if note is not None:
            assert note.text.strip()
            assert one_line(note.text) == note.text
            assert one_line(note.advice) == note.advice

    def test_leaves_the_surroundings_as_they_were(self) -> None:
        """It prints nothing where results go, and changes nothing of the process but how MLX computes."""
        assert _started(self.spec).printed == ""
        assert _started(self.spec).changed == ()
        assert not _started(self.spec).drawn, "other numbers are drawn at random after it"

    def test_results_stay_what_they_are(self) -> None:
        """With it, matrix products and sums are those of numpy up to rounding."""
        self.started()
        draw = np.random.default_rng(0)
        for rows, inner, columns in ((1, 64, 130), (33, 130, 1), (65, 130, 67)):
            a, b = draw.normal(size=(rows, inner)), draw.normal(size=(inner, columns))
            got = np.array(_float32(a) @ _float32(b))
            assert _apart(got, a @ b) <= 1e-4
        x = draw.normal(size=(ROWS, COLUMNS))
        assert _apart(np.array(mx.exp(_float32(x)).sum(axis=-1)), np.exp(x).sum(axis=-1)) <= 1e-3

    def test_its_exponential_is_one(self) -> None:
        """``exp``, where there is one, is that of numpy."""
        x = _numbers()
        assert _apart(np.array(self.handed("exp")(_float32(x))), np.exp(x)) <= 1e-4

    def test_its_log_softmax_is_one(self) -> None:
        """``log_softmax``, where there is one, is that of numpy."""
        x = _numbers()
        want = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
        assert _apart(np.array(self.handed("log_softmax")(_float32(x))), want) <= 1e-4

    def test_its_scaled_exponential_is_one(self) -> None:
        """``scaled_exp``, where there is one, is the factor times the exponential."""
        x, factors = _numbers(), np.linspace(0.5, 2, ROWS)[:, None]
        got = np.array(self.handed("scaled_exp")(_float32(x), _float32(factors)))
        assert _apart(got, factors * np.exp(x)) <= 1e-4

    def test_any_number_of_threads_gives_the_same(self) -> None:
        """``set_threads``, where there is one, takes numbers from 1 on; products stay right."""
        set_threads = self.handed("set_threads")
        count = os.cpu_count() or 1
        x = _numbers()
        try:
            for threads in (1, count):
                set_threads(threads)
                assert _apart(np.array(_float32(x) @ _float32(x.T)), x @ x.T) <= 1e-3
        finally:
            set_threads(count)


class _Start:
    """A runtime that is started when this is made.

    Attributes:
        note: what it gave.
        printed: what it has printed on standard output, by Python or past it.
        changed: what of the process it has changed, in words.
        drawn: whether MLX draws other numbers at random after it.
    """

    def __init__(self, spec: Runtime) -> None:
        mx.random.seed(11)
        before = _drawn()
        mx.random.seed(11)
        with warnings.catch_warnings(), tempfile.TemporaryFile() as held, _standard_output(held):
            warnings.simplefilter("ignore", PluginWarning)
            with kept(f"runtime {spec.name}") as watch, contextlib.redirect_stdout(io.StringIO()) as out:
                self.note = spec.start()
            os.lseek(held.fileno(), 0, os.SEEK_SET)
            self.printed = out.getvalue() + held.read().decode("utf-8", "replace")
        self.changed = watch.changed
        self.drawn = _drawn() != before


@contextlib.contextmanager
def _standard_output(file: IO[bytes]) -> Iterator[None]:
    """Inside, what is written to descriptor 1 goes to a file."""
    real = os.dup(1)
    os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(real, 1)
        os.close(real)


def _drawn() -> list[float]:
    found: list[float] = mx.random.normal((4,)).tolist()  # type: ignore[assignment]
    return found


_started = cache(_Start)


def _numbers() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, COLUMNS))


def _float32(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))


def _apart(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, relative where numbers are large."""
    return float((np.abs(got - want) / np.maximum(1, np.abs(want))).max())
