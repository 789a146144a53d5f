"""The directory of a zip archive, held against the archive before a member is read.

Archives of tensors are written in one go: members lie one after another from
the first byte, then the directory, then its end. Everything else, such as bytes
that belong to no member, members that share bytes, or two places that tell a
member's name and size differently, exists to show two readers two things, and
is refused. Every size comes from the file.

The format: APPNOTE.TXT 6.3.10, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from mlxlora_core.errors import MlxloraError, ModelError, listing
from mlxlora_core.files.input_file import AGAIN, read_exactly
from mlxlora_core.files.tensor_header import TENSORS_LIMIT, name_fault

STORED, DEFLATED = 0, 8

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_RECORD = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_DESCRIPTORS = (struct.Struct("<4s3L"), struct.Struct("<4sL2Q"))

_COMMENT_BYTES = 65535
_DIRECTORY_BYTES = 64 << 20
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF  # the value stands in a 64-bit field elsewhere
_ENCRYPTED, _SIZES_BEHIND, _UTF8 = 0x1, 0x8, 0x800


@dataclass(frozen=True)
class ZipMember:
    """A file in an archive.

    Attributes:
        name: with ``/`` between folders.
        start: the byte of the archive at which its bytes begin.
        packed_bytes: how many it takes there.
        size_bytes: how many it is when it is unpacked.
        deflated: whether it has to be unpacked.
        crc: CRC-32 of its unpacked bytes.
    """

    name: str
    start: int
    packed_bytes: int
    size_bytes: int
    deflated: bool
    crc: int


@dataclass(frozen=True)
class ZipLayout:
    """What an archive holds.

    Attributes:
        members: in the order of the directory.
        comment: of the archive.
    """

    members: tuple[ZipMember, ...]
    comment: bytes


@dataclass(frozen=True)
class _Record:
    """A member as the directory tells it; ``offset`` is where its own header begins."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int


def read_zip_layout(file: BinaryIO, path: Path, trick: type[MlxloraError] = ModelError) -> ZipLayout:
    """Check the directory of an open zip archive.

    Args:
        file: read from, and left anywhere.
        path: for messages.
        trick: the error to raise for a layout that no writer makes.

    Raises:
        ModelError: it is truncated or no zip archive.
        MlxloraError: of ``trick``.
    """
    return _Reader(file, path, trick).read()


def read_zip_member(file: BinaryIO, member: ZipMember, path: Path) -> bytes:
    """The unpacked bytes of a member.

    Raises:
        ModelError: they are not those that were written.
    """
    file.seek(member.start)
    data = read_exactly(file, member.packed_bytes, path)
    if member.deflated:
        unpacker = zlib.decompressobj(-15)
        try:
            data = unpacker.decompress(data, member.size_bytes + 1)
        except zlib.error as fault:
            raise ModelError(f"{member.name} cannot be unpacked: {fault}", where=path, fix=AGAIN) from None
        if len(data) != member.size_bytes or not unpacker.eof or unpacker.unused_data:
            raise ModelError(f"{member.name} does not unpack to its size", where=path, fix=AGAIN)
    if zlib.crc32(data) != member.crc:
        raise ModelError(f"the bytes of {member.name} do not match their CRC-32", where=path, fix=AGAIN)
    return data


class _Reader:
    """Reads one archive."""

    def __init__(self, file: BinaryIO, path: Path, trick: type[MlxloraError]) -> None:
        self.file, self.path, self.trick = file, path, trick
        self.size = os.fstat(file.fileno()).st_size

    def read(self) -> ZipLayout:
        """All of the directory."""
        start, stop, count, comment = self._end()
        records = self._records(start, stop, count)
        twice = sorted(name for name, n in Counter(r.name for r in records).items() if n > 1)
        if twice:
            self._refuse(f"holds two members of one name: {listing(twice)}")
        members: dict[str, ZipMember] = {}
        at = 0
        for record in sorted(records, key=lambda record: record.offset):
            if record.offset != at:
                what = (
                    "shares bytes with another" if record.offset < at else "stands behind bytes of no member"
                )
                self._refuse(f"{record.name} {what}" if at else "holds bytes in front of its first member")
            members[record.name], at = self._member(record, start)
        if at != start:
            self._refuse(f"holds {start - at} bytes between its last member and its directory")
        return ZipLayout(tuple(members[record.name] for record in records), comment)

    def _end(self) -> tuple[int, int, int, bytes]:
        """Where the directory begins and ends, how many members it has, and the comment."""
        tail_start = max(0, self.size - _END.size - _COMMENT_BYTES)
        tail = self._bytes(tail_start, self.size - tail_start)
        places = [at for at in _find_all(tail, b"PK\5\6") if _ends_at(tail, at)]
        if not places:
            self._damaged("its directory is missing")
        if len(places) > 1:
            self._refuse("has two ends")
        end = tail_start + places[0]
        _, disk, first_disk, here, count, length, start, _ = _END.unpack_from(tail, places[0])
        comment = tail[places[0] + _END.size :]
        stop = end
        if tail_start + places[0] >= _LOCATOR_64.size:
            locator = self._bytes(end - _LOCATOR_64.size, _LOCATOR_64.size)
            if locator.startswith(b"PK\6\7"):
                stop = end - _LOCATOR_64.size - _END_64.size
                here, count, length, start = self._end_64(locator, stop, (here, count, length, start))
        if disk or first_disk or here != count:
            self._refuse("is one part of several")
        if start + length < stop:
            self._refuse("holds bytes in front of its first member")
        if start + length > stop:
            self._damaged(f"its directory should end at byte {start + length} and ends at {stop}")
        if count > TENSORS_LIMIT or length > _DIRECTORY_BYTES:
            self._refuse(f"has {count} members in {length} bytes, wanted at most {TENSORS_LIMIT}")
        return start, stop, count, comment

    def _end_64(self, locator: bytes, at: int, small: tuple[int, ...]) -> tuple[int, ...]:
        """The numbers that did not fit into the end of an archive before 2001."""
        _, _, place, disks = _LOCATOR_64.unpack(locator)
        if place < at:
            self._refuse("holds bytes in front of its first member")
        if at < 0 or place != at or disks > 1:
            self._damaged("its directory's end is not where it is said to be")
        signature, length, _, _, disk, first, *large = _END_64.unpack(self._bytes(at, _END_64.size))
        agree = all(s in (_FULL_16, _FULL_32, n) for s, n in zip(small, large, strict=True))
        if signature != b"PK\6\6" or length != _END_64.size - 12 or disk or first or not agree:
            self._damaged("its directory has two ends that differ")
        return tuple(large)

    def _records(self, start: int, stop: int, count: int) -> list[_Record]:
        directory = self._bytes(start, stop - start)
        records = []
        at = 0
        for _ in range(count):
            if len(directory) - at < _RECORD.size:
                self._damaged("its directory is cut")
            fields = _RECORD.unpack_from(directory, at)
            signature, _, _, flags, method, _, _, crc, packed, size, names, extras, remark, *_, offset = (
                fields
            )
            end = at + _RECORD.size + names + extras
            if signature != b"PK\1\2" or remark or end > len(directory):
                self._damaged("its directory is damaged")
            raw = directory[at + _RECORD.size : end - extras]
            numbers = self._wide(directory[end - extras : end], (size, packed, offset))
            records.append(self._record(raw, flags, method, crc, numbers))
            at = end
        if at != len(directory):
            self._damaged("its directory holds more than its members")
        return records

    def _record(self, raw: bytes, flags: int, method: int, crc: int, numbers: tuple[int, ...]) -> _Record:
        try:
            name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
        except UnicodeDecodeError:
            self._damaged("a name in it is no UTF-8")
        if fault := name_fault(name):
            self._refuse(f"the name of member {name[:80]!r} {fault}")
        if flags & _ENCRYPTED:
            self._refuse(f"{name} is encrypted")
        if method not in (STORED, DEFLATED):
            self._refuse(f"{name} is compressed by method {method}, wanted none or deflate")
        size, packed, offset = numbers
        if method == STORED and size != packed:
            self._refuse(f"{name} is {packed} bytes and should unpack to {size}, but is not compressed")
        return _Record(name, raw, flags, method, crc, packed, size, offset)

    def _member(self, record: _Record, stop: int) -> tuple[ZipMember, int]:
        """A member by its own header, which must say what the directory says, and where it ends."""
        if stop - record.offset < _LOCAL.size:
            self._damaged(f"{record.name} is cut")
        fields = _LOCAL.unpack(self._bytes(record.offset, _LOCAL.size))
        signature, _, flags, method, _, _, crc, packed, size, names, extras = fields
        start = record.offset + _LOCAL.size + names + extras
        end = start + record.packed
        if signature != b"PK\3\4" or end > stop:
            self._damaged(f"{record.name} is cut")
        rest = self._bytes(record.offset + _LOCAL.size, names + extras)
        if rest[:names] != record.raw_name:
            self._refuse(f"{record.name} has another name in its own header")
        mask = _ENCRYPTED | _SIZES_BEHIND | _UTF8
        if (flags & mask, method) != (record.flags & mask, record.method):
            self._refuse(f"{record.name} is packed in another way by its own header")
        if flags & _SIZES_BEHIND:
            end += self._descriptor(record, end, stop)
        else:
            size, packed = self._wide(rest[names:], (size, packed))
            if (size, packed, crc) != (record.size, record.packed, record.crc):
                self._refuse(f"{record.name} has another size or checksum in its own header")
        deflated = record.method == DEFLATED
        return ZipMember(record.name, start, record.packed, record.size, deflated, record.crc), end

    def _descriptor(self, record: _Record, at: int, stop: int) -> int:
        """How long the sizes behind a member are, which must be those of the directory."""
        want = b"PK\7\x08", record.crc, record.packed, record.size
        for form in _DESCRIPTORS:
            if stop - at >= form.size and form.unpack(self._bytes(at, form.size)) == want:
                return form.size
        self._refuse(f"{record.name} is followed by another size or checksum")

    def _wide(self, extras: bytes, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """``numbers`` with each that is full replaced by its 64-bit value in the extra fields."""
        if _FULL_32 not in numbers:
            return numbers
        at = 0
        while at + 4 <= len(extras):
            tag, length = struct.unpack_from("<2H", extras, at)
            at += 4
            if tag == 1:
                values = iter(struct.unpack_from(f"<{min(length, len(extras) - at) // 8}Q", extras, at))
                return tuple(next(values, n) if n == _FULL_32 else n for n in numbers)
            at += length
        return numbers

    def _bytes(self, at: int, count: int) -> bytes:
        self.file.seek(at)
        return read_exactly(self.file, count, self.path)

    def _damaged(self, what: str) -> NoReturn:
        raise ModelError(f"is truncated or damaged at {self.size} bytes: {what}", where=self.path, fix=AGAIN)

    def _refuse(self, what: str) -> NoReturn:
        raise self.trick(f"{what}, as no writer of tensors makes it", where=self.path)


def _find_all(data: bytes, part: bytes) -> list[int]:
    """Every place at which ``part`` begins."""
    places, at = [], data.find(part)
    while at >= 0:
        places.append(at)
        at = data.find(part, at + 1)
    return places


def _ends_at(tail: bytes, at: int) -> bool:
    """Whether an end of an archive at ``at`` ends, with its comment, where the file does."""
    if at + _END.size > len(tail):
        return False
    return at + _END.size + int(_END.unpack_from(tail, at)[-1]) == len(tail)
