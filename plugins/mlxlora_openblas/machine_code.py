"""A few instructions for x86-64, out of a listing that can be read."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping


def executable(listing: str, addresses: Mapping[str, int]) -> int:
    """The address of a listing's code in memory, where it stays for as long as the process runs.

    Args:
        listing: in each line bytes in hexadecimal, two spaces, and what they mean in words;
            ``<name>`` among the bytes is an address.
        addresses: name -> address.

    Raises:
        OSError: the system does not allow memory that was written to be executed.
    """
    code = bytearray()
    for line in listing.strip().splitlines():
        for word in line.partition("  ")[0].split():
            named = word.strip("<>")
            code += addresses[named].to_bytes(8, "little") if named in addresses else bytes.fromhex(word)
    libc = ctypes.CDLL(None, use_errno=True)
    # Not the mmap module: it would give the memory back while MLX's threads still call into it.
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    size = ctypes.c_size_t(mmap.PAGESIZE)
    address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, ctypes.c_long(0))
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    ctypes.memmove(address, bytes(code), len(code))
    if libc.mprotect(ctypes.c_void_p(address), size, mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(address)
