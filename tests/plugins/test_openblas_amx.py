"""amx.c: products of float32 made of bfloat16 by tiles, against numpy in double precision."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlxlora_openblas import check, precision, sgemm
from mlxlora_openblas.blas import load
from mlxlora_openblas.check import _SGEMM

from mlxlora_core.errors import ResourceError

PLAIN, TRANSPOSED = 111, 112
Array = np.ndarray[Any, Any]

#: share of the sum of absolute values that an entry may be off by, by parts
BOUNDS = {1: precision.ROUNDING["bfloat16"], 2: 3 * 2.0**-18}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, compile_sgemm: Callable[..., Path]) -> Path:
    """The library in C, where there are tiles for it."""
    path = compile_sgemm(tmp_path_factory.mktemp("amx"))
    if not ctypes.CDLL(str(path)).mlxlora_has_tiles():
        pytest.skip("needs Linux on a processor with AMX (amx_bf16 in /proc/cpuinfo) and gcc 11 or clang 12")
    return path


@pytest.fixture
def library(built: Path) -> ctypes.CDLL:
    """The library, before an OpenBLAS of one thread."""
    import scipy_openblas32

    found = ctypes.CDLL(str(built))
    path = next(Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas*.so"))
    sgemm.put_before(found, load(str(path), 1).functions, vectors=False)
    return found


def multiply(library: ctypes.CDLL, a: Array, b: Array, c: Array, alpha: float = 1, beta: float = 0) -> None:
    """``c = alpha a @ b + beta c`` by the library, as numpy says that the arrays are stored."""
    product = _SGEMM(ctypes.cast(library.mlxlora_cblas_sgemm, ctypes.c_void_p).value or 0)
    check._multiply(product, a, b, c, alpha, beta)


def made(library: ctypes.CDLL, parts: int, a: Array, b: Array) -> Array:
    """``a @ b`` with so many bfloat16 for a number."""
    assert library.mlxlora_set_parts(parts)
    c = np.full((a.shape[0], b.shape[1]), np.nan, np.float32)
    multiply(library, a, b, c)
    return c


def drawn(rows: int, columns: int, seed: int, transposed: bool = False, more: int = 0) -> Array:
    """A matrix of normal numbers, in rows or columns with so many numbers between them."""
    sides = (columns, rows) if transposed else (rows, columns)
    stored = np.random.default_rng(seed).standard_normal((sides[0], sides[1] + more)).astype(np.float32)
    cut = stored[:, : sides[1]]
    return cut.T if transposed else cut


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_products_keep_within_their_bound_and_touch_nothing_else(
    library: ctypes.CDLL, parts: int, a_transposed: bool, b_transposed: bool
) -> None:
    """Sides that fill tiles and panels and that do not; terms of one block and of several, odd and even."""
    assert library.mlxlora_set_parts(parts)
    sizes = [*itertools.product((32, 47, 65), (32, 300), (128, 159)), (1090, 33, 130), (40, 70, 2117)]
    for (m, n, k), (alpha, beta, more) in itertools.product(
        sizes, ((1.0, 0.0, 0), (-0.5, 0.0, 5), (1.0, 1.0, 0), (1.5, -2.0, 5))
    ):
        a, b = drawn(m, k, 0, a_transposed, more), drawn(k, n, 1, b_transposed, more)
        stored = drawn(m + 1, n + more, 2)
        got = stored.copy()
        multiply(library, a, b, got[:m, :n], alpha, beta)
        wide, size = a.astype(np.float64) @ b, np.abs(a).astype(np.float64) @ np.abs(b)
        exact = alpha * wide + beta * stored[:m, :n]
        bound = BOUNDS[parts] * abs(alpha) * size + 2.0**-20 * (np.abs(beta * stored[:m, :n]) + size)
        assert np.all(np.abs(got[:m, :n] - exact) <= bound), (m, n, k, alpha, beta, more)
        got[:m, :n] = stored[:m, :n]
        np.testing.assert_array_equal(got, stored)


def test_the_error_beside_that_of_float32_is_as_the_docs_say(library: ctypes.CDLL) -> None:
    a, b = drawn(512, 768, 3), drawn(768, 640, 4, transposed=True)
    exact = a.astype(np.float64) @ b
    rms = [
        float(np.sqrt(np.mean((made(library, p, a, b) - exact) ** 2) / np.mean(exact**2))) for p in range(3)
    ]
    assert rms[0] < 6e-7
    assert 1e-3 < rms[1] < 3e-3
    assert rms[2] < 6e-6
    bound = (768 + 4) * 2.0**-23 * (np.abs(a).astype(np.float64) @ np.abs(b))
    assert np.all(np.abs(made(library, 2, a, b) - exact) <= bound)  # what check.py asks of float32 itself


@pytest.mark.parametrize(("m", "n", "k"), [(31, 64, 256), (64, 31, 256), (64, 64, 127)])
def test_small_products_stay_float32(library: ctypes.CDLL, m: int, n: int, k: int) -> None:
    a, b = drawn(m, k, 5), drawn(k, n, 6)
    np.testing.assert_array_equal(made(library, 1, a, b), made(library, 0, a, b))
    larger = drawn(m + 1, k + 1, 5), drawn(k + 1, n + 1, 6)
    assert np.any(made(library, 1, *larger) != made(library, 0, *larger))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan, 3.4e38])
def test_what_bfloat16_cannot_hold_is_multiplied_as_ever(
    library: ctypes.CDLL, parts: int, beta: float, number: float
) -> None:
    """inf times 0.999 is inf, which the parts of it would make NaN of."""
    for side, place in ((0, (3, 130)), (1, (64, 46))):
        operands = drawn(40, 131, 7), drawn(131, 47, 8, transposed=True)
        operands[side][place] = number
        c = drawn(40, 47, 9)
        with np.errstate(invalid="ignore", over="ignore"):
            results = []
            for p in (parts, 0):
                assert library.mlxlora_set_parts(p)
                results.append(c.copy())
                multiply(library, *operands, results[-1], 1.0, beta)
        np.testing.assert_array_equal(*results)
        assert number == 3.4e38 or not np.isfinite(results[0]).all()


@pytest.mark.parametrize("parts", [1, 2])
def test_the_bits_are_the_same_whoever_computes_them(library: ctypes.CDLL, parts: int) -> None:
    """With one thread and three, again, and by threads side by side whose products differ in size."""
    pairs = [
        (drawn(m, k, m), drawn(k, n, n, True)) for m, n, k in ((97, 530, 300), (512, 256, 768), (40, 40, 140))
    ]
    sgemm.set_threads(library, 1)
    alone = [made(library, parts, a, b) for a, b in pairs]
    for threads in (1, 3):
        sgemm.set_threads(library, threads)
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda i: made(library, parts, *pairs[i % 3]), range(30)))
        for i, got in enumerate(found):
            np.testing.assert_array_equal(got, alone[i % 3])
    sgemm.set_threads(library, 1)


def test_threads_that_end_give_back_their_memory(library: ctypes.CDLL) -> None:
    a, b = drawn(1000, 2000, 0), drawn(2000, 64, 1)

    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGESIZE")

    after = []
    for _ in range(24):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(made, library, 2, a, b).result()
        after.append(held())
    assert after[-1] - after[3] < 20 * a.nbytes / 2  # were all of it held, it would be twice that


def test_a_build_for_any_processor_has_no_tiles(tmp_path: Path, compile_sgemm: Callable[..., Path]) -> None:
    library = ctypes.CDLL(str(compile_sgemm(tmp_path, "-DPORTABLE")))
    assert not library.mlxlora_has_tiles() and not library.mlxlora_set_parts(1)
    assert library.mlxlora_set_parts(0)
    assert precision.setter(library) is None


def test_tiles_that_are_refused_or_wrong_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Library:
        refuses = True

        def mlxlora_has_tiles(self) -> int:
            return 1

        def mlxlora_set_parts(self, parts: ctypes.c_int) -> int:
            asked.append(parts.value)
            return not (self.refuses and parts.value)

    stand_in: Any = Library()
    set_precision = precision.setter(stand_in)
    assert set_precision is not None
    with pytest.raises(ResourceError, match="the system does not let this process use AMX"):
        set_precision("bfloat16")
    stand_in.refuses = False
    monkeypatch.setattr(check, "large_faults", lambda rounding: ["a @ b"])
    precision._faults.cache_clear()
    with pytest.raises(ResourceError, match="gets 1 products wrong, such as a @ b"):
        set_precision("bfloat16x3")
    assert asked == [1, 2, 0]
    precision._faults.cache_clear()


# --- under MLX --------------------------------------------------------------------

TRAINING = """
import json, pathlib, sys
import mlxlora_openblas.sgemm as m
m.LIBRARY = pathlib.Path({library!r})
import mlx.core as mx
import numpy as np
import torch
from mlxlora_core.machine.device import product_precision
from mlxlora_core.plugins import load, start_runtimes
start_runtimes(load(environ={{"MLXLORA_PLUGINS": ""}}))
rng = np.random.default_rng(0)
width, rank, rows = 256, 8, 512
x, target = (rng.standard_normal((rows, width)).astype(np.float32) for _ in range(2))
base = [(rng.standard_normal((width, width)) / 16).astype(np.float32) for _ in range(3)]
start = [(rng.standard_normal((rank, width)) / 16).astype(np.float32), np.zeros((width, rank), np.float32)]
start[1] += rng.standard_normal((width, rank)).astype(np.float32) / 50

def loss(a, b, one=mx.array):
    h = one(x)
    for w in base:
        h = h @ one(w).T + (h @ a.T) @ b.T
        h = h * (h > 0)
    return ((h - one(target)) ** 2).mean()

def curve(compute):
    a, b = map(mx.array, start)
    seen, gradient = [], None
    with product_precision(compute):
        for _ in range(40):
            value, grads = mx.value_and_grad(loss, argnums=(0, 1))(a, b)
            mx.eval(value, grads)
            gradient = gradient or [np.array(g, dtype=float) for g in grads]
            seen.append(value.item())
            a, b = a - 0.3 * grads[0], b - 0.3 * grads[1]
    return seen, gradient

tensors = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in start]
loss(*tensors, one=lambda t: torch.tensor(t, dtype=torch.float64)).backward()
exact = [t.grad.numpy() for t in tensors]
found = {{}}
for compute in ("float32", "bfloat16x3", "bfloat16"):
    seen, gradient = curve(compute)
    off = max(float(np.linalg.norm(g - e) / np.linalg.norm(e)) for g, e in zip(gradient, exact))
    found[compute] = [seen, off, curve(compute)[0] == seen]
print(json.dumps(found))
"""


def test_a_training_with_each_follows_that_in_float32(built: Path) -> None:
    """Gradients of a LoRA against torch in double precision, and 40 steps of its loss, twice the same."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLXLORA_")}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING.format(library=str(built))], env=kept, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plain = np.array(found["float32"][0])
    assert plain[-1] < 0.95 * plain[0]
    for compute, gradient, loss in (
        ("float32", 2e-6, 0),
        ("bfloat16x3", 3e-5, 1e-5),
        ("bfloat16", 3e-2, 2e-3),
    ):
        seen, off, again = found[compute]
        apart = float(np.abs(np.array(seen) / plain - 1).max())
        assert off < gradient and apart <= loss and again, (compute, off, apart)
    assert found["bfloat16"][0] != found["float32"][0] != found["bfloat16x3"][0]
