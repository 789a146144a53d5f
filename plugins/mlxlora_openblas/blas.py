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

#: the CBLAS functions that MLX calls, and the matrix-vector product; a library must have the first
FUNCTIONS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "cblas_sgemv")

#: scipy-openblas32 puts a prefix before every name, so that it never clashes with another BLAS
_PREFIXES = ("", "scipy_")

#: Intel's MKL as installed from the package index next to this Python
_MKL = ("lib/libmkl_rt.so.2", "lib/libmkl_rt.so.3")
_SEQUENTIAL, _LP64 = 1, 0  # its layers: no threads, as the library in C has its own, and 32-bit integers

#: Fedora's build with threads has its own name; elsewhere it has the plain name
_SYSTEM = ("libopenblasp.so.0", "libopenblas.so.0")

_WIDE = "it takes 64-bit integers (ILP64), MLX passes 32-bit ones (LP64)"


@dataclass(frozen=True)
class Blas:
    """An opened BLAS with 32-bit integers.

    Attributes:
        path: of the library.
        functions: name in the CBLAS standard -> address.
        title: name, version, processor and threads, as far as the library tells.
        set_threads: sets how many threads it uses, or None if that cannot be set.
    """

    path: str
    functions: Mapping[str, int]
    title: str
    set_threads: Callable[[int], None] | None


def open_blas(threads: int) -> Blas:
    """Open the library that ``MLXLORA_BLAS`` names, or the one that ``mlxlora doctor`` found the fastest.

    If neither is known, it is that of scipy-openblas32, then the system's OpenBLAS, then MKL.

    Raises:
        ResourceError: the named library cannot be used, or none was found.
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
        OSError: the library cannot be loaded.
        ValueError: it has no ``cblas_sgemm`` with 32-bit integers.
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
    """The libraries that can be opened here, if there are several and the user has not named one."""
    if os.environ.get(LIBRARY):
        return []
    able = []
    for path in candidates():
        with suppress(OSError, ValueError):
            load(path, threads)
            able.append(path)
    return able if len(able) > 1 else []


def candidates() -> Iterator[str]:
    """Paths and names to try if the user has not named a library, best first."""
    package = importlib.util.find_spec("scipy_openblas32")
    for folder in (package.submodule_search_locations or []) if package else []:
        yield from map(str, sorted(Path(folder, "lib").glob("libscipy_openblas*.so*")))
    yield from _SYSTEM
    yield from (str(path) for name in _MKL if (path := Path(sys.prefix, name)).exists())


def _text(library: ctypes.CDLL, name: str) -> str:
    """The text that the function ``name`` of the library returns; nothing if it has no such function."""
    try:
        function = getattr(library, name)
    except AttributeError:
        return ""
    function.restype = ctypes.c_char_p
    return (function() or b"").decode(errors="replace")


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
