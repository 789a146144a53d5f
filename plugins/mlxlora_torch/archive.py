"""A ``.pth`` as the zip archive that it is: checked, and read without torch.

Every size comes from the file: members are stored and not compressed, fill the
file one after another, and are as long as the tensors in them need. So no
tensor can ask for more memory than its file takes.

Layout, written by ``torch.save`` since 1.6: ``NAME/data.pkl`` is a pickle that
describes the tensors, ``NAME/data/KEY`` the bytes of one storage.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlxlora_core.api import ModelError, SafetyError, listing
from mlxlora_core.files import ZipMember, open_regular, read_exactly, read_zip_layout, refuse_stand_in
from mlxlora_torch.names import model_tensors
from mlxlora_torch.program import StoredTensor, read_program

#: the dtypes that are read -> bytes an element
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

_PROGRAM_LIMIT_BYTES = 4 << 20  # a tensor takes about 250 bytes
_CHUNK_BYTES = 1 << 20
_LARGEST_AXIS = 2**31 - 1  # MLX counts in 32 bits
_AGAIN = "download the file again"
_UNSAFE = "get the weights from a source that you trust, saved by torch 1.6 or newer"
_RESAVE = "if you trust it, load it with torch and save it again: torch.save(tensors, path)"
_PICKLE = "is a bare pickle (torch's format before 1.6, or none of torch's)"

#: first bytes -> what the file is: wrappers and formats in which code can hide
_FOREIGN = (
    *((bytes([0x80, protocol]), _PICKLE) for protocol in range(1, 6)),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
    (b"\x1f\x8b", "is a gzip archive"),
    (b"BZh", "is a bzip2 archive"),
    (b"\xfd7zXZ\x00", "is an xz archive"),
    (b"\x28\xb5\x2f\xfd", "is a zstd archive"),
    (b"Rar!", "is a rar archive"),
)


@dataclass(frozen=True)
class Archive:
    """A ``.pth`` that was found to hold tensors and nothing else.

    Attributes:
        path: the file.
        identity: device, inode, size and time of change, to notice another file in its place.
        tensors: name -> where it is in the file.
        members: storage key -> its bytes.
        notes: what was done to find the tensors, in words.
    """

    path: Path
    identity: tuple[int, ...]
    tensors: Mapping[str, StoredTensor]
    members: Mapping[str, ZipMember]
    notes: Sequence[str]

    def position(self, name: str) -> int:
        """Byte of the file at which a tensor begins."""
        tensor = self.tensors[name]
        return self.members[tensor.storage.key].start + tensor.offset * ITEM_BYTES[tensor.dtype]

    def open(self) -> BinaryIO:
        """Open the file again.

        Raises:
            ModelError: it is not the one that was checked.
        """
        file = open_regular(self.path)
        if _identity(os.fstat(file.fileno())) != self.identity:
            file.close()
            raise ModelError("changed while it was being read", where=self.path, fix="start again")
        return file

    def check_bytes(self, file: BinaryIO, key: str) -> None:
        """Raise ModelError when a storage of the open file differs from its checksum.

        The bytes are read and not mapped, so that a large storage takes no memory.
        """
        member = self.members[key]
        if not member.crc:
            return
        crc, left = 0, member.size_bytes
        file.seek(member.start)
        while left:
            chunk = read_exactly(file, min(left, _CHUNK_BYTES), self.path)
            crc = zlib.crc32(chunk, crc)
            left -= len(chunk)
        if crc != member.crc:
            names = [name for name, tensor in self.tensors.items() if tensor.storage.key == key]
            raise ModelError(
                f"the bytes of {listing(names)} do not match their checksum", where=self.path, fix=_AGAIN
            )


def open_archive(path: Path) -> Archive:
    """Check a ``.pth`` without torch.

    Raises:
        ModelError: no zip archive of torch's, damaged, or with tensors of other dtypes (all listed).
        SafetyError: it asks for code, is packed in a way that can hide it, or is compressed.
    """
    with open_regular(path) as file:
        identity = _identity(os.fstat(file.fileno()))
        _check_head(file, path)
        layout = read_zip_layout(file, path, SafetyError)
        if layout.comment:
            raise SafetyError("carries a zip comment, which torch never writes", where=path, fix=_UNSAFE)
        _check_members(layout.members, path)
        top = next(m.name for m in layout.members if m.name.endswith("/data.pkl"))[: -len("data.pkl")]
        members = {member.name.removeprefix(top): member for member in layout.members}
        _check_byte_order(file, members, path)
        program = _content(file, members["data.pkl"], path)
    tensors, notes = model_tensors(read_program(program, path), ITEM_BYTES, path)
    if members["data.pkl"].crc not in (0, zlib.crc32(program)):
        raise ModelError("its table of tensors does not match its checksum", where=path, fix=_AGAIN)
    storages = {key.removeprefix("data/"): m for key, m in members.items() if key.startswith("data/")}
    _check_tensors(tensors, storages, path)
    return Archive(path, identity, tensors, storages, notes)


def _check_head(file: BinaryIO, path: Path) -> None:
    """Tell what a file is that is no zip archive."""
    head = refuse_stand_in(file, path)
    if head.startswith(b"PK\x03\x04"):
        return
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise SafetyError(what, where=path, fix=_RESAVE if what == _PICKLE else _UNSAFE)
    if head[257:262] == b"ustar":
        raise SafetyError("is a tar archive", where=path, fix=_UNSAFE)
    raise ModelError(
        "is no PyTorch checkpoint", where=path, fix="name a folder with the weights as torch saves them"
    )


def _check_members(members: Sequence[ZipMember], path: Path) -> None:
    """Refuse what torch.save does not write: compression, TorchScript, other members."""
    names = [member.name for member in members]
    tops = {name.split("/", 1)[0] for name in names}
    inner = [name.split("/", 1)[-1] for name in names]
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise SafetyError("is a TorchScript archive, which holds code", where=path, fix=_UNSAFE)
    if len(tops) != 1 or "data.pkl" not in inner:
        raise ModelError(
            "is a zip archive, but not one of torch.save", where=path, fix="name the file that torch saved"
        )
    known = ("data.pkl", "version", "byteorder")
    strange = [name for name in inner if name not in known and not name.startswith(("data/", "."))]
    if strange:
        raise SafetyError(
            f"holds {listing(strange)}, which torch.save does not write", where=path, fix=_UNSAFE
        )
    packed = [member.name for member in members if member.deflated]
    if packed:
        raise SafetyError(
            f"{listing(packed)} compressed, which torch.save never does: it could unpack to any size",
            where=path,
            fix=_UNSAFE,
        )


def _check_byte_order(file: BinaryIO, members: Mapping[str, ZipMember], path: Path) -> None:
    """Refuse a file of the other byte order: turning it round would touch all of it at once."""
    order = (
        _content(file, members["byteorder"], path).decode("ascii", "replace")
        if "byteorder" in members
        else ""
    )
    if order and order != sys.byteorder:
        raise ModelError(
            f"was saved on a {order}-endian machine, this is a {sys.byteorder}-endian one",
            where=path,
            fix="load and save it with torch first",
        )


def _content(file: BinaryIO, member: ZipMember, path: Path) -> bytes:
    """The bytes of a small member."""
    if member.size_bytes > _PROGRAM_LIMIT_BYTES:
        raise ModelError(
            f"its table of tensors is larger than {_PROGRAM_LIMIT_BYTES >> 20} MiB", where=path, fix=_AGAIN
        )
    file.seek(member.start)
    return read_exactly(file, member.size_bytes, path)


def _check_tensors(
    tensors: Mapping[str, StoredTensor], storages: Mapping[str, ZipMember], path: Path
) -> None:
    """Check dtypes, and that every tensor lies within bytes that are really there."""
    foreign = [f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in ITEM_BYTES]
    if foreign:
        raise ModelError(
            f"{listing(foreign)}; wanted {', '.join(ITEM_BYTES)}", where=path, fix="cast them and save again"
        )
    faults = [f"{name} {fault}" for name, t in tensors.items() if (fault := _misfit(t, storages))]
    if faults:
        raise ModelError(listing(faults), where=path, fix=_AGAIN)


def _misfit(tensor: StoredTensor, storages: Mapping[str, ZipMember]) -> str:
    """Why a tensor does not fit its storage, or nothing."""
    storage = tensor.storage
    if storage.key not in storages:
        return f"has no bytes (data/{storage.key} is missing)"
    have = storages[storage.key].size_bytes
    item = ITEM_BYTES[tensor.dtype]
    if storage.elements * (1 if storage.dtype == "untyped" else item) != have:
        return f"wants {storage.elements} elements, its storage has {have} bytes"
    need = max(tensor.offset + tensor.span, tensor.elements) * item
    if need > have:
        return f"needs {need} bytes, its storage has {have}"
    longest = max(tensor.shape, default=0)
    return (
        f"has an axis of {longest} elements, wanted at most {_LARGEST_AXIS}"
        if longest > _LARGEST_AXIS
        else ""
    )


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
