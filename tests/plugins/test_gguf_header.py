"""What GGUF files say of themselves: everything that is read, and everything that is refused."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf_files
import pytest
from gguf_files import (
    ARCHITECTURE,
    ARRAY,
    BOOL,
    BYTE_LEVEL,
    F32,
    F64,
    I64,
    TEXT,
    U8,
    U16,
    U32,
    U64,
    Tensor,
    value,
)
from mlxlora_gguf import GgufOptions, detect, header, open_path, source
from mlxlora_gguf.header import read_header

from mlxlora_core.errors import LINE_BYTES, ModelError
from mlxlora_core.values import ForeignModel

KEYS: dict[str, Any] = {**ARCHITECTURE, **BYTE_LEVEL}


def opened(path: Path) -> ForeignModel:
    return open_path(path, GgufOptions())


def norm(name: str = "output_norm.weight", **how: Any) -> Tensor:
    return Tensor(name, (8,), "F32", struct.pack("<8f", *range(8)), **how)


def refused(content: bytes, folder: Path) -> str:
    path = folder / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as fault:
        read_header(path)
    told = str(fault.value)
    assert told.startswith(str(path)) and told.isprintable() and len(told.encode()) <= LINE_BYTES
    return told


def test_every_kind_of_key_is_read(tmp_path: Path) -> None:
    pairs = [
        (f"n.{kind}", value(kind, number)) for kind, number in ((U8, 255), (1, -1), (U16, 65535), (3, -2))
    ]
    pairs += [("n.4", value(U32, 2**32 - 1)), ("n.5", value(5, -3)), ("n.6", value(F32, 0.1))]
    pairs += [("n.7", value(BOOL, 1)), ("n.10", value(U64, 2**64 - 1)), ("n.11", value(I64, -(2**63)))]
    pairs += [("n.12", value(F64, 0.1)), ("text", value(TEXT, "caf\u00e9\n")), ("empty", value(TEXT, ""))]
    pairs += [
        ("some", value(ARRAY, (TEXT, ["", "a", "\U0001f600" * 300]))),
        ("none", value(ARRAY, (TEXT, []))),
    ]
    pairs += [("truths", value(ARRAY, (BOOL, [1, 0]))), ("halves", value(ARRAY, (F32, [0.5, -2])))]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_files.gguf(pairs))
    found = read_header(path).keys
    assert found == gguf_files.read(path.read_bytes())[0]
    assert found["n.7"] is True and found["truths"] == [True, False] and found["n.4"] == 2**32 - 1
    assert found["n.6"] == struct.unpack("<f", struct.pack("<f", 0.1))[0]


def test_strings_that_go_over_what_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["x" * (n % 40) + "\u00e9" for n in range(300)] + ["y" * 5000, ""]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_files.gguf([("a", value(TEXT, "b")), ("texts", value(ARRAY, (TEXT, texts)))]))
    for step in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(source, "_STEP_BYTES", step)
        assert read_header(path).keys["texts"] == texts


def small(*pairs: tuple[str | bytes, bytes], tensors: Sequence[Tensor] = (), **how: Any) -> bytes:
    return gguf_files.gguf(list(pairs), tensors, **how)


CASES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is empty"),
    "a web page": (b"<!DOCTYPE html><html></html>", "is a web page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    "another file": (b"\x80\x04" + bytes(100), "does not begin with GGUF"),
    "four bytes": (b"GGUF", "ends in its header: it is 4 bytes"),
    "version 1": (small(version=1), "is of version 1, wanted 2 or 3"),
    "version 4": (small(version=4), "is of version 4"),
    "the other byte order": (small(version=3 << 24), "highest byte first"),
    "tensors without end": (small(count=2**63), "claims 9223372036854775808 tensors"),
    "more tensors than there is room": (small(count=9), "claims 9 tensors"),
    "keys without end": (small(keys_count=2**64 - 1), "claims 18446744073709551615 keys"),
    "fewer keys than told": (small(("a", value(U8, 1)), keys_count=2), "ends in its header"),
    "a key twice": (small(("a", value(U8, 1)), ("a", value(U8, 1))), "key a is there twice"),
    "a key without a name": (small(("", value(U8, 1))), "key 0 has no name that can be printed"),
    "a key with a bell": (small(("a\x07", value(U8, 1))), "key 0 has no name that can be printed"),
    "a key that is no text": (small((b"\xff", value(U8, 1))), "name of key 0 is no UTF-8"),
    "a key of 2000 letters": (
        small(("a" * 2000, value(U8, 1))),
        "name of key 0 claims 2000 bytes, wanted at most 1024",
    ),
    "a key of type 13": (small(("a", struct.pack("<II", 13, 0))), "key a is of type 13, wanted 0 to 12"),
    "a text without end": (
        small(("a", struct.pack("<IQ", TEXT, 2**64 - 1))),
        "key a claims 18446744073709551615",
    ),
    "a long text that is cut": (small(("a", struct.pack("<IQ", TEXT, 1 << 20))), "ends in its header"),
    "a text that is none": (small(("a", value(TEXT, b"\xff"))), "key a is no UTF-8"),
    "a string that is none": (
        small(("a", value(ARRAY, (TEXT, ["x", b"\xc3"])))),
        "string 1 of key a is no UTF-8",
    ),
    "a string that is cut": (
        small(
            ("a", struct.pack("<IIQ", ARRAY, TEXT, 2) + gguf_files.text("x") + struct.pack("<Q", 2**63 + 5))
        ),
        "ends in its header",
    ),
    "an array without end": (
        small(("a", struct.pack("<IIQ", ARRAY, U8, 2**40))),
        "key a claims 1099511627776 items",
    ),
    "strings without end": (
        small(("a", struct.pack("<IIQ", ARRAY, TEXT, 1 << 20))),
        "key a claims 1048576 strings in 0 bytes",
    ),
    "an array of arrays": (small(("a", struct.pack("<IIQ", ARRAY, ARRAY, 1))), "array of arrays"),
    "an array of type 13": (small(("a", struct.pack("<IIQ", ARRAY, 13, 0))), "key a is of type 13"),
    "a truth value of 2": (small(("a", value(BOOL, 2))), "key a is a truth value of neither 0 nor 1"),
    "a number that is none": (
        small(("a", value(F32, float("nan")))),
        "key a has a number that is not finite",
    ),
    "an infinity in a list": (small(("a", value(ARRAY, (F64, [0, float("inf")])))), "not finite"),
    "an alignment of 0": (small(("general.alignment", value(U32, 0)), tensors=[norm()]), "power of two"),
    "an alignment of 48": (small(("general.alignment", value(U32, 48)), tensors=[norm()]), "power of two"),
    "an alignment of 2 GB": (
        small(("general.alignment", value(U32, 2**31)), tensors=[norm()]),
        "power of two",
    ),
    "an alignment in words": (
        small(("general.alignment", value(TEXT, "32")), tensors=[norm()]),
        "is '32', wanted",
    ),
    "a tensor twice": (small(tensors=[norm("a"), norm("a")]), "tensor a is there twice"),
    "a tensor without a name": (small(tensors=[norm("")]), "tensor 0 has no name"),
    "a tensor with an escape": (small(tensors=[norm("\x1b[2J")]), "tensor 0 has no name that can be printed"),
    "a tensor of 300 letters": (small(tensors=[norm("a" * 300)]), "name of tensor 0 claims 300 bytes"),
    "no axes": (small(tensors=[norm(axes=())]), "has 0 axes, wanted 1 to 4"),
    "five axes": (small(tensors=[norm(axes=(8, 1, 1, 1, 1))]), "has 5 axes"),
    "axes without end": (
        small(tensors=[norm()]).replace(struct.pack("<IQ", 1, 8), struct.pack("<IQ", 2**32 - 1, 8)),
        "has 4294967295 axes",
    ),
    "an axis of 0": (small(tensors=[norm(axes=(8, 0))]), "wanted 1 to 2147483647 along each axis"),
    "an axis of 2^63": (small(tensors=[norm(axes=(2**63,))]), "wanted 1 to 2147483647 along each axis"),
    "more than there is": (
        small(tensors=[norm(axes=(8, 2**20, 2**20, 2**20))]),
        "has 36893488147419103232 bytes",
    ),
    "rows that blocks do not fill": (
        small(tensors=[Tensor("a", (2, 16), "Q4_1", bytes(20))]),
        r"rows of 16, which blocks of 32 \(Q4_1\) do not fill",
    ),
    "an offset past the end": (small(tensors=[norm(offset=2**40)]), "at offset 1099511627776, in a file of"),
    "an offset of 2^64 - 1": (small(tensors=[norm(offset=2**64 - 1)]), "at offset 18446744073709551615"),
    "an offset that is not aligned": (
        small(tensors=[norm(offset=4)]),
        "begins at offset 4, wanted 0: it leaves a hole",
    ),
    "a hole": (
        small(tensors=[norm("a"), norm("b", offset=64)]) + bytes(64),
        "begins at offset 64, wanted 32",
    ),
    "shared bytes": (
        small(tensors=[norm("a"), norm("b", offset=0)]),
        "begins at offset 0, wanted 32: it shares bytes",
    ),
    "too short": (small(tensors=[norm("a"), norm("b")])[:-1], "is too short: it has 159 bytes, wanted 160"),
    "too long": (small(tensors=[norm()]) + bytes(1), "is longer than its tensors"),
    "more behind the keys": (small() + b"x", "is longer than its tensors"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_is_one_line(case: str, tmp_path: Path) -> None:
    content, reason = CASES[case]
    told = refused(content, tmp_path)
    assert re.search(reason, told), told


def test_a_header_is_read_up_to_a_limit_and_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "HEADER_BYTES", 1000)
    assert "header has more than 1000 bytes" in refused(small(("a", value(TEXT, "x" * 2000))), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(header, "_ITEMS_LIMIT", 10)
    pairs = [("a", value(ARRAY, (U8, range(6)))), ("b", value(ARRAY, (U8, range(6))))]
    assert "key b claims 6 items, wanted at most 4" in refused(small(*pairs), tmp_path)


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    tensors = [
        norm("a", number=10),
        norm("b", number=20),
        norm("c", number=10),
        norm("d", number=77),
        norm("e"),
    ]
    told = refused(small(tensors=tensors), tmp_path)
    assert "2 of type Q2_K (a and 1 more), 1 of type IQ4_NL (b), 1 of type type 77 (d)" in told
    assert "Q4_K, Q5_K, Q6_K, BF16 are read" in told


@pytest.mark.parametrize("cut", range(0, 700, 13))
def test_a_file_that_ends_anywhere_is_refused(cut: int, tmp_path: Path) -> None:
    gguf_files.write_model(tmp_path / "good.gguf", kinds=("Q4_1", "F16"))
    content = (tmp_path / "good.gguf").read_bytes()
    refused(content[: len(content) * cut // 700], tmp_path)


# --- what is a model ----------------------------------------------------------


def test_a_model_and_its_config(tmp_path: Path) -> None:
    tensors = gguf_files.write_model(tmp_path / "model.gguf", **{"tokenizer.x": 1, "split.no": 0})
    model = opened(tmp_path / "model.gguf")
    small = struct.unpack("<f", struct.pack("<f", 1e-5))[0]
    assert model.config == {**ARCHITECTURE, "llama.attention.layer_norm_rms_epsilon": small}
    assert model.layout == "gguf"
    assert list(model.tensors) == [tensor.name for tensor in tensors]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"general.type": "adapter"}, "is a LoRA adapter, wanted a model"),
        ({"general.type": "mmproj"}, "is a projector of images or sound, wanted a model"),
        ({"general.type": "imatrix"}, "is an importance matrix, wanted a model"),
        ({"general.type": "dataset"}, "is of type 'dataset', wanted a model"),
        ({"general.type": 3}, "is of no type, wanted a model"),
        ({"general.architecture": "clip"}, "is a projector of images or sound"),
        ({"general.architecture": 7}, "does not say which architecture it has"),
        ({"general.architecture": ""}, "does not say which architecture it has"),
    ],
)
def test_what_is_no_model_is_named(keys: dict[str, Any], reason: str, tmp_path: Path) -> None:
    gguf_files.write_model(tmp_path / "model.gguf", **keys)
    with pytest.raises(ModelError, match=reason):
        opened(tmp_path / "model.gguf")


# --- parts and folders --------------------------------------------------------


def part(folder: Path, number: int, count: int = 3, name: str = "m", **change: Any) -> Path:
    """Write part ``number`` (from 0 on) of a model with one tensor in each."""
    keys = dict(KEYS) if number == 0 else {}
    split = {
        "split.no": value(U16, number),
        "split.count": value(U16, count),
        "split.tensors.count": value(5, count),
    }
    pairs = [(key, gguf_files.guessed(content)) for key, content in keys.items()]
    pairs += [(key, change.get(key, content)) for key, content in split.items()]
    path = folder / f"{name}-{number + 1:05d}-of-{count:05d}.gguf"
    path.write_bytes(gguf_files.gguf(pairs, [norm(change.get("tensor", f"blk.{number}.attn_norm.weight"))]))
    return path


@pytest.mark.parametrize("by", ["first", "last", "folder"])
def test_parts_are_opened_from_any_of_them(by: str, tmp_path: Path) -> None:
    paths = [part(tmp_path, number) for number in range(3)]
    model = opened({"first": paths[0], "last": paths[2], "folder": tmp_path}[by])
    assert list(model.tensors) == [f"blk.{number}.attn_norm.weight" for number in range(3)]
    assert all(tensor.read().tolist() == list(range(8)) for tensor in model.tensors.values())
    assert not [key for key in model.config if key.startswith("split")]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "m-00002-of-00003.gguf").unlink(), r"of which 1 are missing: m-00002-of-00003\.gguf"),
        (
            lambda f: part(f, 1, **{"split.no": value(U16, 2)}),
            "is part 1 of 3 by its name, counted from 0, and 2 of 3",
        ),
        (lambda f: part(f, 1, **{"split.count": value(U16, 4)}), "and 1 of 4 by its keys"),
        (lambda f: part(f, 1, **{"split.no": value(TEXT, "x")}), "and 'x' of 3 by its keys"),
        (
            lambda f: part(f, 1, **{"split.tensors.count": value(5, 9)}),
            r"another model than the first: split\.tens",
        ),
        (
            lambda f: part(f, 1, tensor="blk.0.attn_norm.weight"),
            r"tensor blk\.0\.attn_norm\.weight is in two parts",
        ),
        (
            lambda f: [part(f, n, **{"split.tensors.count": value(5, 9)}) for n in range(3)],
            r"has 3 tensors in 3 parts, wanted 9 \(split\.tensors\.count\)",
        ),
        (lambda f: (f / "m-00003-of-00003.gguf").write_bytes(b"GGUF"), "ends in its header"),
    ],
)
def test_parts_that_are_no_model_are_refused(
    spoil: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    paths = [part(tmp_path, number) for number in range(3)]
    spoil(tmp_path)
    with pytest.raises(ModelError, match=reason):
        opened(paths[0])


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    part(tmp_path, 0).rename(tmp_path / "m.gguf")
    with pytest.raises(
        ModelError, match="is part 0 of 1 by its name, counted from 0, and 0 of 3 by its keys"
    ):
        opened(tmp_path / "m.gguf")
    part(tmp_path, 0, count=1).rename(tmp_path / "one.gguf")
    assert opened(tmp_path / "one.gguf").tensors
    with pytest.raises(ModelError, match="names part 7 of 3"):
        opened(tmp_path / "m-00007-of-00003.gguf")


def test_a_whole_file_may_be_called_like_a_part(tmp_path: Path) -> None:
    gguf_files.write_model(tmp_path / "m-00001-of-00001.gguf", kinds=("F32",))
    assert opened(tmp_path).tensors


def test_what_is_known(tmp_path: Path) -> None:
    for name in ("one", "two", "none", "mixed"):
        (tmp_path / name).mkdir()
    gguf_files.write_model(tmp_path / "one" / "model.gguf", kinds=("F32",))
    (tmp_path / "one" / "mmproj-model.gguf").write_bytes(small())
    for name in ("a.gguf", "b.gguf"):
        gguf_files.write_model(tmp_path / "two" / name, kinds=("F32",))
    gguf_files.write_model(tmp_path / "mixed" / "model.gguf", kinds=("F32",))
    (tmp_path / "mixed" / "model.safetensors").write_bytes(b"")
    model = (tmp_path / "mixed" / "model.gguf").rename(tmp_path / "mixed" / "odd")
    assert detect(model) and not detect(tmp_path / "mixed" / "model.safetensors")
    assert [name for name in ("one", "two", "none", "mixed", "absent") if detect(tmp_path / name)] == [
        "one",
        "two",
    ]
    assert opened(tmp_path / "one").tensors
    with pytest.raises(
        ModelError, match=r"holds 2 GGUF models, wanted one: a\.gguf, b\.gguf\. Fix: name one.*a\.gguf"
    ):
        opened(tmp_path / "two")
    with pytest.raises(ModelError, match="holds 0 GGUF models"):
        opened(tmp_path / "none")
