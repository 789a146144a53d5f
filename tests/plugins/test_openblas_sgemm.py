"""sgemm.c: the ``cblas_sgemm`` between MLX and a BLAS, compiled by hatch_build.py, warnings as errors."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlxlora_openblas import sgemm
from mlxlora_openblas.blas import load
from mlxlora_openblas.check import _SGEMM, vector_faults

from mlxlora_core.errors import ResourceError

PLAIN, TRANSPOSED = 111, 112

_I, _F, _P = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
_SGEMV = ctypes.CFUNCTYPE(None, _I, _I, _I, _I, _F, _P, _I, _P, _I, _F, _P, _I)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, compile_sgemm: Callable[..., Path]) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_sgemm(tmp_path_factory.mktemp("sgemm"))))


@pytest.fixture(scope="module")
def functions() -> dict[str, int]:
    """Those of scipy-openblas32, with two threads."""
    import scipy_openblas32

    path = next(Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas*.so"))
    return dict(load(str(path), 2).functions)


# --- products ---------------------------------------------------------------------


@pytest.mark.parametrize("order", [101, 102])
@pytest.mark.parametrize("trans_a", [111, 112, 113])
@pytest.mark.parametrize("trans_b", [111, 112, 113])
def test_products_are_those_of_numpy_and_touch_nothing_else(
    library: ctypes.CDLL, functions: dict[str, int], order: int, trans_a: int, trans_b: int
) -> None:
    """Every side of length 1, 2 and more, with steps wider than the rows."""
    product = _SGEMM(sgemm.put_before(library, functions, vectors=True)["cblas_sgemm"])
    rng = np.random.default_rng(order + trans_a + trans_b)
    for m, n, k, alpha, beta, more in itertools.product(
        (1, 2, 150), (1, 2, 150), (0, 1, 70), (1.0, -0.5), (0.0, 2.0), (0, 3)
    ):
        rows = [(m, k), (k, n), (m, n)]  # as stored, row-major
        rows = [
            (b, a) if t != 111 else (a, b) for (a, b), t in zip(rows, (trans_a, trans_b, 111), strict=True)
        ]
        if order == 102:
            rows = [(b, a) for a, b in rows]
        a, b, c = (rng.standard_normal((r + 2, max(w, 1) + more)).astype(np.float32) for r, w in rows)
        got = c.copy()
        product(
            *(order, trans_a, trans_b, m, n, k, alpha, a.ctypes.data, a.shape[1]),
            *(b.ctypes.data, b.shape[1], beta, got.ctypes.data, got.shape[1]),
        )
        x, y, z = (s[:r, :w].astype(np.float64) for s, (r, w) in zip((a, b, c), rows, strict=True))
        if order == 102:
            x, y, z = x.T, y.T, z.T
        exact = alpha * ((x if trans_a == 111 else x.T) @ (y if trans_b == 111 else y.T)) + beta * z
        r, w = rows[2]
        inside = got[:r, :w].T if order == 102 else got[:r, :w]
        np.testing.assert_allclose(inside, exact, atol=1e-4)
        got[:r, :w] = c[:r, :w]
        np.testing.assert_array_equal(got, c)


@pytest.mark.parametrize(
    "rows, columns", [(60, 150), (97, 101), (768, 600), (601, 768), (2048, 768), (8192, 768)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_vectors_at_sizes_that_threads_share(
    library: ctypes.CDLL, functions: dict[str, int], rows: int, columns: int, threads: int
) -> None:
    """On both sides of 9,216 and 460,800 elements, from where OpenBLAS's sgemv takes threads."""
    import scipy_openblas32

    path = next(Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas*.so"))
    load(str(path), threads)
    product = _SGEMM(sgemm.put_before(library, functions, vectors=True)["cblas_sgemm"])
    rng = np.random.default_rng(rows)
    stored = rng.standard_normal((rows, columns + 5)).astype(np.float32)
    address, step, wide = stored.ctypes.data, stored.shape[1], stored[:, :columns].astype(np.float64)
    for matrix, trans in ((wide, PLAIN), (wide.T, TRANSPOSED)):
        m, k = matrix.shape
        x = rng.standard_normal(k).astype(np.float32)
        bound = (k + 4) * 2.0**-23 * (np.abs(matrix) @ np.abs(x))
        for alpha, beta in ((1.0, 0.0), (-0.5, 2.0)):
            y = rng.standard_normal((2, m)).astype(np.float32)
            exact = alpha * (matrix @ x) + beta * y[0]
            column, row = y[0].copy(), y[0].copy()
            product(
                101,
                trans,
                PLAIN,
                m,
                1,
                k,
                alpha,
                address,
                step,
                x.ctypes.data,
                1,
                beta,
                column.ctypes.data,
                1,
            )
            product(
                *(101, PLAIN, PLAIN + TRANSPOSED - trans, 1, m, k, alpha, x.ctypes.data, k, address, step),
                *(beta, row.ctypes.data, m),
            )
            for got in (column, row):
                assert np.all(np.abs(got - exact) <= bound + 2.0**-22 * np.abs(beta * y[0]))


Call = tuple[str, tuple[Any, ...]]


@pytest.fixture
def calls(library: ctypes.CDLL) -> Callable[..., list[Call]]:
    """What a product of (m, k) and (k, n) calls: the function, and its arguments without addresses."""

    def find(*arguments: Any, vectors: bool = True, token: int = 0) -> list[Call]:
        found: list[Call] = []
        gemm = _SGEMM(lambda *a: found.append(("gemm", (*a[:7], a[8], a[10], a[11], a[13]))))
        gemv = _SGEMV(lambda *a: found.append(("gemv", (*a[:5], a[6], a[8], a[9], a[11]))))
        addresses = [ctypes.cast(f, ctypes.c_void_p) for f in (gemm, gemv)]
        library.mlxlora_use(addresses[0], addresses[1] if vectors else None, ctypes.c_void_p(token))
        _SGEMM(ctypes.cast(library.mlxlora_cblas_sgemm, ctypes.c_void_p).value or 0)(*arguments)
        return found

    return find


def test_one_row_and_one_column_go_to_sgemv(calls: Callable[..., list[Call]]) -> None:
    numbers = np.zeros(100, np.float32).ctypes.data
    row = (101, PLAIN, PLAIN, 1, 5, 7, 2.0, numbers, 7, numbers, 5, 3.0, numbers, 5)
    assert calls(*row) == [("gemv", (101, TRANSPOSED, 7, 5, 2.0, 5, 1, 3.0, 1))]
    column = (101, PLAIN, PLAIN, 5, 1, 7, 2.0, numbers, 9, numbers, 1, 3.0, numbers, 4)
    assert calls(*column) == [("gemv", (101, PLAIN, 5, 7, 2.0, 9, 1, 3.0, 4))]
    for arguments in (row, column):
        assert [name for name, _ in calls(*arguments, vectors=False)] == ["gemm"]


@pytest.mark.parametrize(
    "arguments",
    [
        (102, PLAIN, PLAIN, 1, 5, 7, 7, 7),  # columns one after the other
        (101, PLAIN, PLAIN, 2, 5, 7, 7, 5),  # two rows
        (101, PLAIN, PLAIN, 1, 5, 0, 1, 5),  # a sum without terms
        (101, TRANSPOSED, PLAIN, 1, 5, 7, 3, 5),  # a row out of a larger matrix
        (101, PLAIN, PLAIN, 5, 1, 7, 7, 3),  # a column out of one
        (101, 113, PLAIN, 1, 5, 7, 1, 5),  # a transposition that MLX does not know
    ],
)
def test_all_else_goes_to_sgemm_as_it_is(
    calls: Callable[..., list[Call]], arguments: tuple[int, ...]
) -> None:
    order, trans_a, trans_b, m, n, k, lda, ldb = arguments
    numbers = np.zeros(100, np.float32).ctypes.data
    asked = (order, trans_a, trans_b, m, n, k, 2.0, numbers, lda, numbers, ldb, 3.0, numbers, 5)
    assert calls(*asked) == [("gemm", (order, trans_a, trans_b, m, n, k, 2.0, lda, ldb, 3.0, 5))]


def test_the_check_at_the_start_finds_nothing_wrong(library: ctypes.CDLL, functions: dict[str, int]) -> None:
    assert vector_faults(sgemm.put_before(library, functions, vectors=True)["cblas_sgemm"]) == []


# --- the exponential ---------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[(), ("-DAT_MOST_AVX2",), ("-DPORTABLE",)],
    ids=["as built", "avx2", "for any processor"],
)
def exp(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    compile_sgemm: Callable[..., Path],
) -> Callable[[Any], Any]:
    """The exponential of a float32 vector, through a product with the token."""
    library = ctypes.CDLL(str(compile_sgemm(tmp_path_factory.mktemp("exp"), *request.param)))
    token = np.full(1, np.nan, np.float32)
    refuse = _SGEMM(lambda *_: pytest.fail("no exponential"))

    def compute(x: Any) -> Any:
        y = np.full(x.size + 2, 7, np.float32)
        library.mlxlora_use(ctypes.cast(refuse, ctypes.c_void_p), None, ctypes.c_void_p(token.ctypes.data))
        product = _SGEMM(ctypes.cast(library.mlxlora_cblas_sgemm, ctypes.c_void_p).value or 0)
        ends = token.ctypes.data, 1, 0.0, y[1:].ctypes.data, 1
        product(101, PLAIN, PLAIN, x.size, 1, 1, 1.0, x.ctypes.data, 1, *ends)
        assert y[0] == y[-1] == 7  # nothing beside it is touched
        return y[1:-1]

    return compute


def test_exponentials_are_right_to_a_bit_over_all_floats(exp: Callable[[Any], Any]) -> None:
    """Every 997th float32 there is and a dense part of those whose exponential is one, against float64."""
    every = np.arange(0, 2**32, 997, dtype=np.uint64).astype(np.uint32).view(np.float32)
    dense = np.linspace(-104.5, 89, 3_000_001).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 88.72283, 88.72284], np.float32)
    for x in (every, dense, special):
        got = exp(x)
        known = ~np.isnan(x)
        assert np.isnan(got[~known]).all()
        with np.errstate(over="ignore", under="ignore"):
            exact = np.exp(x[known].astype(np.float64))
        largest = float(np.finfo(np.float32).max)
        beyond = exact >= largest * (1 + 2.0**-25)  # rounds to infinity
        assert np.isinf(got[known][beyond]).all() and (got[known][beyond] > 0).all()
        exact, got = exact[~beyond], got[known][~beyond].astype(np.float64)
        last_place = np.spacing(np.minimum(exact, largest).astype(np.float32)).astype(np.float64)
        assert np.all(np.abs(got - exact) <= 1.2 * last_place)
    assert list(exp(special[:4])) == [1, 1, np.inf, 0]


def test_exponentials_of_every_length_from_every_place(exp: Callable[[Any], Any]) -> None:
    numbers = np.random.default_rng(3).uniform(-20, 20, 400).astype(np.float32)
    for start, size in itertools.product(range(9), (*range(1, 70), 255, 256, 257)):
        x = numbers[start : start + size]
        np.testing.assert_allclose(exp(x), np.exp(x.astype(np.float64)), rtol=1.5e-7)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[(0, 102), (1, TRANSPOSED), (2, TRANSPOSED), (3, 0), (4, 2), (5, 0), (5, 2), (6, 2.0)],
        *[(8, 2), (9, 0), (10, 2), (11, 1.0), (13, 2)],
    ],
)
def test_a_product_with_the_token_that_differs_in_anything_is_a_product(
    calls: Callable[..., list[Call]], place: int, value: float
) -> None:
    token, x = np.full(4, np.nan, np.float32), np.zeros(16, np.float32)
    arguments = [
        101,
        PLAIN,
        PLAIN,
        3,
        1,
        1,
        1.0,
        x.ctypes.data,
        1,
        token.ctypes.data,
        1,
        0.0,
        x.ctypes.data,
        1,
    ]
    assert calls(*arguments, token=token.ctypes.data) == []
    arguments[place] = value if place != 9 else x.ctypes.data
    assert len(calls(*arguments, token=token.ctypes.data)) == 1


# --- the library ------------------------------------------------------------------


def test_no_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sgemm, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(ResourceError, match="there was no working C compiler when mlxlora was installed"):
        sgemm.open_library()


def test_a_library_for_another_machine_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compile_sgemm: Callable[..., Path]
) -> None:
    image = bytearray(compile_sgemm(tmp_path).read_bytes())
    image[18:20] = (8).to_bytes(2, "little")  # MIPS; elf(5), e_machine
    (tmp_path / "other.so").write_bytes(image)
    monkeypatch.setattr(sgemm, "LIBRARY", tmp_path / "other.so")
    with pytest.raises(ResourceError, match=r"other\.so"):
        sgemm.open_library()


def test_a_library_of_another_source_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compile_sgemm: Callable[..., Path]
) -> None:
    monkeypatch.setattr(sgemm, "LIBRARY", compile_sgemm(tmp_path))
    sgemm.open_library()
    for path in [*sgemm._SOURCES.glob("*.c"), *sgemm._SOURCES.glob("*.h")]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sgemm, "_SOURCES", tmp_path)
    sgemm.open_library()
    with (tmp_path / "products.h").open("a") as file:
        file.write("\n")
    with pytest.raises(ResourceError, match="it was built from other C files"):
        sgemm.open_library()
