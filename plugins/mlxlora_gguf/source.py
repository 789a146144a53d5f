"""The bytes of a file from its start on, read as they are asked for and never past its end."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from mlxlora_core.api import ModelError
from mlxlora_core.files import read_some

#: the most that is read of a file before its tensors begin; the largest vocabularies in use take 30 MB
HEADER_BYTES = 128 << 20

_STEP_BYTES = 1 << 20


class Fault(Exception):
    """What keeps the bytes from being what they should be."""


class Source:
    """Values one after another out of an open file.

    Args:
        file: at its start.
        size: of the file, in bytes.
        path: for messages.
    """

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file, self.size, self._path = file, size, path
        self._bytes = b""
        self.at = 0

    def left(self) -> int:
        """How many bytes of the file were not taken yet."""
        return self.size - self.at

    def values(self, form: str) -> tuple[Any, ...]:
        """The next values, as :mod:`struct` spells them, without a byte order."""
        form = "<" + form
        size = struct.calcsize(form)
        self._have(size)
        found = struct.unpack_from(form, self._bytes, self.at)
        self.at += size
        return found

    def text(self, most: int, what: str) -> str:
        """The next string: its length in 8 bytes, then itself, in UTF-8.

        Args:
            most: bytes that it may have.
            what: what it is, for messages.
        """
        (length,) = self.values("Q")
        if length > most:
            raise Fault(f"{what} claims {length} bytes, wanted at most {most}")
        self._have(length)
        content = self._bytes[self.at : self.at + length]
        self.at += length
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise Fault(f"{what} is no UTF-8") from None

    def texts(self, count: int, what: str) -> list[str]:
        """The next ``count`` strings."""
        if 8 * count > self.left():
            raise Fault(f"{what} claims {count} strings in {self.left()} bytes")
        self._have(8 * count)
        found: list[str] = []
        while True:
            try:
                self._some_texts(found, count)
            except UnicodeDecodeError:
                raise Fault(f"string {len(found)} of {what} is no UTF-8") from None
            if len(found) == count:
                return found
            self._have(self._next_size())

    def _next_size(self) -> int:
        """How many bytes the next string takes, or as many as tell it."""
        in_memory = self._bytes[self.at : self.at + 8]
        return 8 + struct.unpack("<Q", in_memory)[0] if len(in_memory) == 8 else 8

    def _some_texts(self, found: list[str], count: int) -> None:
        """Append the strings that are in memory, up to ``count`` of them.

        There are a hundred thousand and more, so that each costs as little as it can.
        """
        data, size, start = self._bytes, len(self._bytes), self.at
        length_of, append = struct.Struct("<Q").unpack_from, found.append
        try:
            for _ in range(count - len(found)):
                stop = start + 8 + length_of(data, start)[0]
                if stop > size:
                    break
                append(data[start + 8 : stop].decode())
                start = stop
        except struct.error:  # the length itself is not in memory
            pass
        finally:
            self.at = start

    def _have(self, count: int) -> None:
        """Read on until ``count`` bytes from here on are in memory."""
        want = self.at + count
        if want > self.size:
            raise Fault(f"it ends in its header: it is {self.size} bytes, wanted {want} and more")
        if want > HEADER_BYTES:
            raise Fault(f"its header has more than {HEADER_BYTES} bytes")
        if want > len(self._bytes):
            more = max(want - len(self._bytes), _STEP_BYTES, len(self._bytes))
            self._bytes += read_some(self._file, more, self._path)
            if want > len(self._bytes):
                raise ModelError("became shorter while it was read", where=self._path)
