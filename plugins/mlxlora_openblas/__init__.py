"""Runtimes ``openblas`` and ``guard``: a fast BLAS under MLX's CPU backend on Linux, and no crash under it.

The CPU backend of MLX's Linux wheels multiplies matrices with Netlib's
reference BLAS, 30 to 80 times slower than the machine can. This runtime points
the calls at OpenBLAS, checks the results, and takes it back on any doubt. And
where that backend gets no memory, it crashes; the guard ends the process with a
line and exit code 6 instead.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlxlora_core.api import Runtime, RuntimeStarted, hookimpl


@hookimpl
def mlxlora_runtimes() -> Iterable[Runtime]:
    """The runtimes of this plugin; the guard counts what the BLAS holds, and so comes last."""
    return [
        Runtime(name="openblas", summary="a fast BLAS under MLX's CPU backend on Linux", start=_start),
        Runtime(
            name="guard", summary="a line and exit code 6 where MLX would crash for memory", start=_guard
        ),
    ]


def _start() -> RuntimeStarted | None:
    from mlxlora_openblas.runtime import start

    return start()


def _guard() -> RuntimeStarted | None:
    from mlxlora_openblas.guard import start

    return start()
