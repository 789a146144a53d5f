"""Put a fast BLAS under MLX, check it, and say in one line what became of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from mlxlora_core.api import MlxloraError, ResourceError, RuntimeStarted, thread_count

if TYPE_CHECKING:
    from mlxlora_openblas.blas import Blas

_CORE = "OPENBLAS_CORETYPE"
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
    products = _products(blas)
    before = {slot: slot.target for slot in slots if slot.function in products.functions}
    wrong = ["everything, until the check has ended"]
    try:
        for slot in before:
            slot.point_at(products.functions[slot.function])
        wrong = faults()
    finally:
        if wrong:
            for slot, target in before.items():
                slot.point_at(target)
    if wrong:
        raise ResourceError(
            f"{blas.title} gets {len(wrong)} products wrong, such as {wrong[0]}", where=blas.path
        )
    works, said = exponential_works(exp), products.said
    special = _special() if works else {}
    if not works and not products.advice:
        said += "; exponentials stay with MLX, whose products are not what sgemm.c expects"
    return RuntimeStarted(
        f"openblas: {blas.title} under MLX's CPU backend{said}",
        set_threads=products.set_threads,
        exp=exp if works else None,
        set_precision=products.set_precision,
        **special,
        advice=products.advice or _held(blas),
        alternatives=_alternatives,
        prefer=_prefer,
    )


def _held(blas: Blas) -> str:
    """What to unset where the environment chooses the kernels of OpenBLAS."""
    core = os.environ.get(_CORE)
    if not core or not blas.title.startswith("OpenBLAS"):
        return ""
    return (
        f"openblas: {_CORE}={core} holds it to the kernels of that processor, which may be half as fast "
        "as those of this one: unset it, unless several processors have to compute the same bits"
    )


def _alternatives() -> list[dict[str, str]]:
    from mlxlora_openblas.blas import LIBRARY, alternatives

    return [{LIBRARY: path} for path in alternatives(1)]


def _prefer(variables: Mapping[str, str]) -> None:
    from mlxlora_openblas.blas import LIBRARY, candidates
    from mlxlora_openblas.fastest import remember

    remember(variables[LIBRARY], list(candidates()), thread_count())


def _special() -> dict[str, Any]:
    """What special.c computes right, by the names of :class:`RuntimeStarted`."""
    from mlxlora_openblas import special
    from mlxlora_openblas.check import exponentials_work, layers_work, packed_works, rows_work

    right: dict[str, Any] = {}
    if exponentials_work(special.exp_rows):
        right["exp_rows"] = special.exp_rows
    if rows_work(special.log_softmax, special.scaled_exp):
        right |= {"log_softmax": special.log_softmax, "scaled_exp": special.scaled_exp}
    if layers_work(special.LAYERS):
        right["layers"] = special.LAYERS
    if packed_works(special.packed_product):
        right["packed_product"] = special.packed_product
    return right


@dataclass(frozen=True)
class _Products:
    """What MLX is to call, and what is to be said of it.

    Attributes:
        functions: name -> address.
        set_threads: as of :class:`RuntimeStarted`.
        set_precision: likewise.
        said: to be added to what is in force.
        advice: what would make it faster.
    """

    functions: Mapping[str, int]
    set_threads: Callable[[int], None] | None
    set_precision: Callable[[str], None] | None = None
    said: str = ""
    advice: str = ""


def _products(blas: Blas) -> _Products:
    """The functions of a BLAS, with the ``cblas_sgemm`` in C before its own where there is that.

    The threads are those of the library in C then, where the BLAS can be held to one.
    """
    from mlxlora_openblas import precision, sgemm
    from mlxlora_openblas.check import vector_faults

    try:
        library = sgemm.open_library()
    except ResourceError as fault:
        advice = f"openblas: {fault}: {_COST}"
        return _Products(blas.functions, blas.set_threads, said=", without sgemm.c", advice=advice)
    set_threads = None
    if blas.set_threads is not None:
        blas.set_threads(1)
        set_threads = partial(sgemm.set_threads, library)
        set_threads(thread_count())
    vectors = sgemm.SGEMV in blas.functions
    faster = sgemm.put_before(library, blas.functions, vectors=vectors)
    wrong = vector_faults(faster[sgemm.SGEMM]) if vectors else []
    set_precision = precision.setter(library)
    if not wrong:
        return _Products(faster, set_threads, set_precision)
    sgemm.put_before(library, blas.functions, vectors=False)
    said = f"; its {sgemm.SGEMV} is left alone: {len(wrong)} products wrong, such as {wrong[0]}"
    return _Products(faster, set_threads, set_precision, said)
