"""Seeded damage to files: the same number gives the same bytes on every machine."""

from __future__ import annotations

import io
import random
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

_NUMBER = re.compile(rb"-?[0-9]+")
_DECIMALS = (b"-1", b"0", b"1", b"7", b"255", b"65536", b"2147483647", b"2147483648", b"4294967296", b"1e9")
_DECIMALS += (b"9223372036854775807", b"18446744073709551615", b"99999999999999999999999", b"0.5", b"00", b"")
_INTEGERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63, 2**64 - 1)
_TOKENS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"null",
    b"true",
    b"NaN",
    b"\\ud800",
    b"\0",
    b"\n",
    b"\xff",
)
_TOKENS += (b"../", b"/etc/passwd", b"F32", b"BF16", b"U8", b"I64", b"<f8", b"|O", b"<U1", b"\x1b[2J", b"'")
_TOKENS += (
    b"__metadata__",
    b"\xef\xbb\xbf",
    b"[" * 5000,
    b"PK\5\6",
    b"PK\3\4",
    b"cos\nsystem\n",
    b"R.",
    b"=",
)

Change = Callable[[bytearray, random.Random], None]


def mutation(data: bytes, others: Sequence[bytes], header_bytes: int, name: str, number: int) -> bytes:
    """A good file with the damage of one number.

    Args:
        data: the good file.
        others: more good files, to splice from.
        header_bytes: how many bytes at the start are all flipped and cut at, one after another.
        name: of the kind of file; seeds the damage.
        number: which damage. Numbers divisible by 4 flip one bit of each
            byte of the header in turn, the next ones cut the file at each, and the
            rest is drawn.
    """
    draw = random.Random(f"{name}/{number}")
    turn, way = divmod(number, 4)
    out = bytearray(data)
    if way == 0:
        out[turn % min(header_bytes, len(out))] ^= 1 << draw.randrange(8)
    elif way == 1:
        edges = [*range(min(header_bytes, len(data))), *range(4096, len(data), 4096)]
        edges += [edge + step for edge in (header_bytes, *edges[-8:], len(data)) for step in (-1, 0, 1)]
        del out[edges[turn % len(edges)] :]
    elif way == 2 and data.startswith(b"PK\3\4"):
        out = _inside(data, draw)
    else:
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            if out:
                draw.choice(_CHANGES)(out, draw)
        if draw.random() < 0.1:
            other = draw.choice(others)
            out[draw.randrange(len(out) + 1) :] = other[draw.randrange(len(other)) :]
    return bytes(out)


def _inside(data: bytes, draw: random.Random) -> bytearray:
    """A zip archive written anew with one member damaged, so that its checksums are good."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    victim = draw.randrange(len(members))
    name, content = members[victim]
    changed = bytearray(content)
    # The start is where a member says what it is.
    head = changed[: draw.choice((len(changed), min(160, len(changed))))]
    rest = changed[len(head) :]
    for _ in range(draw.choice((1, 1, 2, 4))):
        if head:
            draw.choice(_CHANGES)(head, draw)
    name = draw.choice((name, name, name, name, "../" + name, name.upper(), members[0][0], name + "\x1b"))
    members[victim] = name, bytes(head + rest)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two members of one name
        method = draw.choice((zipfile.ZIP_STORED,) * 3 + (zipfile.ZIP_DEFLATED,))
        with zipfile.ZipFile(out, "w", method) as archive:
            for member, content in members:
                archive.writestr(member, content)
    return bytearray(out.getvalue())


def _set_bytes(out: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 3, 20))):
        out[draw.randrange(len(out))] = draw.choice((0, 0x80, 0xFF, draw.randrange(256)))


def _set_integer(out: bytearray, draw: random.Random) -> None:
    form = draw.choice(("<H", "<I", "<I", "<Q"))
    size = struct.calcsize(form)
    if len(out) >= size:
        at = draw.randrange(len(out) - size + 1)
        near = struct.unpack_from(form, out, at)[0] + draw.choice((-1, 1, 8))
        value = draw.choice((*_INTEGERS, near, near, near))
        struct.pack_into(form, out, at, value % (1 << 8 * size))


def _set_decimal(out: bytearray, draw: random.Random) -> None:
    found = list(_NUMBER.finditer(out))[:2000]
    if found:
        match = draw.choice(found)
        near = str(int(match[0][:20] if match[0] != b"-" else b"0") + draw.choice((-1, 1, 8))).encode()
        out[match.start() : match.end()] = draw.choice((*_DECIMALS, near, near, near))


def _put_token(out: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(out))
    token = draw.choice(_TOKENS)
    out[at : at + draw.choice((0, 1, len(token)))] = token


def _move(out: bytearray, draw: random.Random) -> None:
    start, length = draw.randrange(len(out)), draw.choice((1, 4, 30, 300))
    part, at = out[start : start + length], draw.randrange(len(out))
    out[at : at + draw.choice((0, length))] = part


def _delete(out: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(out))
    del out[start : start + draw.choice((1, 2, 8, 100))]


def _append(out: bytearray, draw: random.Random) -> None:
    out += draw.choice((b"\0", b"}", b"\n", bytes(8), draw.randbytes(100), bytes(out)))


_CHANGES: tuple[Change, ...] = (
    *(_set_bytes, _set_integer, _set_decimal, _set_decimal, _put_token, _move, _delete, _append),
)


def summary(faults: Mapping[int, str]) -> Iterator[str]:
    """The commonest faults that mutations have made, a line each: how often, what, and which was the first.

    Args:
        faults: number of the mutation -> what went wrong.
    """
    told = Counter(fault[:120] for fault in faults.values())
    for fault, times in told.most_common(12):
        first = next(number for number, text in faults.items() if text.startswith(fault))
        yield f"    {times} x {fault} (first: {first})\n"
