"""Runtime ``openblas``: a fast BLAS under MLX's CPU backend on Linux.

The CPU backend of MLX's Linux wheels multiplies matrices with Netlib's
reference BLAS, 30 to 80 times slower than the machine can. This runtime points
the calls at OpenBLAS, checks the results, and takes it back on any doubt.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlxlora_core.api import Runtime, RuntimeStarted, hookimpl


@hookimpl
def mlxlora_runtimes() -> Iterable[Runtime]:
    """The one runtime of this plugin."""
    return [Runtime(name="openblas", summary="a fast BLAS under MLX's CPU backend on Linux", start=_start)]


def _start() -> RuntimeStarted | None:
    from mlxlora_openblas.runtime import start

    return start()
