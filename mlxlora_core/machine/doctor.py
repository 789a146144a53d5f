"""What mlxlora finds here: device, matrix products, threads, memory, disk, versions, and what is missing.

Light: MLX is imported only where it is asked for, and its absence is a finding.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.errors import ResourceError, UsageError
from mlxlora_core.machine.children import safe_environment, safe_python
from mlxlora_core.machine.memory import memory_bytes, memory_limit_bytes
from mlxlora_core.machine.processors import THREADS, cpu_quota, processors, thread_count
from mlxlora_core.version import __version__

#: distributions whose versions decide what works and how fast
DISTRIBUTIONS = ("mlx", "numpy", "torch", "sentencepiece", "safetensors", "scipy-openblas32")

# 512 is large enough for a fast BLAS to show, and takes the reference BLAS 0.1 s.
_SIDE_CPU, _SIDE_GPU = 512, 4096
_MEASURE_SECONDS = 0.3
_CHILD_SECONDS = 60
_MOST_PRODUCTS = 200

_CPU = "pip install 'mlxlora[cpu]'"
_CUDA = "pip install 'mlxlora[cuda13]'"


@dataclass(frozen=True)
class Device:
    """What MLX computes on.

    Attributes:
        kind: ``cpu`` or ``gpu``.
        backend: ``cpu``, ``metal`` or ``cuda``.
        name: of the processor.
    """

    kind: str
    backend: str
    name: str


@dataclass(frozen=True)
class Threads:
    """Processors and threads.

    Attributes:
        machine: processors that there are.
        allowed: those that affinity leaves to this process.
        quota: processors in time that control groups grant, or None.
        variable: what ``MLXLORA_THREADS`` says, or nothing.
        count: threads to compute with; None when the variable makes no sense.
    """

    machine: int
    allowed: int
    quota: float | None
    variable: str
    count: int | None


@dataclass(frozen=True)
class Memory:
    """Bytes of memory; None where the system does not say.

    Attributes:
        total_bytes: that the machine has.
        available_bytes: that can be had without swapping.
        limit_bytes: that control groups grant.
    """

    total_bytes: int | None
    available_bytes: int | None
    limit_bytes: int | None


@dataclass(frozen=True)
class Disk:
    """The disk that a folder is on."""

    folder: str
    total_bytes: int
    free_bytes: int


def device() -> Device:
    """What MLX computes on.

    Raises:
        ImportError: there is no MLX, or it has no backend here.
    """
    import mlx.core as mx

    kind = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
    backend = "cpu"
    if kind == "gpu":
        backend = "cuda" if mx.cuda.is_available() else "metal"
    name = str(mx.device_info(mx.default_device()).get("device_name", "") or platform.processor())
    return Device(kind, backend, name)


def matmul_gflops() -> float:
    """GFLOP/s of ``a @ b.T``, a linear layer: float32 on a CPU, float16 on a GPU; takes half a second.

    A product of (M, K) and (K, N) is 2 M K N floating-point operations. NaN when the clock stands still.

    Raises:
        ImportError: there is no MLX.
    """
    import mlx.core as mx

    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    side = _SIDE_GPU if on_gpu else _SIDE_CPU
    a, b = (mx.random.normal((side, side)).astype(mx.float16 if on_gpu else mx.float32) for _ in range(2))
    mx.eval(a @ b.T)
    found: list[float] = []
    while len(found) < _MOST_PRODUCTS and (len(found) < 2 or sum(found) < _MEASURE_SECONDS):
        began = time.perf_counter()
        mx.eval(a @ b.T)
        found.append(time.perf_counter() - began)
    median = statistics.median(found)
    return 2e-9 * side**3 / median if median > 0 else math.nan


_MEASURE = "from mlxlora_core.machine.doctor import matmul_gflops; print(matmul_gflops())"
_START = (
    "from mlxlora_core.plugins import load, start_runtimes\n"
    "if any(note.warning for note in start_runtimes(load())): raise SystemExit(1)\n"
)


def stock_matmul_gflops() -> float | None:
    """As :func:`matmul_gflops`, in a process where no runtime has been started; None if that fails."""
    return _child_gflops(_MEASURE, {})


def runtime_matmul_gflops(variables: Mapping[str, str]) -> float | None:
    """As :func:`matmul_gflops`, in a process with these variables; None if a runtime warns there."""
    return _child_gflops(_START + _MEASURE, variables)


def _child_gflops(code: str, variables: Mapping[str, str]) -> float | None:
    """The rate that a child prints, or None."""
    try:
        done = subprocess.run(
            safe_python("-c", code),
            env=safe_environment() | dict(variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=_CHILD_SECONDS,
        )
        return float(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def threads() -> Threads:
    """Processors and threads of this process."""
    try:
        count: int | None = thread_count()
    except UsageError:
        count = None
    return Threads(os.cpu_count() or 1, processors(), cpu_quota(), os.environ.get(THREADS, ""), count)


def memory() -> Memory:
    """Memory of the machine, and what this process may take of it."""
    return Memory(*memory_bytes(), memory_limit_bytes())


def disk(folder: Path) -> Disk:
    """The disk that ``folder`` is on.

    Raises:
        ResourceError: the folder is gone or may not be looked at.
    """
    try:
        usage = shutil.disk_usage(folder)
        return Disk(os.path.abspath(folder), usage.total, usage.free)
    except OSError as fault:
        raise ResourceError(
            f"cannot be looked at: {fault.strerror}", where=folder, fix="change to another folder"
        ) from fault


def versions() -> dict[str, str | None]:
    """Name -> version; None for a distribution that is not installed."""
    found: dict[str, str | None] = {"mlxlora": __version__, "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def nvidia_present() -> bool:
    """Whether the driver of an NVIDIA GPU is loaded."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def advice(found: Device | None, warnings: Sequence[str], spread: Threads) -> list[str]:
    """What to install or set for more speed, a line each, most important first.

    Args:
        found: what MLX computes on; None when MLX cannot be used.
        warnings: what the runtimes warned of, which says what to do.
        spread: processors and threads.
    """
    lines = []
    if nvidia_present() and (found is None or found.backend != "cuda"):
        lines.append(f"there is an NVIDIA GPU, and MLX does not use it: {_CUDA}")
    elif found is None:
        lines.append(f"MLX cannot be used: {_CPU}")
    lines += warnings
    if spread.count is None:
        lines.append(f"{THREADS} is '{spread.variable}': set it to a whole number, or unset it")
    elif spread.variable and spread.count > max(1, min(spread.allowed, spread.quota or spread.allowed)):
        lines.append(
            f"{THREADS} is {spread.count}, more than the processors that this process may use, "
            "and threads wait for each other: unset it"
        )
    if importlib.util.find_spec("torch") is None:
        lines.append("PyTorch checkpoints cannot be read without torch: pip install 'mlxlora[torch]'")
    return lines
