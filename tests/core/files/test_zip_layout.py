"""An archive that tells two readers two things is refused, and so is one that asks for more than it holds."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxlora_core.errors import ModelError, SafetyError
from mlxlora_core.files import tensor_file
from mlxlora_core.files.zip_layout import read_zip_layout, read_zip_member

CONTENT = {"a.npy": b"first" * 40, "folder/b.npy": b"", "é.npy": bytes(1000)}


def made(*, wide: bool = False, stream: bool = False) -> bytes:
    """An archive of CONTENT; with 64-bit sizes; written as to a pipe, with the sizes behind each member."""
    file = io.BytesIO()
    target: io.BytesIO = _Pipe(file) if stream else file
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in CONTENT.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=wide) as member:
                member.write(content)
    return file.getvalue()


class _Pipe(io.BytesIO):
    """Takes bytes and cannot go back."""

    def __init__(self, target: io.BytesIO) -> None:
        super().__init__()
        self.target = target

    def write(self, data: Any) -> int:
        return self.target.write(data)

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise OSError


def read(path: Path) -> dict[str, bytes]:
    with open(path, "rb") as file:
        layout = read_zip_layout(file, path, SafetyError)
        return {member.name: read_zip_member(file, member, path) for member in layout.members}


GOOD = {
    "stored": made(),
    "64-bit sizes": made(wide=True),
    "written to a pipe": made(stream=True),
}


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD)
def test_what_zipfile_writes_is_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    assert read(path) == CONTENT
    with zipfile.ZipFile(path) as theirs:
        assert {name: theirs.read(name) for name in theirs.namelist()} == CONTENT


def test_what_other_writers_write_is_read(tmp_path: Path) -> None:
    path, npz = tmp_path / "x.zip", tmp_path / "x.npz"
    torch.save({"a": torch.arange(5.0), "b": torch.ones(300)}, path)
    np.savez_compressed(str(npz), a=np.arange(5000), b=np.ones(3))
    mx.savez(str(tmp_path / "y.npz"), a=mx.ones(3))
    for archive in (path, npz, tmp_path / "y.npz"):
        with zipfile.ZipFile(archive) as theirs:
            assert read(archive) == {name: theirs.read(name) for name in theirs.namelist()}
    with zipfile.ZipFile(path, "w"):
        pass
    assert read(path) == {}


# --- what no writer makes -----------------------------------------------------


def central(content: bytes, number: int = 0) -> int:
    """Where the directory's record of a member begins."""
    at = -1
    for _ in range(number + 1):
        at = content.index(b"PK\1\2", at + 1)
    return at


def patch(content: bytes, at: int, form: str, value: int) -> bytes:
    out = bytearray(content)
    struct.pack_into(form, out, at, value)
    return bytes(out)


def insert(content: bytes, at: int, data: bytes) -> bytes:
    """Put bytes between members, and have the directory's end say so."""
    out = content[:at] + data + content[at:]
    end = out.rindex(b"PK\5\6")
    (start,) = struct.unpack_from("<L", out, end + 16)
    return patch(out, end + 16, "<L", start + len(data))


PLAIN = made()
END = PLAIN.rindex(b"PK\5\6")
FIRST_LOCAL, SECOND_LOCAL = 0, PLAIN.index(b"PK\3\4", 1)
FIRST, SECOND = central(PLAIN), central(PLAIN, 1)
PIPED = made(stream=True)

TRICKS = {
    "bytes in front": (b"#!" + PLAIN, "in front of its first member"),
    "two archives": (made(wide=True) + PLAIN, "in front of its first member"),
    "a hole": (
        patch(patch(insert(PLAIN, SECOND_LOCAL, b"hidden"), SECOND + 6 + 42, "<L", SECOND_LOCAL + 6),
              central(PLAIN, 2) + 6 + 42, "<L", PLAIN.index(b"PK\3\4", SECOND_LOCAL + 1) + 6),
        "folder/b.npy stands behind bytes of no member",
    ),
    "bytes before the directory": (insert(PLAIN, FIRST, b"hidden"), "6 bytes between its last member"),
    "two members in one place": (patch(PLAIN, SECOND + 42, "<L", 0), "another name|shares bytes"),
    "another name inside": (PLAIN.replace(b"a.npy", b"z.npy", 1), "a.npy has another name in its own header"),
    "another size inside": (patch(PLAIN, 22, "<L", 3), "a.npy has another size"),
    "another checksum inside": (patch(PLAIN, 14, "<L", 3), "a.npy has another size or checksum"),
    "another method inside": (patch(PLAIN, 8, "<H", 8), "a.npy is packed in another way"),
    "another checksum behind": (PIPED.replace(b"PK\7\x08", b"PK\7\x07", 1), "followed by another size"),
    "grows without compression": (patch(PLAIN, FIRST + 24, "<L", 1 << 31), "but is not compressed"),
    "encrypted": (patch(PLAIN, FIRST + 8, "<H", 1), "a.npy is encrypted"),
    "another compression": (patch(PLAIN, FIRST + 10, "<H", 12), "a.npy is compressed by method 12"),
    "a way out": (PLAIN.replace(b"folder/b", b"../../ab"), "out of its place"),
    "an absolute name": (PLAIN.replace(b"folder/b", b"/etc/abc"), "out of its place"),
    "a name that clears the screen": (PLAIN.replace(b"folder/b", b"\x1b[2Jold/"), "cannot be printed"),
    "a name cut by a zero": (PLAIN.replace(b"folder/b", b"a.npy\0/b"), "cannot be printed"),
    "one part of several": (patch(PLAIN, END + 4, "<H", 1), "is one part of several"),
    "two ends": (PLAIN[:END] + PLAIN[END : END + 20] + struct.pack("<H", 22) + PLAIN[END:], "has two ends"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "says"), TRICKS.values(), ids=TRICKS)
def test_a_layout_that_no_writer_makes_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    with pytest.raises(SafetyError, match=says) as caught:
        read(path)
    assert str(caught.value).isprintable()
    with open(path, "rb") as file, pytest.raises(ModelError, match=says):
        read_zip_layout(file, path)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", b"shown")
            archive.writestr("a", b"run")
    with pytest.raises(SafetyError, match="two members of one name: a"):
        read(path)


def test_more_members_than_a_model_has_tensors_are_refused_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    record = b"PK\6\6" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, 10**6, 10**6, 0, 0)
    locator = b"PK\6\7" + struct.pack("<LQL", 0, 0, 1)
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(record + locator + end)
    with pytest.raises(ModelError, match="has 1000000 members in 0 bytes, wanted at most 100000"):
        tensor_file.load(path)


def test_the_number_of_members_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    for count, kind, says in (
        (4, ModelError, "has 3 members and should have 4"),
        (2, SafetyError, "has 2 members"),
    ):
        path.write_bytes(patch(patch(PLAIN, END + 8, "<H", count), END + 10, "<H", count))
        with pytest.raises(kind, match=says):
            read(path)


def test_a_wrong_64_bit_end_is_damaged(tmp_path: Path) -> None:
    """Of two ends that differ, one reader takes the one and another the other."""
    path = tmp_path / "x.zip"
    start = PLAIN.index(b"PK\1\2")
    numbers = (3, 3, END - start, start)
    small = PLAIN[END:]

    def end(numbers: tuple[int, ...], place: int = END, length: int = 44) -> bytes:
        record = b"PK\6\6" + struct.pack("<Q2H2L4Q", length, 45, 45, 0, 0, *numbers)
        return PLAIN[:END] + record + b"PK\6\7" + struct.pack("<LQL", 0, place, 1) + small

    path.write_bytes(end(numbers))
    assert read(path) == CONTENT
    for content in (
        end((3, 3, END - start, start - 1)),
        end((2, 2, END - start, start)),
        end(numbers, length=45),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="two ends that differ"):
            read(path)
    path.write_bytes(end(numbers, place=0))
    with pytest.raises(SafetyError, match="in front of its first member"):
        read(path)


def test_an_archive_cut_anywhere_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    for whole in GOOD.values():
        for length in [*range(0, len(whole), 23), len(whole) - 1]:
            path.write_bytes(whole[:length])
            with pytest.raises(ModelError, match=f"damaged at {length} bytes"):
                read(path)


def test_bytes_that_are_not_those_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(PLAIN.replace(b"first", b"thirf", 1))
    with pytest.raises(ModelError, match=r"the bytes of a\.npy do not match their CRC-32"):
        read(path)


# --- bombs --------------------------------------------------------------------


def bomb(size: int, claimed: int) -> bytes:
    """An archive whose member unpacks to ``size`` zeros and says that it has ``claimed``."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(bytes(size)) + packer.flush()
    name = b"a.npy"
    sizes = struct.pack("<3L", zlib.crc32(bytes(min(size, claimed))), len(packed), claimed)
    middle = struct.pack("<4H", 0, 8, 0, 0) + sizes + struct.pack("<2H", len(name), 0)
    local = b"PK\3\4" + struct.pack("<H", 20) + middle + name + packed
    record = b"PK\1\2" + struct.pack("<2H", 20, 20) + middle + struct.pack("<3H2L", 0, 0, 0, 0, 0) + name
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 1, 1, len(record), len(local), 0)
    return local + record + end


def test_a_zip_bomb_is_refused_by_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    content = bomb(20 << 20, 20 << 20)
    assert len(content) < 1 << 17
    path.write_bytes(content)
    with zipfile.ZipFile(path) as theirs:
        assert theirs.testzip() is None, "it is a good archive, and a bomb"
    with pytest.raises(ModelError, match=r"\d+ bytes would unpack to 20971520"):
        tensor_file.load(path)


def test_a_zip_bomb_that_says_less_is_unpacked_no_further(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(bomb(20 << 20, 1000))
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=r"a\.npy does not unpack to its size"):
            tensor_file.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    path.write_bytes(bomb(1000, 1001))
    with pytest.raises(ModelError, match=r"a\.npy does not unpack to its size"):
        tensor_file.load(path)
