"""The library in C that stands between MLX and a BLAS: its ``cblas_sgemm``, its threads, its exponential.

The library is built when mlxlora is installed (``hatch_build.py``), where there is a C compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxlora_core.api import ResourceError

SGEMM, SGEMV = "cblas_sgemm", "cblas_sgemv"

#: the library, if it was built
LIBRARY = Path(__file__).with_name("libmlxlora_sgemm.so")

_SOURCES = Path(__file__).parent

#: the most numbers that MLX can pass to one product
MOST = 2**31 - 1


def open_library() -> ctypes.CDLL:
    """The library, with ``mlxlora_use`` and ``mlxlora_cblas_sgemm``.

    Raises:
        ResourceError: it was not built, is for another machine, or was built from other C files.
    """
    if not LIBRARY.exists():
        raise ResourceError("there was no working C compiler when mlxlora was installed")
    try:
        library = ctypes.CDLL(str(LIBRARY))
        built_from = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "mlxlora_source")))
    except (OSError, ValueError) as fault:
        raise ResourceError(str(fault)) from fault
    if built_from.decode() != _digest(_SOURCES):
        raise ResourceError("it was built from other C files", where=str(LIBRARY))
    return library


def _digest(folder: Path) -> str:
    """The digest of all C files and headers in ``folder``, as hatch_build.py computes it."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.c"), *folder.glob("*.h")]):
        found.update(path.read_bytes())
    return found.hexdigest()


def put_before(library: ctypes.CDLL, functions: Mapping[str, int], *, vectors: bool) -> dict[str, int]:
    """The functions of a BLAS, name -> address, with the ``cblas_sgemm`` of sgemm.c in place of its own.

    Args:
        library: from :func:`open_library`.
        functions: including ``cblas_sgemm``; they must use one thread if the pool is to use several.
        vectors: whether products of one row or one column go to ``cblas_sgemv``.
    """
    token = np.array(_token(), copy=False).ctypes.data
    sgemv = functions[SGEMV] if vectors else None
    library.mlxlora_use(*map(ctypes.c_void_p, (functions[SGEMM], sgemv, token)))
    return {**functions, SGEMM: ctypes.cast(library.mlxlora_cblas_sgemm, ctypes.c_void_p).value or 0}


def exp(x: mx.array) -> mx.array:
    """``exp(x)`` of float32 of any shape, to 1.2 units in the last place, without a gradient.

    It works only while MLX calls the ``cblas_sgemm`` of :func:`put_before`.
    """
    if x.size > MOST:
        return mx.exp(x)
    return (x.reshape(-1, 1) @ _token()).reshape(x.shape)


def set_threads(library: ctypes.CDLL, count: int) -> None:
    """Set how many of the library's own threads a product uses."""
    library.mlxlora_set_threads(ctypes.c_int(count))


@cache
def _token() -> mx.array:
    """The array by which a column is multiplied to get its exponential; see sgemm.c."""
    token = mx.full((1, 1), math.nan)
    mx.eval(token)
    return token
