"""Find a BLAS that is faster than MLX's own, open it, and set its threads."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import ResourceError
from mlxlora_openblas.fastest import remembered

#: environment variable that names the library to use
LIBRARY = "MLXLORA_BLAS"

#: the CBLAS functions that MLX calls and one that takes vectors; a library must have the first
FUNCTIONS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "cblas_sgemv")

#: scipy-openblas32 puts a prefix before every name, so that it never clashes with another BLAS
_PREFIXES = ("", "scipy_")

#: Intel's MKL as the package index has it, beside this Python, and as a system has it
_MKL = ("lib/libmkl_rt.so.2", "lib/libmkl_rt.so.3")
_SEQUENTIAL, _LP64 = 1, 0  # its layers: threads are those of the library in C, integers have 32 bits

#: Fedora's build with threads has a name of its own; elsewhere the plain name has them
_SYSTEM = ("libopenblasp.so.0", "libopenblas.so.0")

_WIDE = "it takes 64-bit integers (ILP64), MLX passes 32-bit ones (LP64)"


@dataclass(frozen=True)
class Blas:
    """An opened BLAS with 32-bit integers.

    Attributes:
        path: what was opened.
        functions: name in the CBLAS standard -> address.
        title: name, version, processor and threads, as far as it tells them.
        set_threads: sets how many threads it uses, where it can.
    """

    path: str
    functions: Mapping[str, int]
    title: str
    set_threads: Callable[[int], None] | None


def open_blas(threads: int) -> Blas:
    """The library that ``MLXLORA_BLAS`` names, else the one that ``mlxlora doctor`` found the fastest.

    Where that is not known it is scipy-openblas32's, else the system's OpenBLAS, else MKL.

    Raises:
        ResourceError: the named library cannot be used, or there is none.
    """
    named = os.environ.get(LIBRARY)
    if named:
        try:
            return load(str(Path(named).expanduser()) if "/" in named else named, threads)
        except (OSError, ValueError) as fault:
            raise ResourceError(str(fault), where=LIBRARY, fix="name an OpenBLAS, or unset it") from fault
    found = list(candidates())
    fastest = remembered(found, threads)
    for path in [fastest, *found] if fastest else found:
        try:
            return load(path, threads)
        except (OSError, ValueError):
            continue
    raise ResourceError("no OpenBLAS found, matrix products are slow", fix="pip install 'mlxlora[cpu]'")


def load(path: str, threads: int) -> Blas:
    """Open the BLAS at ``path`` and, if it is an OpenBLAS, let it use ``threads`` threads.

    Raises:
        OSError: it is no library that can be loaded.
        ValueError: it has no ``cblas_sgemm`` that takes 32-bit integers.
    """
    library = ctypes.CDLL(path)
    prefix = next((p for p in _PREFIXES if hasattr(library, p + FUNCTIONS[0])), None)
    if prefix is None:
        wide = any(hasattr(library, f"{p}{FUNCTIONS[0]}64_") for p in _PREFIXES)
        raise ValueError(f"{path}: {_WIDE if wide else f'it has no {FUNCTIONS[0]}'}")
    config = _text(library, f"{prefix}openblas_get_config")
    if "USE64BITINT" in config:
        raise ValueError(f"{path}: {_WIDE}")
    title, set_threads = Path(path).name, None
    if hasattr(library, "MKL_Set_Interface_Layer"):
        library.MKL_Set_Interface_Layer(_LP64)
        library.MKL_Set_Threading_Layer(_SEQUENTIAL)
        title, set_threads = f"MKL ({title})", library.MKL_Set_Num_Threads
    if config:
        set_threads = getattr(library, f"{prefix}openblas_set_num_threads")
        set_threads(threads)
        count = getattr(library, f"{prefix}openblas_get_num_threads")()
        core = _text(library, f"{prefix}openblas_get_corename")
        title = f"{' '.join(config.split()[:2])} ({core}, {count} thread{'s' * (count != 1)})"
    found = {name: _address(library, prefix + name) for name in FUNCTIONS if hasattr(library, prefix + name)}
    return Blas(path, found, title, set_threads)


def alternatives(threads: int) -> list[str]:
    """The libraries that can be opened here, where there are several and nobody has named one."""
    if os.environ.get(LIBRARY):
        return []
    able = []
    for path in candidates():
        with suppress(OSError, ValueError):
            load(path, threads)
            able.append(path)
    return able if len(able) > 1 else []


def candidates() -> Iterator[str]:
    """Paths and names to try when nobody named a library, the best first."""
    package = importlib.util.find_spec("scipy_openblas32")
    for folder in (package.submodule_search_locations or []) if package else []:
        yield from map(str, sorted(Path(folder, "lib").glob("libscipy_openblas*.so*")))
    yield from _SYSTEM
    yield from (str(path) for name in _MKL if (path := Path(sys.prefix, name)).exists())


def _text(library: ctypes.CDLL, name: str) -> str:
    """What the function ``name`` of the library says about it, or nothing when there is none."""
    try:
        function = getattr(library, name)
    except AttributeError:
        return ""
    function.restype = ctypes.c_char_p
    return (function() or b"").decode(errors="replace")


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
