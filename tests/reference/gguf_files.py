"""GGUF files for tests: a writer that can be told to lie, and a slow plain reader to hold mlxlora's against.

Nothing here shares code with the loader. Weights are worked out one by one in
exact arithmetic (float64 holds every product and sum of these formats) and
rounded to float32 once, after the block layouts in ``docs/kinds/weight-loaders.md`` and
``ggml-common.h`` of llama.cpp.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: name -> number in the file, weights of a block, bytes of a block
TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "BF16": (30, 1, 2),
}
PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K")
#: where the float16 numbers of a block stand
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q6_K": (208,),
}

U8, I8, U16, I16, U32, I32, F32, BOOL, TEXT, ARRAY, U64, I64, F64 = range(13)
_FORMS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B"}
_FORMS |= {U64: "Q", I64: "q", F64: "d"}


# --- writing ------------------------------------------------------------------


@dataclass
class Tensor:
    """A tensor to write; what is stated of it may be changed before it is.

    Attributes:
        name: in the file.
        shape: rows first.
        type: a name of :data:`TYPES`.
        data: its bytes.
        number: what the file says its type is, where that is something else.
        offset: what the file says its offset is, where that is something else.
        axes: what the file says its axes are, where that is something else.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: bytes
    number: int | None = None
    offset: int | None = None
    axes: Sequence[int] | None = None


def text(value: str | bytes) -> bytes:
    """A string as the file has it."""
    content = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(content)) + content


def value(kind: int, content: Any) -> bytes:
    """A value with its type in front; an array is ``(type of its items, items)``."""
    if kind == ARRAY:
        inner, items = content
        each = text if inner == TEXT else lambda item: struct.pack("<" + _FORMS[inner], item)
        return struct.pack("<IIQ", ARRAY, inner, len(items)) + b"".join(map(each, items))
    return struct.pack("<I", kind) + (
        text(content) if kind == TEXT else struct.pack("<" + _FORMS[kind], content)
    )


def guessed(content: Any) -> bytes:
    """A value of the type that converters give it."""
    match content:
        case bool():
            return value(BOOL, content)
        case int():
            return value(U32, content)
        case float():
            return value(F32, content)
        case str() | bytes():
            return value(TEXT, content)
        case [str() | bytes(), *_]:
            return value(ARRAY, (TEXT, content))
        case [int(), *_]:
            return value(ARRAY, (I32, content))
        case _:
            return value(ARRAY, (F32, content))


def gguf(
    keys: Mapping[str, Any] | Sequence[tuple[str | bytes, bytes]],
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    count: int | None = None,
    keys_count: int | None = None,
    pad_end: bool = True,
) -> bytes:
    """A file, of keys as plain values or as pairs of a name and a value with its type."""
    if isinstance(keys, Mapping):
        keys = [(name, guessed(content)) for name, content in keys.items()]
        if alignment != 32:
            keys.append(("general.alignment", value(U32, alignment)))
    head = struct.pack(
        "<4sIQQ",
        b"GGUF",
        version,
        len(tensors) if count is None else count,
        len(keys) if keys_count is None else keys_count,
    )
    head += b"".join(text(name) + content for name, content in keys)
    data = b""
    for tensor in tensors:
        data += bytes(-len(data) % alignment)
        axes = tuple(reversed(tensor.shape)) if tensor.axes is None else tensor.axes
        number = TYPES[tensor.type][0] if tensor.number is None else tensor.number
        offset = len(data) if tensor.offset is None else tensor.offset
        head += text(tensor.name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, number, offset)
        data += tensor.data
    if not tensors:
        return head
    return head + bytes(-len(head) % alignment) + data + bytes(-len(data) % alignment if pad_end else 0)


def blocks(kind: str, count: int, seed: int = 0, large: float = 2.0) -> bytes:
    """Blocks of any bytes, whose float16 numbers are finite and not above ``large``; edges first."""
    draw = random.Random(f"{kind} {seed}")
    size = TYPES[kind][2]
    edges = (0.0, -0.0, 2.0**-24, -(2.0**-24), 1023 * 2.0**-24, 2.0**-14, 1.0, -1.0, large, -large)
    found = []
    for number in range(count):
        block = bytearray(draw.randbytes(size))
        if number < 6:
            block[:] = bytes([(0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F)[number]]) * size
        for at in HALVES[kind]:
            edge = edges[(number + at) % len(edges)] if number < 20 else draw.uniform(-large, large)
            struct.pack_into("<e", block, at, edge)
        found.append(bytes(block))
    return b"".join(found)


# --- weights ------------------------------------------------------------------


def weights(kind: str, data: bytes) -> list[float]:
    """The weights in some bytes, in float64, exact."""
    _, count, size = TYPES[kind]
    if count == 1:
        if kind == "BF16":
            data = b"".join(b"\0\0" + data[at : at + 2] for at in range(0, len(data), 2))
        return [number for (number,) in struct.iter_unpack("<e" if kind == "F16" else "<f", data)]
    formula = _FORMULAS[kind]
    return [weight for at in range(0, len(data), size) for weight in formula(data[at : at + size])]


def integers(kind: str, block: bytes) -> list[int]:
    """The unsigned integers of one packed block, in the order of its weights."""
    match kind:
        case "Q8_0":
            return [number + 128 for number in struct.unpack("<32b", block[2:])]
        case "Q4_0" | "Q4_1":
            return _halves(block[-16:])
        case "Q5_0" | "Q5_1":
            high = int.from_bytes(block[-20:-16], "little")
            return [low + (high >> i & 1) * 16 for i, low in enumerate(_halves(block[-16:]))]
        case "Q4_K":
            return [n for c in range(4) for n in _halves(block[16 + 32 * c : 48 + 32 * c])]
        case _:
            low = [n for c in range(4) for n in _halves(block[48 + 32 * c : 80 + 32 * c])]
            return [n + (block[16 + i % 32] >> i // 32 & 1) * 16 for i, n in enumerate(low)]


def groups(kind: str, block: bytes) -> list[tuple[float, float]]:
    """(scale, bias) of each group of 32 of one packed block, exact."""
    d, m = struct.unpack("<2e", block[:4])
    match kind:
        case "Q4_0":
            return [(d, -8 * d)]
        case "Q5_0":
            return [(d, -16 * d)]
        case "Q8_0":
            return [(d, -128 * d)]
        case "Q4_1" | "Q5_1":
            return [(d, m)]
        case _:
            return [(d * scale, -m * offset) for scale, offset in (_six(block[4:16], j) for j in range(8))]


def _halves(data: bytes) -> list[int]:
    return [byte & 15 for byte in data] + [byte >> 4 for byte in data]


def _six(c: bytes, j: int) -> tuple[int, int]:
    if j < 4:
        return c[j] & 63, c[j + 4] & 63
    return (c[j + 4] & 15) | (c[j - 4] >> 6) << 4, (c[j + 4] >> 4) | (c[j] >> 6) << 4


def _affine(kind: str) -> Callable[[bytes], Iterator[float]]:
    def formula(block: bytes) -> Iterator[float]:
        found = groups(kind, block)
        for i, number in enumerate(integers(kind, block)):
            scale, bias = found[i // 32]
            yield number * scale + bias

    return formula


def _q6_k(block: bytes) -> Iterator[float]:
    low, high, scales = block[:128], block[128:192], struct.unpack("<16b", block[192:208])
    (d,) = struct.unpack("<e", block[208:])
    for i in range(256):
        half, within = divmod(i, 128)
        quarter, j = divmod(within, 32)
        nibble = low[64 * half + 32 * (quarter % 2) + j] >> 4 * (quarter // 2) & 15
        number = nibble | (high[32 * half + j] >> 2 * quarter & 3) << 4
        yield d * scales[i // 16] * (number - 32)


_FORMULAS = {kind: _affine(kind) for kind in PACKED} | {"Q6_K": _q6_k}


# --- reading ------------------------------------------------------------------


def read(data: bytes) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """Keys, and name -> (type, shape, bytes), of a good file.

    Raises:
        Exception: of any kind, for another one.
    """
    at = 24
    names = {number: name for name, (number, *_) in TYPES.items()}

    def take(form: str) -> Any:
        nonlocal at
        (found,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return found

    def take_text() -> str:
        nonlocal at
        length = take("Q")
        assert at + length <= len(data)
        at += length
        return data[at - length : at].decode()

    def take_value(kind: int) -> Any:
        if kind == ARRAY:
            inner, count = take("I"), take("Q")
            assert inner != ARRAY
            return [take_value(inner) for _ in range(count)]
        if kind == TEXT:
            return take_text()
        found = take(_FORMS[kind])
        return bool(found) if kind == BOOL else found

    magic, version, count, keys_count = struct.unpack_from("<4sIQQ", data)
    assert magic == b"GGUF" and version in (2, 3)
    keys = {}
    for _ in range(keys_count):
        name = take_text()
        assert name not in keys
        keys[name] = take_value(take("I"))
    entries = []
    for _ in range(count):
        name = take_text()
        shape = tuple(take("Q") for _ in range(take("I")))[::-1]
        entries.append((name, shape, names[take("I")], take("Q")))
    alignment = keys.get("general.alignment", 32)
    start = -(-at // alignment) * alignment
    found = {}
    for name, shape, kind, offset in entries:
        _, in_block, size = TYPES[kind]
        length = size
        for axis in shape:
            length *= axis
        assert length % in_block == 0
        content = data[start + offset : start + offset + length // in_block]
        assert len(content) == length // in_block and name not in found
        found[name] = kind, shape, content
    return keys, found


# --- good files ---------------------------------------------------------------

LETTERS = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
LETTERS += [chr(256 + n) for n in range(256 - len(LETTERS))]  # bytes as GPT-2 writes them
BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [
        *LETTERS,
        "he",
        "ll",
        "hell",
        "hello",
        "\u0120hello",
        "<|im_start|>",
        "<|im_end|>",
        "<tool>",
    ],
    "tokenizer.ggml.token_type": [1] * 261 + [3, 3, 4],
    "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o", "\u0120 hello"],
    "tokenizer.ggml.bos_token_id": 261,
    "tokenizer.ggml.eos_token_id": 262,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{{ messages }}",
}
_WORDS = ["ll", "he", "\u2581he", "\u2581hell", "\u2581hello", "o", "h", "e", "l", "\u2581"]
PIECES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{n:02X}>" for n in range(256)),
        "<tool>",
        *_WORDS,
    ],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 4, *[1] * len(_WORDS)],
    "tokenizer.ggml.scores": [*[0.0] * 260, *(-float(n) for n in range(len(_WORDS)))],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}
ARCHITECTURE = {
    "general.architecture": "llama",
    "general.name": "small",
    "llama.block_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 64,
}


def some_tensors(kinds: Sequence[str] = tuple(TYPES)) -> list[Tensor]:
    """A tensor of each type, of 3 rows of 512, and norms."""
    found = [Tensor("output_norm.weight", (5,), "F32", struct.pack("<5f", *range(5)))]
    for number, kind in enumerate(kinds):
        _, in_block, size = TYPES[kind]
        if in_block == 1:
            draw = random.Random(kind)
            form = {"F32": "<f", "F16": "<e", "BF16": "<xxf"}[kind]
            numbers = [draw.uniform(-2, 2) for _ in range(3 * 512)]
            data = b"".join(
                struct.pack("<f", n)[2:] if kind == "BF16" else struct.pack(form, n) for n in numbers
            )
        else:
            data = blocks(kind, 3 * 512 // in_block)
        assert len(data) == 3 * 512 // in_block * size
        found.append(Tensor(f"blk.{number}.ffn_up.weight", (3, 512), kind, data))
    return found


def write_model(path: Path, kinds: Sequence[str] = tuple(TYPES), **keys: Any) -> list[Tensor]:
    """Write a small good file with a tensor of each type."""
    tensors = some_tensors(kinds)
    path.write_bytes(gguf({**ARCHITECTURE, **BYTE_LEVEL, **keys}, tensors))
    return tensors
