"""Put a fast BLAS under MLX, check it, and say in one line what became of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache

from mlxlora_core.api import MlxloraError, ResourceError, RuntimeStarted, thread_count

_COST = (
    "a token of a reply takes 1.5 times as long, a prompt 1.3 times; "
    "install a C compiler (gcc or clang), then mlxlora again"
)


@cache
def start() -> RuntimeStarted | None:
    """Point MLX's matrix products at a fast BLAS; called again, it only repeats the note.

    Returns:
        What is in force, or as a warning why MLX stays as it was; nothing where
        MLX does not compute on a Linux CPU through a BLAS.
    """
    if not computes_on_cpu():
        return None
    try:
        return _start()
    except (MlxloraError, OSError, ValueError, RuntimeError) as fault:
        return RuntimeStarted(f"openblas: MLX's CPU backend stays as it was: {fault}", warning=True)


def computes_on_cpu() -> bool:
    """Whether this is Linux, and MLX is there and has nothing but a CPU to compute on."""
    if sys.platform != "linux":
        return False
    try:
        import mlx.core as mx
    except ImportError:  # whoever needs MLX will say what to install
        return False
    if mx.cuda.is_available() or mx.metal.is_available():
        return False
    return mx.default_device().type == mx.DeviceType.cpu


def _start() -> RuntimeStarted | None:
    """Point, check, and keep or put back.

    Raises:
        MlxloraError: no usable BLAS, or one that computes something else.
        OSError: the process may not be looked into or changed.
        ValueError: libmlx.so is not laid out as expected.
        RuntimeError: MLX refuses a product of the check.
    """
    from mlxlora_openblas.blas import open_blas
    from mlxlora_openblas.check import exponential_works, faults
    from mlxlora_openblas.sgemm import exp
    from mlxlora_openblas.slots import mlx_slots

    slots = mlx_slots()
    if not slots:
        return None
    blas = open_blas(thread_count())
    functions, said, advice = _with_c(blas.functions)
    before = {slot: slot.target for slot in slots if slot.function in functions}
    wrong = ["everything, until the check has ended"]
    try:
        for slot in before:
            slot.point_at(functions[slot.function])
        wrong = faults()
    finally:
        if wrong:
            for slot, target in before.items():
                slot.point_at(target)
    if wrong:
        raise ResourceError(
            f"{blas.title} gets {len(wrong)} products wrong, such as {wrong[0]}", where=blas.path
        )
    works = exponential_works(exp)
    if not works and not advice:
        said += "; exponentials stay with MLX, whose products are not what sgemm.c expects"
    return RuntimeStarted(
        f"openblas: {blas.title} under MLX's CPU backend{said}",
        set_threads=blas.set_threads,
        exp=exp if works else None,
        advice=advice,
    )


def _with_c(functions: Mapping[str, int]) -> tuple[dict[str, int], str, str]:
    """The functions of a BLAS with the faster ``cblas_sgemm``, what is to be said of it, and what to do."""
    from mlxlora_openblas import sgemm
    from mlxlora_openblas.check import vector_faults

    try:
        library = sgemm.open_library()
    except ResourceError as fault:
        return dict(functions), ", without sgemm.c", f"openblas: {fault}: {_COST}"
    vectors = sgemm.SGEMV in functions
    faster = sgemm.put_before(library, functions, vectors=vectors)
    wrong = vector_faults(faster[sgemm.SGEMM]) if vectors else []
    if not wrong:
        return faster, "", ""
    sgemm.put_before(library, functions, vectors=False)
    said = f"; its {sgemm.SGEMV} is left alone: {len(wrong)} products wrong, such as {wrong[0]}"
    return faster, said, ""
