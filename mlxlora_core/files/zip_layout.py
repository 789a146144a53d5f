"""The directory of a zip archive, read by ``zipfile`` and held against the archive before a member is read.

Archives of tensors are written in one go: members lie one after another from
the first byte, then the directory, then its end. Everything else, such as bytes
that belong to no member, members that share bytes, or two places that tell a
member's name and size differently, exists to show two readers two things.
``zipfile`` passes over all of that; here it is refused. It also believes what
a member says of its size, and takes no end of a compressed one for an end.

The format: APPNOTE.TXT 6.3.10, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlxlora_core.errors import MlxloraError, ModelError, listing
from mlxlora_core.files.input_file import AGAIN, read_exactly
from mlxlora_core.files.tensor_header import TENSORS_LIMIT, name_fault

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q4sLQL")  # with the locator, which stands between it and the end
_LOCAL = struct.Struct("<4s5H3L2H")
_DESCRIPTORS = (struct.Struct("<4sL2Q"), struct.Struct("<4s3L"))

_TAIL_BYTES = _END_64.size + _END.size + 65535  # the end of an archive with the longest comment
_DIRECTORY_BYTES = 64 << 20
_FULL = (0xFFFF, 0xFFFFFFFF)  # the value stands in a 64-bit field elsewhere
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
    """What an archive holds: its members, in the order of the directory, and its comment."""

    members: tuple[ZipMember, ...]
    comment: bytes


class _Trick(Exception):
    """A layout that no writer makes."""


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
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - _TAIL_BYTES))
    tail = read_exactly(file, min(size, _TAIL_BYTES), path)
    try:
        start, count, comment = _check_end(file, tail, size)
        return ZipLayout(_members(file, _records(file, start, count), start, path), comment)
    except _Trick as fault:
        raise trick(f"{fault}, as no writer of tensors makes it", where=path) from None
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as fault:
        raise ModelError(
            f"is truncated or damaged at {size} bytes: {str(fault)[:200]}", where=path, fix=AGAIN
        ) from None


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


def _check_end(file: BinaryIO, tail: bytes, size: int) -> tuple[int, int, bytes]:
    """Where the directory begins, how many members it has, and the comment.

    ``zipfile`` takes any end, and leaves out what its numbers do not reach.
    """
    places = [match.start() for match in re.finditer(b"PK\5\6", tail)]
    ends = [at for at in places if tail[at + 20 : at + 22] == struct.pack("<H", len(tail) - at - 22)]
    if len(ends) != 1:
        raise _Trick("has two ends") if ends else zipfile.BadZipFile("its directory is missing")
    (at,) = ends
    _, disk, first, here, count, length, start, _ = _END.unpack_from(tail, at)
    stop = size - len(tail) + at
    if tail[max(0, at - 20) : at].startswith(b"PK\6\7"):
        stop -= _END_64.size
        here, count, length, start = _wide_end(tail[max(0, at - 76) : at], stop, here, count, length, start)
    if disk or first or here != count:
        raise _Trick("is one part of several")
    if start + length < stop:
        raise _Trick("holds bytes in front of its first member")
    if start + length > stop:
        raise zipfile.BadZipFile(f"its directory should end at byte {start + length} and ends at {stop}")
    file.seek(start)
    # Counted before any is looked at: each takes memory, and zipfile does not mind the number.
    if count > TENSORS_LIMIT or length > _DIRECTORY_BYTES or count < file.read(length).count(b"PK\1\2"):
        raise _Trick(f"has {count} members in {length} bytes, wanted at most {TENSORS_LIMIT}")
    return start, count, tail[at + _END.size :]


def _wide_end(data: bytes, place: int, *numbers: int) -> tuple[int, ...]:
    """The 64-bit numbers of an end that begins at byte ``place``, which must not differ from the others."""
    kind, length, _, _, disk, first, *wide, _, _, told, disks = _END_64.unpack(data)
    agree = all(number in (*_FULL, other) for number, other in zip(numbers, wide, strict=True))
    if kind != b"PK\6\6" or length != 44 or disk or first or disks > 1 or told > place or not agree:
        raise zipfile.BadZipFile("its directory has two ends that differ")
    if told < place:
        raise _Trick("holds bytes in front of its first member")
    return tuple(wide)


def _records(file: BinaryIO, start: int, count: int) -> list[zipfile.ZipInfo]:
    """The directory, which begins at ``start``."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if (archive.start_dir, len(records)) != (start, count):
            raise zipfile.BadZipFile(f"its directory has {len(records)} members and should have {count}")
    twice = sorted(name for name, n in Counter(r.orig_filename for r in records).items() if n > 1)
    if twice:
        raise _Trick(f"holds two members of one name: {listing(twice)}")
    return records


def _members(file: BinaryIO, records: list[zipfile.ZipInfo], stop: int, path: Path) -> tuple[ZipMember, ...]:
    """The members before byte ``stop``, at which the directory begins."""
    members: dict[str, ZipMember] = {}
    at = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        _check_record(record)
        if record.header_offset != at:
            shares = record.header_offset < at
            what = "shares bytes with another" if shares else "stands behind bytes of no member"
            raise _Trick(
                f"{record.orig_filename} {what}" if at else "holds bytes in front of its first member"
            )
        members[record.orig_filename], at = _member(file, record, stop, path)
    if at != stop:
        raise _Trick(f"holds {stop - at} bytes between its last member and its directory")
    return tuple(members[record.orig_filename] for record in records)


def _check_record(record: zipfile.ZipInfo) -> None:
    """Refuse what the directory says of a member where no writer says so."""
    name = record.orig_filename
    if fault := name_fault(name):
        raise _Trick(f"the name of member {name[:80]!r} {fault}")
    if record.flag_bits & _ENCRYPTED:
        raise _Trick(f"{name} is encrypted")
    if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _Trick(f"{name} is compressed by method {record.compress_type}, wanted none or deflate")
    if record.compress_type == zipfile.ZIP_STORED and record.file_size != record.compress_size:
        sizes = f"{record.compress_size} bytes and should unpack to {record.file_size}"
        raise _Trick(f"{name} is {sizes}, but is not compressed")


def _member(file: BinaryIO, record: zipfile.ZipInfo, stop: int, path: Path) -> tuple[ZipMember, int]:
    """A member by its own header, which must say what the directory says, and where it ends."""
    name, wanted = record.orig_filename, (record.CRC, record.compress_size, record.file_size)
    at = record.header_offset
    file.seek(at)
    fields = _LOCAL.unpack(read_exactly(file, min(_LOCAL.size, stop - at), path))
    signature, _, flags, method, _, _, crc, packed, size, letters, extras = fields
    start = at + _LOCAL.size + letters + extras
    end = start + record.compress_size
    if signature != b"PK\3\4" or end > stop:
        raise zipfile.BadZipFile(f"{name} is cut")
    if read_exactly(file, letters, path).decode("utf-8" if flags & _UTF8 else "cp437") != name:
        raise _Trick(f"{name} has another name in its own header")
    differing = (flags ^ record.flag_bits) & (_ENCRYPTED | _SIZES_BEHIND | _UTF8)
    if differing or method != record.compress_type:
        raise _Trick(f"{name} is packed in another way by its own header")
    if flags & _SIZES_BEHIND:
        file.seek(end)
        behind = read_exactly(file, min(_DESCRIPTORS[0].size, stop - end), path)
        forms = [
            f for f in _DESCRIPTORS if f.unpack(behind[: f.size].ljust(f.size)) == (b"PK\7\x08", *wanted)
        ]
        if not forms:
            raise _Trick(f"{name} is followed by another size or checksum")
        end += forms[0].size
    elif (crc, *_wide(read_exactly(file, extras, path), size, packed)[::-1]) != wanted:
        raise _Trick(f"{name} has another size or checksum in its own header")
    deflated = method == zipfile.ZIP_DEFLATED
    return ZipMember(name, start, record.compress_size, record.file_size, deflated, record.CRC), end


def _wide(extras: bytes, *numbers: int) -> tuple[int, ...]:
    """``numbers`` with each that is full replaced by its 64-bit value in the extra fields."""
    at = 0
    while _FULL[1] in numbers and at + 4 <= len(extras):
        tag, length = struct.unpack_from("<2H", extras, at)
        if tag == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extras, at + 4))
            return tuple(next(values, n) if n == _FULL[1] else n for n in numbers)
        at += 4 + length
    return numbers
