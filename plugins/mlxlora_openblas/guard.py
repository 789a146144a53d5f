"""A process that ends with a line where MLX's CPU backend would crash for want of memory.

MLX's CPU backend writes to whatever address ``malloc`` gives, also where that
gives none: a process that may take no more memory dies of SIGSEGV. This runtime
points the slot of ``malloc`` in libmlx.so at C++'s ``operator new``, which has
the same arguments and the same memory, and calls a handler where it gets none.
Memory that a control group does not grant ends in a SIGKILL, so that what is
left of it becomes a limit of this process, which ``malloc`` meets before.

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

#: of what control groups leave, what is not taken: page tables and pages of files count as well
_SPARE_SHARE, _SPARE_BYTES = 0.02, 16 << 20
#: what a thread that starts later maps and hardly touches: its stack
_THREAD_BYTES = 9 << 20

# C++ holds on to its address.
_handler: Any = None


@cache
def start() -> RuntimeStarted | None:
    """Set the guard; nothing to say where it stands, or is not needed, and a warning where it cannot."""
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
    """Let BLAS take what it takes for products side by side, for where it gets no buffer it ends with 1."""
    import mlx.core as mx

    numbers = mx.ones((512, 512))
    streams = [mx.new_thread_local_stream(mx.Device(mx.cpu)) for _ in range(thread_count())]
    mx.eval([mx.matmul(numbers, numbers, stream=stream) for stream in streams for _ in range(4)])


def _set() -> None:
    """Let MLX take its memory from an allocator that calls :func:`_end` where there is none.

    Raises:
        OSError: there is no C++ library, or the process may not be looked into or changed.
        ValueError: libmlx.so is not laid out as expected, or takes its memory from nobody.
        MlxloraError: what is in memory is not what the file says.
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
    """End this process from whatever thread, for none of them can go on."""
    os.write(2, _LINE)
    os._exit(_EXIT_CODE)


def _limit(free: int) -> None:
    """Let this process take at most ``free`` bytes more; an old limit that is lower stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _data_bytes() + thread_count() * _THREAD_BYTES
    most += max(0, int(free * (1 - _SPARE_SHARE)) - _SPARE_BYTES)
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _data_bytes() -> int:
    """What counts against RLIMIT_DATA now. Source: proc(5), ``/proc/self/statm``: it has stacks in it too."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
