"""pool.c and split.c: products that threads share, straight from the library in C."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlxlora_openblas import sgemm
from mlxlora_openblas.blas import load
from mlxlora_openblas.check import _SGEMM

PLAIN, TRANSPOSED = 111, 112

#: m, k, n: split down, across and both ways, with a rest at the end, and one row or column
SIZES = ((700, 130, 1100), (1100, 130, 333), (64, 300, 2001), (2001, 300, 70), (1, 768, 2051), (2051, 768, 1))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, compile_sgemm: Callable[..., Path]) -> Path:
    return compile_sgemm(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def library(built: Path) -> ctypes.CDLL:
    """The library over scipy-openblas32 with one thread."""
    import scipy_openblas32

    path = next(Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas*.so"))
    found = ctypes.CDLL(str(built))
    sgemm.put_before(found, load(str(path), 1).functions, vectors=True)
    return found


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[int]:
    sgemm.set_threads(library, request.param)
    yield request.param
    sgemm.set_threads(library, 1)


def product(library: ctypes.CDLL, a: Any, b: Any, c: Any, trans_a: int, trans_b: int, beta: float) -> None:
    """``c = 0.5 op(a) @ op(b) + beta c``, each of them with steps wider than its rows."""
    m, n = c.shape
    k = a.shape[1] if trans_a == PLAIN else a.shape[0]
    _SGEMM(ctypes.cast(library.mlxlora_cblas_sgemm, ctypes.c_void_p).value or 0)(
        *(101, trans_a, trans_b, m, n, k, 0.5, a.ctypes.data, a.strides[0] // 4),
        *(b.ctypes.data, b.strides[0] // 4, beta, c.ctypes.data, c.strides[0] // 4),
    )


def operands(m: int, k: int, n: int, trans_a: int, trans_b: int, wider: int = 3) -> tuple[Any, Any]:
    rng = np.random.default_rng(m + n)
    shapes = ((m, k) if trans_a == PLAIN else (k, m)), ((k, n) if trans_b == PLAIN else (n, k))
    a, b = (rng.standard_normal((r, w + wider), dtype=np.float32)[:, :w] for r, w in shapes)
    return a, b


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("trans_a", "trans_b"), [(PLAIN, TRANSPOSED), (TRANSPOSED, PLAIN), (PLAIN, PLAIN)])
def test_shared_products_are_those_of_numpy_and_touch_nothing_else(
    library: ctypes.CDLL, threads: int, size: tuple[int, int, int], trans_a: int, trans_b: int
) -> None:
    m, k, n = size
    a, b = operands(m, k, n, trans_a, trans_b, 0 if 1 in (m, n) else 3)
    x, y = (
        s.astype(np.float64) if t == PLAIN else s.T.astype(np.float64)
        for s, t in ((a, trans_a), (b, trans_b))
    )
    for beta in (0.0, -2.0):
        whole = np.random.default_rng(5).standard_normal((m + 1, n + 4), dtype=np.float32)
        before = whole.copy()
        product(library, a, b, whole[:m, :n], trans_a, trans_b, beta)
        exact = 0.5 * (x @ y) + beta * before[:m, :n]
        bound = (k + 8) * 2.0**-23 * (np.abs(x) @ np.abs(y) + 2 * np.abs(before[:m, :n]))
        assert np.all(np.abs(whole[:m, :n] - exact) <= bound)
        whole[:m, :n] = before[:m, :n]
        np.testing.assert_array_equal(whole, before)


def test_the_same_bytes_come_every_time_whoever_does_which_part(library: ctypes.CDLL, threads: int) -> None:
    """Beside a thread that keeps a processor busy now and then, parts fall to others."""
    a, b = operands(300, 400, 900, PLAIN, TRANSPOSED)
    stop = threading.Event()

    def disturb() -> None:
        x = np.ones((400, 400))
        while not stop.wait(0.002):
            np.einsum("ij,jk->ik", x, x)

    neighbour = threading.Thread(target=disturb)
    neighbour.start()
    try:
        first, again = np.empty((300, 900), np.float32), np.empty((300, 900), np.float32)
        product(library, a, b, first, PLAIN, TRANSPOSED, 0.0)
        for _ in range(60):
            again[:] = np.nan
            product(library, a, b, again, PLAIN, TRANSPOSED, 0.0)
            assert again.tobytes() == first.tobytes()
    finally:
        stop.set()
        neighbour.join()


def test_callers_at_the_same_time_do_not_disturb_each_other(library: ctypes.CDLL, threads: int) -> None:
    pairs = [operands(m, k, n, PLAIN, TRANSPOSED, 0 if m == 1 else 3) for m, k, n in SIZES[:5]]
    alone = []
    for a, b in pairs:
        alone.append(np.empty((len(a), len(b)), np.float32))
        product(library, a, b, alone[-1], PLAIN, TRANSPOSED, 0.0)
    wrong = []

    def work(start: int) -> None:
        for i in range(start, start + 25):
            (a, b), want = pairs[i % 5], alone[i % 5]
            got = np.empty_like(want)
            product(library, a, b, got, PLAIN, TRANSPOSED, 0.0)
            if not np.array_equal(got, want):
                wrong.append(i)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_a_forked_child_has_threads_of_its_own_and_both_end(built: Path) -> None:
    """Products before the fork, then in the child and in the parent, and an end without a wait."""
    code = f"""
import ctypes, os, pathlib, sys, warnings
import numpy as np
sys.path.insert(0, {str(Path(__file__).parent)!r})
import scipy_openblas32
from mlxlora_openblas import sgemm
from mlxlora_openblas.blas import load
from test_openblas_pool import PLAIN, TRANSPOSED, operands, product
path = next(pathlib.Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas*.so"))
library = ctypes.CDLL({str(built)!r})
sgemm.put_before(library, load(str(path), 1).functions, vectors=True)
sgemm.set_threads(library, 3)
a, b = operands(300, 400, 900, PLAIN, TRANSPOSED)

def result():
    c = np.empty((300, 900), np.float32)
    product(library, a, b, c, PLAIN, TRANSPOSED, 0.0)
    return c.tobytes()

tasks = lambda: len(os.listdir("/proc/self/task"))
before, first = tasks(), result()
assert tasks() == before + 2
for _ in range(3):
    child = os.fork()
    if not child:
        alone = tasks()
        found = (result() == first, tasks() - alone)
        if found != (True, 2):
            print(found, alone, file=sys.stderr, flush=True)
        os._exit(found != (True, 2))
    assert result() == first
    assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_with_one_thread_a_product_goes_to_the_blas_as_it_comes(built: Path) -> None:
    """And with more, in parts that cover it once and do not depend on what else runs."""
    library = ctypes.CDLL(str(built))
    calls: list[tuple[int, int, int]] = []
    gemm = _SGEMM(lambda *a: calls.append((a[3], a[4], (a[12] or 0) - c.ctypes.data)))
    library.mlxlora_use(ctypes.cast(gemm, ctypes.c_void_p), None, None)
    a, b = operands(1000, 200, 700, PLAIN, TRANSPOSED)
    c = np.zeros((1000, 700), np.float32)
    product(library, a, b, c, PLAIN, TRANSPOSED, 0.0)
    assert calls == [(1000, 700, 0)]
    calls.clear()
    sgemm.set_threads(library, 2)
    product(library, a, b, c, PLAIN, TRANSPOSED, 0.0)
    assert len(calls) > 1
    for m, n, start in calls:
        row, column = divmod(start // 4, 700)
        c[row : row + m, column : column + n] += 1
    assert np.all(c == 1)
