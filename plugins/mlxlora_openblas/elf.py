"""Which functions a shared library takes from others, and where it keeps their addresses.

Only what the dynamic linker itself uses is read: the program header and the
dynamic table, never section names, which a stripped or patched file may lack.

Sources: System V ABI, chapters 4 and 5 (file layout, dynamic linking); its
x86-64 and AArch64 supplements for the relocation types.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Table = np.ndarray[tuple[int], np.dtype[Any]]

#: processor -> the relocations that store a function's address: GLOB_DAT and JUMP_SLOT
_STORES = {62: (6, 7), 183: (1025, 1026)}

_MAGIC = b"\x7fELF\x02\x01"  # 64-bit, little-endian
_LOAD, _DYNAMIC = 1, 2
_PLTRELSZ, _STRTAB, _SYMTAB, _RELA, _RELASZ, _JMPREL = 2, 5, 6, 7, 8, 23

_HEADER = np.dtype(
    {
        "names": ["processor", "segments", "count"],
        "formats": ["<u2", "<u8", "<u2"],
        "offsets": [18, 32, 56],
        "itemsize": 64,
    }
)
_SEGMENT = np.dtype(
    {
        "names": ["type", "offset", "address", "file_bytes"],
        "formats": ["<u4", "<u8", "<u8", "<u8"],
        "offsets": [0, 8, 16, 32],
        "itemsize": 56,
    }
)
_ENTRY = np.dtype([("tag", "<i8"), ("value", "<u8")])
_RELOCATION = np.dtype([("address", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
_SYMBOL = np.dtype([("name", "<u4"), ("kind", "<u4"), ("value", "<u8"), ("bytes", "<u8")])


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Names and slots of the functions that the library at ``path`` calls through a slot.

    A slot is given in bytes from where the library begins in memory.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no shared library for Linux on x86-64 or AArch64.
    """
    with path.open("rb") as file:
        image = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = _rows(image, _HEADER, 0, 1)[0]
    stores = _STORES.get(int(header["processor"]))
    if image[: len(_MAGIC)] != _MAGIC or stores is None:
        raise ValueError(f"{path}: no shared library for x86-64 or AArch64")
    segments = _rows(image, _SEGMENT, header["segments"], header["count"])
    loads = segments[segments["type"] == _LOAD]
    dynamic = _dynamic(image, segments)
    names = _offset(loads, dynamic[_STRTAB])
    for table, size in ((_JMPREL, _PLTRELSZ), (_RELA, _RELASZ)):
        if table not in dynamic:
            continue
        count = dynamic[size] // _RELOCATION.itemsize
        found = _rows(image, _RELOCATION, _offset(loads, dynamic[table]), count)
        found = found[np.isin(found["type"], stores)]
        symbols = _rows(image, _SYMBOL, _offset(loads, dynamic[_SYMTAB]), found["symbol"].max(initial=0) + 1)
        starts = names + symbols["name"][found["symbol"]].astype(np.int64)
        for start, slot in zip(starts.tolist(), found["address"] - loads["address"][0], strict=True):
            yield image[start : image.find(b"\0", start)].decode(), int(slot)


def _dynamic(image: mmap.mmap, segments: Table) -> dict[int, int]:
    """The dynamic table: tag -> value."""
    (segment,) = segments[segments["type"] == _DYNAMIC]
    entries = _rows(image, _ENTRY, segment["offset"], segment["file_bytes"] // _ENTRY.itemsize)
    return dict(zip(entries["tag"].tolist(), entries["value"].tolist(), strict=True))


def _rows(image: mmap.mmap, row: np.dtype[Any], offset: Any, count: Any) -> Table:
    """``count`` rows that begin at ``offset`` in the file; ValueError when it ends before them."""
    return np.frombuffer(image, row, int(count), int(offset))


def _offset(loads: Table, address: int) -> int:
    """Where in the file the byte is that is loaded at ``address``."""
    for load in loads:
        into = address - int(load["address"])
        if 0 <= into < int(load["file_bytes"]):
            return int(load["offset"]) + into
    raise ValueError(f"no part of the library is loaded at {address:#x}")
