"""Ends the process with an error line where MLX's CPU backend would crash for lack of memory.

MLX's CPU backend writes to whatever address ``malloc`` returns, even if it is null: a process that may
take no more memory dies of SIGSEGV. This runtime points the slot of ``malloc`` in libmlx.so at C++'s
``operator new``, which takes the same argument and memory from the same place, but calls a handler if
there is none. Exceeding the limit of a control group means SIGKILL, so what the group leaves becomes a
limit of this process, which ``malloc`` meets first.

Source: C++17, [new.delete.single] and [alloc.errors]; setrlimit(2), RLIMIT_DATA.
"""

from __future__ import annotations

import ctypes
import os
import resource
from functools import cache
from typing import Any

from mlxlora_core.api import MlxloraError, RuntimeStarted, free_in_groups_bytes, thread_count
from mlxlora_openblas.runtime import computes_on_cpu
from mlxlora_openblas.slots import mlx_slots

_NEW, _SET_HANDLER = "_Znwm", "_ZSt15set_new_handlerPFvvE"  # operator new(unsigned long), set_new_handler
_LINE = (
    b"mlxlora: there is not enough memory: this process may take no more. "
    b"Fix: allow it more, or use a smaller model, smaller batches or shorter rows\n"
)
_EXIT_CODE = 6  # as of ResourceError

#: kept free of what control groups leave, since page tables and cached files count as well
_SPARE_SHARE, _SPARE_BYTES = 0.02, 16 << 20
#: address space for each thread that starts later: a stack that it hardly touches
_THREAD_BYTES = 9 << 20

# Kept alive, because C++ holds its address.
_handler: Any = None


@cache
def start() -> RuntimeStarted | None:
    """Set the guard; returns None if it is set or not needed, and a warning if it cannot be set."""
    if not computes_on_cpu():
        return None
    try:
        _set()
    except (OSError, ValueError, AttributeError, MlxloraError) as fault:
        return RuntimeStarted(f"guard: too little memory would end in a crash: {fault}", warning=True)
    if free_in_groups_bytes() is not None:
        _take_buffers()
        _limit(free_in_groups_bytes() or 0)
    elif resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        _take_buffers()
    return None


def _take_buffers() -> None:
    """Let the BLAS allocate its buffers for parallel products now: without one it exits with 1."""
    import mlx.core as mx

    numbers = mx.ones((512, 512))
    streams = [mx.new_thread_local_stream(mx.Device(mx.cpu)) for _ in range(thread_count())]
    mx.eval([mx.matmul(numbers, numbers, stream=stream) for stream in streams for _ in range(4)])


def _set() -> None:
    """Make MLX take its memory from an allocator that calls :func:`_end` when there is none.

    Raises:
        OSError: there is no C++ library, or the process cannot be inspected or changed.
        ValueError: libmlx.so is not laid out as expected, or does not import ``malloc``.
        MlxloraError: memory does not hold what the file says.
        AttributeError: the C++ library has other names.
    """
    global _handler
    slots = mlx_slots("malloc")
    if not slots:
        raise ValueError("libmlx.so takes no malloc from another library")
    library = ctypes.CDLL("libstdc++.so.6")
    allocate = ctypes.cast(getattr(library, _NEW), ctypes.c_void_p).value or 0
    _handler = ctypes.CFUNCTYPE(None)(_end)
    getattr(library, _SET_HANDLER)(_handler)
    for slot in slots:
        slot.point_at(allocate)


def _end() -> None:
    """End the process, from any thread."""
    os.write(2, _LINE)
    os._exit(_EXIT_CODE)


def _limit(free: int) -> None:
    """Limit this process to ``free`` more bytes; a lower existing limit stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _data_bytes() + thread_count() * _THREAD_BYTES
    most += max(0, int(free * (1 - _SPARE_SHARE)) - _SPARE_BYTES)
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _data_bytes() -> int:
    """What counts against RLIMIT_DATA now. Source: proc(5), ``/proc/self/statm``, which includes stacks."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
