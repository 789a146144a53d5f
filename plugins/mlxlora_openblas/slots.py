"""Where libmlx.so keeps, in memory, the addresses of functions of other libraries that it calls.

A shared library calls a function of another one through a slot in its data, which the dynamic linker
fills in. The library's code is not changed, and writing the old address back undoes everything.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import ResourceError
from mlxlora_openblas.elf import imports

_LIBRARY = re.compile(r"/libmlx\.so[^/]*$")
#: the products of a BLAS
PRODUCTS = "cblas_[a-z]gemm"
_PROTECTION = {"r": mmap.PROT_READ, "w": mmap.PROT_WRITE, "x": mmap.PROT_EXEC}


@dataclass(frozen=True)
class Mapping:
    """A range of memory that a file was loaded into."""

    start: int
    stop: int
    protection: int
    path: str

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.stop


@dataclass(frozen=True)
class Slot:
    """A place in memory that holds the address of a function.

    Attributes:
        function: its name.
        address: of the slot.
        protection: of the memory around it, as mprotect(2) takes it.
    """

    function: str
    address: int
    protection: int

    @property
    def target(self) -> int:
        """The address in the slot: of the function, or of a stub that looks it up on the first call."""
        return ctypes.c_size_t.from_address(self.address).value

    def point_at(self, target: int) -> None:
        """Write an address into the slot, lifting write protection meanwhile.

        Raises:
            OSError: the protection cannot be lifted.
        """
        locked = not self.protection & mmap.PROT_WRITE
        if locked:
            self._protect(self.protection | mmap.PROT_WRITE)
        ctypes.c_size_t.from_address(self.address).value = target
        if locked:
            self._protect(self.protection)

    def _protect(self, protection: int) -> None:
        page = self.address & -mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), protection):
            code = ctypes.get_errno()
            raise OSError(code, f"mprotect of the slot of {self.function}: {os.strerror(code)}")


def mlx_slots(names: str = PRODUCTS) -> list[Slot]:
    """The slots of functions in the loaded libmlx.so; empty if it imports no such function.

    Args:
        names: a pattern for the names of the functions.

    Raises:
        OSError: the library or the map of memory cannot be read.
        ValueError: the file is not a shared library for a supported processor.
        ResourceError: memory does not hold what the file says.
    """
    loaded = _mapped(_LIBRARY)
    if not loaded:
        return []
    base = min(m.start for m in loaded)
    places = [(name, base + at) for name, at in imports(Path(loaded[0].path)) if re.fullmatch(names, name)]
    slots = [Slot(name, at, m.protection) for name, at in places for m in loaded if at in m]
    if len(slots) != len(places) or not all(_holds_function(slot, loaded) for slot in slots):
        raise ResourceError("what is in memory is not what the file says", where=loaded[0].path)
    return slots


def _mapped(path: re.Pattern[str]) -> list[Mapping]:
    """Where files of this name are in the memory of this process. Source: proc(5), ``/proc/self/maps``."""
    found = []
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        if path.search(line):
            span, letters, _offset, _device, _inode, name = line.split(maxsplit=5)
            start, stop = (int(number, 16) for number in span.split("-"))
            protection = sum(bit for letter, bit in _PROTECTION.items() if letter in letters)
            found.append(Mapping(start, stop, protection, name))
    return found


def _holds_function(slot: Slot, library: list[Mapping]) -> bool:
    """Whether the slot holds the function that it is for, or a stub of its library that looks it up."""
    if not slot.protection & mmap.PROT_READ:
        return False
    stub = any(slot.target in m for m in library if m.protection & mmap.PROT_EXEC)
    return stub or _symbol(slot.target).endswith(slot.function)


class _Symbol(ctypes.Structure):
    """``Dl_info`` of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _symbol(address: int) -> str:
    """Name of the function that begins at ``address``, or nothing."""
    found = _Symbol()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(found)):
        return ""
    return (found.name or b"").decode() if found.address == address else ""
