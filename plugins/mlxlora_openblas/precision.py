"""The precision of large matrix products: float32, or bfloat16 by the tiles of AMX (amx.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial

from mlxlora_core.api import ResourceError

#: how many bfloat16 stand for a number; 0 keeps the number itself
PARTS = {"float32": 0, "bfloat16": 1, "bfloat16x3": 2}

#: the error from rounding both operands, beyond float32's own bound, which two parts stay within
ROUNDING = {"bfloat16": 2.0**-8 + 2.0**-18, "bfloat16x3": 0.0}


def setter(library: ctypes.CDLL) -> Callable[[str], None] | None:
    """The ``set_precision`` of a runtime; None if the processor or the compiler does not support tiles.

    Args:
        library: from :func:`mlxlora_openblas.sgemm.open_library`, already called by MLX.
    """
    return partial(_set, library) if library.mlxlora_has_tiles() else None


def _set(library: ctypes.CDLL, compute: str) -> None:
    """Set the precision of large products; one other than float32 is checked when it is first used.

    Raises:
        ResourceError: the system does not let this process use tiles, or they compute wrong products.
    """
    if not library.mlxlora_set_parts(ctypes.c_int(PARTS[compute])):
        raise ResourceError(
            f"compute is {compute}, and the system does not let this process use AMX",
            fix="leave compute at float32",
        )
    wrong = _faults(compute) if PARTS[compute] else ()
    if wrong:
        library.mlxlora_set_parts(ctypes.c_int(0))
        raise ResourceError(
            f"compute is {compute}, and this processor gets {len(wrong)} products wrong, such as {wrong[0]}",
            fix="leave compute at float32",
        )


@cache
def _faults(compute: str) -> tuple[str, ...]:
    """The products that are wrong in the precision that is set now, in words."""
    from mlxlora_openblas.check import large_faults

    return tuple(large_faults(ROUNDING[compute]))
