"""The ``cblas_sgemm`` of sgemm.c, which stands between MLX and a BLAS, and the exponential that it brings.

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

#: where the library is, if it was built
LIBRARY = Path(__file__).with_name("libmlxlora_sgemm.so")

_SOURCE = Path(__file__).with_name("sgemm.c")

#: as many numbers as MLX can give to one product
_MOST = 2**31 - 1


def open_library() -> ctypes.CDLL:
    """The library, with ``mlxlora_use`` and ``mlxlora_cblas_sgemm``.

    Raises:
        ResourceError: there is none, it is for another machine, or it was built from another sgemm.c.
    """
    if not LIBRARY.exists():
        raise ResourceError("there was no working C compiler when mlxlora was installed")
    try:
        library = ctypes.CDLL(str(LIBRARY))
        built_from = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "mlxlora_source")))
    except (OSError, ValueError) as fault:
        raise ResourceError(str(fault)) from fault
    if built_from.decode() != hashlib.sha256(_SOURCE.read_bytes()).hexdigest():
        raise ResourceError("it was built from another sgemm.c", where=str(LIBRARY))
    return library


def put_before(library: ctypes.CDLL, functions: Mapping[str, int], *, vectors: bool) -> dict[str, int]:
    """The functions of a BLAS, name -> address, with the ``cblas_sgemm`` of sgemm.c in front of its own.

    Args:
        library: as :func:`open_library` gives it.
        functions: with ``cblas_sgemm``.
        vectors: whether products of one row or one column go to ``cblas_sgemv``.
    """
    token = np.array(_token(), copy=False).ctypes.data
    sgemv = functions[SGEMV] if vectors else None
    library.mlxlora_use(*map(ctypes.c_void_p, (functions[SGEMM], sgemv, token)))
    return {**functions, SGEMM: ctypes.cast(library.mlxlora_cblas_sgemm, ctypes.c_void_p).value or 0}


def exp(x: mx.array) -> mx.array:
    """``exp(x)`` of float32 of any shape, to 1.2 units in the last place; without a gradient.

    Only where MLX calls the ``cblas_sgemm`` of :func:`put_before`.
    """
    if x.size > _MOST:
        return mx.exp(x)
    return (x.reshape(-1, 1) @ _token()).reshape(x.shape)


@cache
def _token() -> mx.array:
    """The array that stands for the exponential where a column is multiplied by it: sgemm.c says how."""
    token = mx.full((1, 1), math.nan)
    mx.eval(token)
    return token
