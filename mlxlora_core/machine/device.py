"""The device that MLX computes on, and the faster functions that runtimes have lent it.

Half precision and packed weights are slow on a CPU, which is told apart here
and nowhere else. MLX is imported only where it is asked for.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from mlxlora_core.errors import UsageError
from mlxlora_core.machine.limits import exhausted
from mlxlora_core.machine.memory import free_memory_bytes, require_start
from mlxlora_core.machine.processors import thread_count

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxlora_core.values import PackedProduct

LARGEST_CACHE_BYTES = 4 * 2**30

# Parameters of mallopt, what they are set to, and the largest that the first takes.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_MMAP_BYTES, _TRIM_BYTES, _LARGEST_MMAP_BYTES = 1 << 20, 128 << 10, 32 << 20

#: environment variable of MLX: how wide a graph may be and still be ordered breadth first
ORDER_WIDTH = "MLX_BFS_MAX_WIDTH"

#: what large matrix products of float32 may be made of; the first is what they are made of by themselves
PRECISIONS = ("float32", "bfloat16x3", "bfloat16")

# Each sets how many threads a matrix product takes, as the runtimes gave them.
_setters: list[Callable[[int], None]] = []

# Each sets what large products are made of, as the runtimes gave them.
_precisions: list[Callable[[str], None]] = []

# What runtimes compute faster on the CPU, by the names that RuntimeStarted has for it.
_lent: dict[str, Callable[..., Any]] = {}


def on_cpu() -> bool:
    """Whether MLX computes on the CPU, where half precision and packed weights are slow."""
    import mlx.core as mx

    return mx.default_device().type == mx.DeviceType.cpu


def on_cuda() -> bool:
    """Whether MLX computes on an NVIDIA GPU."""
    import mlx.core as mx

    return not on_cpu() and mx.cuda.is_available()


def runs_ahead() -> bool:
    """Whether the host prepares what comes next while the device computes, and compiles what it repeats.

    A CPU is host and device in one, and gains nothing from either.
    """
    return not on_cpu()


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The type to compute in for weights of type ``stored``: float32 on a CPU, else the same."""
    import mlx.core as mx

    return mx.float32 if on_cpu() else stored


def prepare_device() -> None:
    """Set what the defaults of MLX have too low on the device that it computes on.

    Raises:
        UsageError: MLX has no backend here.
        ResourceError: this process may not take enough memory to load it.
    """
    prepare_cpu()
    keep_resident()


def keep_resident() -> None:
    """Let Metal keep as much in memory as the system recommends; it may page out a large model otherwise."""
    import mlx.core as mx

    if on_cpu() or not mx.metal.is_available():
        return
    with suppress(ValueError, RuntimeError):  # a system that lets nobody say so: macOS before 15
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))


def prepare_cpu() -> None:
    """Set what the defaults of MLX's CPU backend have too low; before anything is computed.

    It keeps 32 MB of freed memory, and pages fresh from the system cost more
    than the arithmetic on them: adding two arrays of 33 MB takes 5 times as
    long. And it orders the operations of streams fairly only in graphs at most 20
    wide: in a wider one, as a training step is, the second stream waits for the first.

    How much it keeps follows what this process may take. Work that has told how
    much it needs sets it anew.

    Raises:
        UsageError: MLX has no backend here.
        ResourceError: this process may not take enough memory to load it.
    """
    require_start()
    try:
        import mlx.core as mx
    except ImportError as fault:
        raise exhausted(fault) or UsageError(
            f"MLX cannot be used: {fault}",
            fix="pip install 'mlxlora[cpu]', or 'mlxlora[cuda13]' for an NVIDIA GPU",
        ) from fault
    if on_cpu():
        _give_back()
        mx.set_cache_limit(min((free_memory_bytes() or 0) // 8, LARGEST_CACHE_BYTES))
        os.environ.setdefault(ORDER_WIDTH, str(2**20))


def _give_back() -> None:
    """Let the C library give back at once what is freed in pieces above a megabyte, where it is glibc.

    Else it keeps up to 32 MB of each for itself, which no limit of MLX counts,
    and the process takes up to twice what MLX holds. Source: mallopt(3).
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)


@contextmanager
def memory_for_any_size(need: int) -> Iterator[None]:
    """Inside, what is freed is kept for arrays of any size, on a CPU where the C library is glibc.

    MLX reuses memory only for an array of nearly the same size, and each batch of rows of all lengths
    has others: steps then take a third of their time outside products for pages fresh from the system.
    So the C library keeps what work that needs ``need`` bytes frees, and MLX keeps half as much as else.
    """
    import mlx.core as mx

    library = ctypes.CDLL(None)
    if not on_cpu() or not hasattr(library, "mallopt"):
        yield
        return
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit // 2)
    library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_BYTES)
    library.mallopt(_TRIM_THRESHOLD, min(need, 2**31 - 1))
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
        library.mallopt(_TRIM_THRESHOLD, _TRIM_BYTES)
        mx.set_cache_limit(limit)
        library.malloc_trim(0)


def use_for_products(set_threads: Callable[[int], None]) -> None:
    """Let ``set_threads`` say how many threads a matrix product takes, from now on."""
    _setters.append(set_threads)


def products_have_threads() -> bool:
    """Whether a matrix product can use several threads, as a runtime has said."""
    return bool(_setters)


@contextmanager
def product_threads(count: int) -> Iterator[None]:
    """Inside, a matrix product takes ``count`` threads, where a runtime can set that; then all cores."""
    for set_threads in _setters:
        set_threads(count)
    try:
        yield
    finally:
        for set_threads in _setters:
            set_threads(thread_count())


def use_for_precision(set_precision: Callable[[str], None]) -> None:
    """Let ``set_precision`` say what large matrix products of float32 are made of, from now on."""
    _precisions.append(set_precision)


@contextmanager
def product_precision(compute: str) -> Iterator[None]:
    """Inside, large matrix products of float32 are made of ``compute``; then of float32 again.

    Args:
        compute: ``float32``; ``bfloat16``, which rounds each number of a product to one, or
            ``bfloat16x3``, which rounds it to the sum of two. Sums are float32 in either.

    Raises:
        UsageError: no runtime can do that here.
        ResourceError: the runtime that could fails.
    """
    if compute == PRECISIONS[0]:
        yield
        return
    if not _precisions:
        raise UsageError(
            f"compute is {compute}, for which this machine or this installation has no matrix products: they "
            "take Linux, a processor with AMX (amx_bf16 in /proc/cpuinfo), and a C compiler when mlxlora is "
            "installed",
            fix="leave compute at float32",
        )
    set_precision = _precisions[-1]
    set_precision(compute)
    try:
        yield
    finally:
        set_precision(PRECISIONS[0])


def lend(name: str, function: Callable[..., Any]) -> None:
    """Let ``function`` compute on the CPU what :class:`RuntimeStarted` says of ``name``, from now on."""
    _lent[name] = function


def lent(name: str) -> Callable[..., Any] | None:
    """The function of that name which the last runtime that has it has lent, or None."""
    return _lent.get(name)


def packed_product(
    words: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> PackedProduct | None:
    """Products in float32 with a weight as :func:`mlx.core.quantize` packs it.

    They have no gradient. None where no runtime has lent one, or it cannot take this weight.
    """
    make = lent("packed_product")
    return None if make is None else make(words, scales, biases, group_size=group_size, bits=bits)
