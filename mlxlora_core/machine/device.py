"""The device that MLX computes on, and the faster functions that runtimes have lent it.

Half precision and packed weights are slow on a CPU; code that treats it differently asks here. MLX is
imported only inside the functions.
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

# Parameters of mallopt, the values that they get, and the largest value that the first accepts.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_MMAP_BYTES, _TRIM_BYTES, _LARGEST_MMAP_BYTES = 1 << 20, 128 << 10, 32 << 20

#: environment variable of MLX: up to which width a graph is ordered breadth first
ORDER_WIDTH = "MLX_BFS_MAX_WIDTH"

#: the precisions in which large matrix products of float32 may be computed; the first is the default
PRECISIONS = ("float32", "bfloat16x3", "bfloat16")

# Functions of the runtimes, each of which sets how many threads a matrix product takes.
_setters: list[Callable[[int], None]] = []

# Functions of the runtimes, each of which sets the precision of large products.
_precisions: list[Callable[[str], None]] = []

# Functions that runtimes have lent, under their names in RuntimeStarted.
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
    """Whether the host works ahead while the device computes, and compiles what repeats.

    On a CPU, host and device are the same, and neither gains anything.
    """
    return not on_cpu()


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The type to compute in for weights of type ``stored``: float32 on a CPU, else the same."""
    import mlx.core as mx

    return mx.float32 if on_cpu() else stored


def prepare_device() -> None:
    """Raise those defaults of MLX that are too low for its device.

    Raises:
        UsageError: MLX has no backend here.
        ResourceError: this process may not take enough memory to load it.
    """
    prepare_cpu()
    keep_resident()


def keep_resident() -> None:
    """Let Metal keep as much memory resident as the system recommends, or it may page out a large model."""
    import mlx.core as mx

    if on_cpu() or not mx.metal.is_available():
        return
    with suppress(ValueError, RuntimeError):  # not supported before macOS 15
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))


def prepare_cpu() -> None:
    """Raise those defaults of MLX's CPU backend that are too low; call it before anything is computed.

    By default the backend keeps 32 MB of freed memory, but fresh pages from the system cost more than
    the arithmetic on them: adding two arrays of 33 MB takes 5 times as long. And it interleaves the
    operations of two streams only in graphs at most 20 wide; in a wider one, such as a training step,
    the second stream waits for the first.

    How much memory it keeps depends on how much this process may take. Work that knows its own need
    sets it again.

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
    """Make glibc return freed blocks above a megabyte to the system at once.

    Otherwise it keeps blocks of up to 32 MB for itself, which no limit of MLX counts, and the process
    takes up to twice what MLX holds. Source: mallopt(3).
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)


@contextmanager
def memory_for_any_size(need: int) -> Iterator[None]:
    """Inside, on a CPU with glibc, freed memory is kept for arrays of any size.

    MLX reuses memory only for an array of nearly the same size, but batches of rows of all lengths have
    many sizes, and a third of the time outside products would go into fresh pages from the system. So
    glibc keeps what work that needs ``need`` bytes frees, and MLX keeps half as much as usual.
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
    """From now on, use ``set_threads`` to set how many threads a matrix product takes."""
    _setters.append(set_threads)


def products_have_threads() -> bool:
    """Whether a runtime lets a matrix product use several threads."""
    return bool(_setters)


@contextmanager
def product_threads(count: int) -> Iterator[None]:
    """Inside, a matrix product takes ``count`` threads, if a runtime can set that; afterwards all cores."""
    for set_threads in _setters:
        set_threads(count)
    try:
        yield
    finally:
        for set_threads in _setters:
            set_threads(thread_count())


def use_for_precision(set_precision: Callable[[str], None]) -> None:
    """From now on, use ``set_precision`` to set the precision of large float32 products."""
    _precisions.append(set_precision)


@contextmanager
def product_precision(compute: str) -> Iterator[None]:
    """Inside, large float32 matrix products are computed in the precision ``compute``.

    Args:
        compute: ``float32``; ``bfloat16``, which rounds each operand to bfloat16; or ``bfloat16x3``,
            which rounds it to the sum of two bfloat16. Sums are float32 in all of them.

    Raises:
        UsageError: no runtime can do that here.
        ResourceError: the runtime that can has failed.
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
    """From now on, use ``function`` on the CPU for what ``name`` means in ``RuntimeStarted``."""
    _lent[name] = function


def lent(name: str) -> Callable[..., Any] | None:
    """The function that a runtime has lent under a name (the last one, if several have), or None."""
    return _lent.get(name)


def packed_product(
    words: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> PackedProduct | None:
    """Float32 products with a weight as :func:`mlx.core.quantize` packs it, without a gradient.

    None if no runtime has lent such products, or they do not support this weight.
    """
    make = lent("packed_product")
    return None if make is None else make(words, scales, biases, group_size=group_size, bits=bits)
