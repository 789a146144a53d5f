from __future__ import annotations

import io
import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mlxlora_core.errors import ModelError, ResourceError
from mlxlora_core.files import durable, tensor_file, tensor_header
from mlxlora_core.files.tensor_checks import is_finite, mismatches
from mlxlora_core.machine.memory import free_memory_bytes

SAFETENSORS = "file.safetensors"
NPZ = "file.npz"
ODD_NAMES = ("a.b.weight", "with space", "é", "a/b", "x" * 200, '"', "..a")


def some_tensors(*, bfloat16: bool = True) -> dict[str, mx.array]:
    key = mx.random.key(0)
    tensors = {name: mx.random.normal((2, i + 1), key=key) for i, name in enumerate(ODD_NAMES)}
    tensors |= {
        "transposed": mx.arange(6, dtype=mx.float16).reshape(2, 3).T,
        "every other": mx.arange(12, dtype=mx.int32)[::2],
        "broadcast": mx.broadcast_to(mx.array([1.0, 2.0]), (3, 2)),
        "lazy": mx.ones((2, 2)) * 3,
        "scalar": mx.array(3.5),
        "empty": mx.zeros((0, 3)),
        "packed": mx.array([[2**32 - 1, 1]], dtype=mx.uint32),
        "flags": mx.array([True, False]),
        "not finite": mx.array([float("nan"), float("inf"), -0.0]),
    }
    if bfloat16:
        tensors["brain"] = mx.random.normal((5, 3), key=key).astype(mx.bfloat16)
    return tensors


def write(path: Path, tensors: dict[str, mx.array]) -> tensor_file.Written:
    return tensor_file.save(path, tensors.items(), {"who": "é"}, most=len(tensors))


def bits(array: Any) -> bytes:
    return bytes(tensor_file._bytes(array))


def assert_same(got: dict[str, mx.array], want: dict[str, mx.array]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(got[name]) == bits(tensor), name


# --- what is written ----------------------------------------------------------


@pytest.mark.parametrize("name", [SAFETENSORS, NPZ])
def test_every_bit_comes_back(tmp_path: Path, name: str) -> None:
    tensors = some_tensors(bfloat16=name == SAFETENSORS)
    write(tmp_path / name, tensors)
    got, metadata = tensor_file.load(tmp_path / name)
    assert_same(got, tensors)
    assert metadata["who"] == "é"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_mlx_and_safetensors_read_the_same(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / SAFETENSORS, tensors)
    found: Any = mx.load(str(tmp_path / SAFETENSORS))
    assert_same(found, tensors)
    theirs = load_file(str(tmp_path / SAFETENSORS))
    assert theirs.keys() == tensors.keys()
    for name, tensor in theirs.items():
        assert tuple(tensor.shape) == tensors[name].shape
        # A scalar of torch cannot be viewed as bytes.
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert raw.numpy().tobytes() == bits(tensors[name]), name
    with safe_open(tmp_path / SAFETENSORS, framework="numpy") as file:
        assert file.metadata()["format"] == "mlx"


def test_numpy_and_mlx_read_the_same_npz(tmp_path: Path) -> None:
    tensors = some_tensors(bfloat16=False)
    write(tmp_path / NPZ, tensors)
    found: Any = mx.load(str(tmp_path / NPZ))
    assert_same(found, tensors)
    with np.load(tmp_path / NPZ) as theirs:
        assert set(theirs.files) == tensors.keys()
        for name in theirs.files:
            assert theirs[name].shape == tensors[name].shape
            assert theirs[name].tobytes() == bits(tensors[name]), name


def test_the_same_tensors_give_the_same_bytes_and_every_format_one_fingerprint(tmp_path: Path) -> None:
    tensors = some_tensors(bfloat16=False)
    first = write(tmp_path / SAFETENSORS, tensors)
    content = (tmp_path / SAFETENSORS).read_bytes()
    assert write(tmp_path / SAFETENSORS, tensors) == first
    assert (tmp_path / SAFETENSORS).read_bytes() == content
    assert write(tmp_path / NPZ, tensors) == first
    archive = (tmp_path / NPZ).read_bytes()
    write(tmp_path / NPZ, tensors)
    assert (tmp_path / NPZ).read_bytes() == archive
    with zipfile.ZipFile(tmp_path / NPZ) as file:
        assert {member.date_time for member in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert first.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert tensor_file.fingerprint(dict(reversed(tensors.items()))) == first.fingerprint
    for path in (tmp_path / SAFETENSORS, tmp_path / NPZ):
        assert tensor_file.load(path)[1][tensor_file.FINGERPRINT] == first.fingerprint


def test_a_tensor_of_2_31_elements_has_bytes() -> None:
    if (free_memory_bytes() or 0) < 8 << 30:
        pytest.skip("takes 2 GiB")
    large = mx.zeros((2**16, 2**15), mx.uint8)
    with pytest.raises(OverflowError):
        large.reshape(-1)  # MLX cannot make one axis of it
    assert len(tensor_file._bytes(large)) == 2**31


def test_a_name_a_type_a_shape_and_a_bit_each_change_the_fingerprint() -> None:
    base = {"a": mx.array([[1.0, 2.0]])}
    others = (
        {"b": base["a"]},
        {"a": base["a"].view(mx.int32)},
        {"a": base["a"].T},
        {"a": mx.array([[1.0, 2.0000002]])},
        {"a": base["a"], "b": base["a"]},
        {},
    )
    marks = {tensor_file.fingerprint(tensors) for tensors in (base, *others)}
    assert len(marks) == 1 + len(others)


def test_the_data_is_aligned_and_the_header_as_the_format_demands(tmp_path: Path) -> None:
    tensor_file.save(tmp_path / SAFETENSORS, [("a", mx.ones((3,)))], {"k": "v" * 1001}, most=1)
    content = (tmp_path / SAFETENSORS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0 and content[8:9] == b"{"
    header = json.loads(content[8 : 8 + length])
    assert header["a"] == {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    assert len(content) == 8 + length + 12


def test_tensors_are_asked_for_one_after_another_and_let_go(tmp_path: Path) -> None:
    size = 1 << 22

    def stream() -> Iterator[tuple[str, mx.array]]:
        for i in range(20):
            yield f"tensor {i}", mx.full((size // 4,), i, dtype=mx.float32)

    for name in (SAFETENSORS, NPZ):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        tensor_file.save(tmp_path / name, stream(), {}, most=20)
        assert mx.get_peak_memory() - before < 3 * size


@pytest.mark.parametrize("name", [SAFETENSORS, NPZ])
def test_an_exception_between_tensors_leaves_the_old_file_and_no_other(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, {"old": mx.ones((2,))})

    def stream() -> Iterator[tuple[str, mx.array]]:
        yield "new", mx.zeros((3,))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensor_file.save(tmp_path / name, stream(), {}, most=2)
    assert tensor_file.load(tmp_path / name)[0].keys() == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "tensors", "metadata", "says"),
    [
        ("file.bin", [("a", mx.ones(1))], {}, "wanted .safetensors or .npz, got '.bin'"),
        (NPZ, [("a", mx.ones(1).astype(mx.bfloat16))], {}, "a is bfloat16"),
        (SAFETENSORS, [("a", mx.ones(1).astype(mx.complex64))], {}, "a is complex64"),
        (SAFETENSORS, [("a", mx.ones(1)), ("a", mx.ones(1))], {}, "a comes twice"),
        (
            SAFETENSORS,
            [("é" * 512, mx.ones(1))] + [(f"{i}" + "é" * 500, mx.ones(1)) for i in range(9)],
            {},
            "room for",
        ),
        (SAFETENSORS, [("a" * 513, mx.ones(1))], {}, "has 513 letters"),
        (NPZ, [("a\x1b[2J", mx.ones(1))], {}, "cannot be printed"),
        (NPZ, [("../a", mx.ones(1))], {}, "out of its place"),
        (NPZ, [("a", mx.ones(1))], {"k": "v" * 70_000}, "room for 65535"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(
    tmp_path: Path, name: str, tensors: Any, metadata: dict[str, str], says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        tensor_file.save(tmp_path / name, tensors, metadata, most=len(tensors))
    assert list(tmp_path.iterdir()) == []


# --- bad .safetensors ---------------------------------------------------------


def entry(dtype: str = "F32", shape: Any = (2,), start: int = 0, stop: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def raw(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def deep(start: str) -> bytes:
    return raw(start.encode() + b"[" * 100_000)


def twice(name: str) -> bytes:
    first, second = json.dumps(entry()), json.dumps(entry(start=8, stop=16))
    return raw(f'{{"{name}":{first},"{name}":{second}}}'.encode(), b"\0" * 16)


# what is wrong -> (the file, words of the refusal)
BAD_SAFETENSORS = {
    "empty": (b"", "is empty"),
    "short": (b"\0\0\0", "is 3 bytes, its header needs 8"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run: git lfs pull"),
    "a page": (b"\n<!DOCTYPE html><html></html>" * 10, "is a web page"),
    "no header": (raw(b"", b""), "no JSON"),
    "header past the end": (raw({"a": entry()}, length=1 << 20), "is 77 bytes, its header needs 1048584"),
    "header above the limit": (raw({"a": entry()}, length=1 << 40), "claims 1099511627776 bytes"),
    "largest header": (raw({"a": entry()}, length=2**64 - 1), "claims 18446744073709551615 bytes"),
    "no JSON": (raw(b"{broken"), "no JSON"),
    "no object": (raw(b"[1, 2]  "), "no JSON"),
    "no UTF-8": (raw(b'{"\xff\xff": 1}'), "no UTF-8 at byte 10"),
    "half a surrogate": (raw({"\ud800": entry()}), "cannot be printed"),
    "deep": (deep('{"a":'), "no JSON: maximum recursion depth"),
    "deep metadata": (deep('{"__metadata__":'), "no JSON"),
    "text behind the object": (raw(b'{"a":%s}{' % json.dumps(entry()).encode()), "no JSON"),
    "a comma too many": (raw(b'{"a":%s,}' % json.dumps(entry()).encode()), "no JSON"),
    "overlap": (raw({"a": entry(), "b": entry()}), "tensor b begins at byte 0 of the data, wanted 8"),
    "part overlap": (raw({"a": entry(), "b": entry(start=4, stop=12)}, b"\0" * 12), "overlaps"),
    "hole": (raw({"a": entry(), "b": entry(start=16, stop=24)}, b"\0" * 24), "tensor b .* there is a hole"),
    "hole in front": (raw({"a": entry(start=8, stop=16)}, b"\0" * 16), "tensor a .* there is a hole"),
    "bytes behind the end": (raw({"a": entry()}, b"\0" * 12), "4 bytes behind its last tensor"),
    "cut": (raw({"a": entry()}, b"\0" * 7), "is 76 bytes, its header needs 77"),
    "shape is not the size": (raw({"a": entry(shape=(3,))}), "tensor a is F32 .* needs 12 bytes"),
    "shape overflows": (raw({"a": entry(shape=(2**31 - 1,) * 4)}), "tensor a is F32 .* needs 8507059157"),
    "dimension overflows": (raw({"a": entry(shape=(2**33, 2**33))}), "tensor a has an axis of 8589934592"),
    "product wraps to nothing": (
        raw({"a": entry("U8", (2**30, 2**30, 2**4), stop=0)}, b""),
        "tensor a is U8",
    ),
    "shape of an empty one": (raw({"a": entry(shape=(0, 2**40), stop=0)}, b""), "tensor a has an axis of"),
    "negative dimension": (raw({"a": entry(shape=(-2, -1))}), "tensor a has a negative number"),
    "negative zero": (raw(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""), "expected usize"),
    "many axes": (raw({"a": entry(shape=(1,) * 31 + (1, 2))}), "tensor a has 33 axes"),
    "turned offsets": (raw({"a": entry(start=8, stop=0)}), "tensor a"),
    "unknown type": (raw({"a": entry(dtype="F33")}), "tensor a is F33, which is not read"),
    "a type that MLX has not": (
        raw({"a": entry(dtype="F64")}),
        "file.safetensors: tensor a is F64, which is not read.*bfloat16",
    ),
    "a fraction": (raw({"a": entry(shape=(2.0,))}), "tensor a has no entry"),
    "a number that never ends": (raw({"a": entry(shape=(10**4000,))}), "tensor a has no entry"),
    "a leading zero": (
        raw(b'{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}'),
        "no JSON: .*column 31",
    ),
    "another key": (raw({"a": {**entry(), "extra": 1}}), "tensor a has no entry"),
    "a key twice": (
        raw(b'{"a":{"dtype":"F32","dtype":"F32","data_offsets":[0,8]}}'),
        "dtype stands there twice",
    ),
    "a key short": (raw({"a": {"dtype": "F32", "shape": [2]}}), "tensor a has no entry"),
    "metadata that is no text": (raw({"__metadata__": {"a": 1}, "a": entry()}), "no JSON of names and texts"),
    "metadata of 17 MB": (raw({"__metadata__": {"a": "x" * (17 << 20)}, "a": entry()}), "17825793 letters"),
    "metadata of many entries": (
        raw({"__metadata__": {f"k{i}": "" for i in range(10_001)}, "a": entry()}),
        "10001 entries",
    ),
    "metadata twice": (raw(b'{"__metadata__":{},"__metadata__":{}}', b""), "__metadata__ stands there twice"),
    "a name twice": (twice("a"), "tensor a stands there twice"),
    "one name spelt twice": (
        raw(twice("a")[8:-16].replace(b'"a":', b'"\\u0061":', 1), b"\0" * 16),
        "tensor a stands there twice",
    ),
    "a name that clears the screen": (raw({"\x1b[2J": entry()}), "cannot be printed"),
    "a name that turns the line": (raw({"\u202egpj.x": entry()}), "cannot be printed"),
    "a name of two lines": (raw({"a\nb": entry()}), "cannot be printed"),
    "no name": (raw({"": entry()}), "has 0 letters"),
    "a long name": (raw({"a" * 513: entry()}), "has 513 letters"),
    "a path": (raw({"../../a": entry()}), "out of its place"),
}


@pytest.mark.parametrize(("content", "says"), BAD_SAFETENSORS.values(), ids=BAD_SAFETENSORS.keys())
def test_a_damaged_safetensors_file_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / SAFETENSORS
    path.write_bytes(content)
    with pytest.raises(ModelError, match=says) as caught:
        tensor_file.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 1000


def test_every_order_and_spacing_of_a_good_header_is_read(tmp_path: Path) -> None:
    data = np.arange(2, dtype=np.float32).tobytes()
    for header in (
        b'{"a":{"data_offsets":[0,8],"dtype":"F32","shape":[2]},"__metadata__":null}',
        b'{"__metadata__":{"k":"\\u00e9"},"a":{"shape":[2],"dtype":"F32","data_offsets":[0,8]}}   ',
        b'{ "a" : { "shape" : [ 1 , 2 ] ,\n"dtype" : "F32",\t"data_offsets" : [ 0 , 8 ] } }\n',
        b'{"b":{"dtype":"U8","shape":[0],"data_offsets":[8,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ):
        content = raw(header, data)
        (tmp_path / SAFETENSORS).write_bytes(content)
        tensors, _ = tensor_file.load(tmp_path / SAFETENSORS)
        assert tensors["a"].reshape(-1).tolist() == [0.0, 1.0]
        assert {name for name, _ in safetensors.deserialize(content)} == tensors.keys()


def test_a_cut_file_is_refused_before_its_tensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / SAFETENSORS
    write(path, {"a": mx.ones((3,)), "b": mx.ones((2,))})
    content = path.read_bytes()
    edges = {len(content), len(content) - 8, len(content) - 20, 4096, 8}
    lengths = {edge + step for edge in edges for step in (-1, 0, 1)} - {len(content), len(content) + 1}
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match=rf"is {length} bytes, its header needs \d+.* download"):
            tensor_file.load(path)


def layers(count: int) -> bytes:
    return raw({f"layers.{i}.weight": entry("U8", (1,), i, i + 1) for i in range(count)}, bytes(count))


def note(seen: Counter[str], frame: Any, event: str, _: Any) -> None:
    seen.update([event])


def test_checking_takes_as_many_steps_as_there_are_tensors(tmp_path: Path) -> None:
    path = tmp_path / SAFETENSORS
    calls = []
    for count in (1000, 10_000):
        path.write_bytes(layers(count))
        events: Counter[str] = Counter()
        with open(path, "rb") as file:
            sys.setprofile(partial(note, events))
            try:
                tensor_header.read_safetensors(file, path)
            finally:
                sys.setprofile(None)
        calls.append(events["call"] + events["c_call"])
    assert calls[0] > 10_000, "or nothing was counted"
    assert calls[1] < 11 * calls[0]


def test_a_file_of_the_most_tensors_is_read_and_one_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SAFETENSORS
    path.write_bytes(layers(tensor_header.TENSORS_LIMIT))
    with open(path, "rb") as file:
        assert tensor_header.read_safetensors(file, path) == {}
    path.write_bytes(layers(tensor_header.TENSORS_LIMIT + 1))
    with pytest.raises(ModelError, match="has more than 100000 tensors"):
        tensor_file.load(path)


PARTS = {
    "lists in a list": b'{"a":[' + b"[]," * 700_000 + b"[]]}",
    "deep lists": b'{"a":[' + (b"[" * 100 + b"]" * 100 + b",") * 10_000 + b"0]}",
    "a shape": b'{"a":{"dtype":"F32","shape":[' + b"0," * 1_000_000 + b'0],"data_offsets":[0,0]}}',
    "metadata": b'{"__metadata__":{' + b'"a":"",' * 1_000_000 + b'"b":""}}',
}


@pytest.mark.parametrize("header", PARTS.values(), ids=PARTS.keys())
def test_a_header_of_many_parts_is_refused_before_it_is_parsed(
    tmp_path: Path, header: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / SAFETENSORS
    path.write_bytes(raw(header, b""))
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it takes twenty times the header"))
    with pytest.raises(ModelError, match="its header has more than 1000000 parts"):
        tensor_file.load(path)


def test_a_file_that_cannot_be_mapped_is_told_as_short_memory(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / SAFETENSORS
    path.write_bytes(raw({"a": entry("U8", (2**31 - 1, 2), 0, 2**32 - 2)}, b""))
    os.truncate(path, path.stat().st_size + 2**32 - 2)  # sparse
    code = """
import resource, sys
from pathlib import Path
from mlxlora_core.errors import ResourceError
from mlxlora_core.files import tensor_file
import numpy
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    tensor_file.load(Path(sys.argv[1]))
except ResourceError as fault:
    print(fault)
"""
    assert resource
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be mapped into memory" in done.stdout


def test_what_was_checked_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / SAFETENSORS
    write(path, {"a": mx.ones((3,))})
    check = tensor_header.read_safetensors

    def check_and_swap(file: Any, where: Path) -> dict[str, str]:
        found = check(file, where)
        (tmp_path / "other").write_bytes(b"other")
        os.replace(tmp_path / "other", path)
        return found

    monkeypatch.setattr(tensor_header, "read_safetensors", check_and_swap)
    assert tensor_file.load(path)[0]["a"].tolist() == [1, 1, 1]
    assert path.read_bytes() == b"other"


def test_the_library_checks_the_file_that_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / SAFETENSORS
    path.write_bytes(BAD_SAFETENSORS["overlap"][0])
    read = tensor_header._header

    def read_and_swap(*arguments: Any) -> str:
        text = read(*arguments)
        (tmp_path / "good").write_bytes(raw({"a": entry()}))
        os.replace(tmp_path / "good", path)
        return text

    monkeypatch.setattr(tensor_header, "_header", read_and_swap)
    with pytest.raises(ModelError, match="overlaps"):
        tensor_file.load(path)


# --- bad .npz -----------------------------------------------------------------


def npy(header: bytes, data: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def described(shape: str, descr: str = "'<f4'") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()


def objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}]), allow_pickle=True)
    return buffer.getvalue()


BAD_MEMBERS = {
    "no array": b"text",
    "cut": npy(described("(2,)"), b"\0" * 7),
    "more than it says": npy(described("(2,)"), b"\0" * 9),
    "far more than there is": npy(described("(8000000000,)"), b"\0" * 8),
    "overflow": npy(described("(4294967296, 4294967296)"), b"\0" * 8),
    "negative": npy(described("(-1,)"), b"\0" * 8),
    "header past the end": b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b"{}",
    "long header": npy(described("(1,)") + b" " * 20_000, b"\0" * 4),
    "code in the header": npy(b"__import__('os').abort()\n"),
    "objects": objects(),
    "records": npy(described("(1,)", "[('a', '<f4')]"), b"\0" * 4),
    "text": npy(described("(1,)", "'<U1'"), b"\0" * 4),
}


def archive(path: Path, members: list[tuple[str, bytes]], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("content", BAD_MEMBERS.values(), ids=BAD_MEMBERS.keys())
def test_a_damaged_npz_member_is_refused(tmp_path: Path, content: bytes) -> None:
    path = archive(tmp_path / NPZ, [("a.npy", content)])
    with pytest.raises(ModelError, match=r"file\.npz: "):
        tensor_file.load(path)


def test_an_npz_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    good = npy(described("(1,)"), b"\0" * 4)
    with pytest.warns(UserWarning, match="Duplicate"):
        path = archive(tmp_path / NPZ, [("a.npy", good), ("a.npy", good)])
    with pytest.raises(ModelError, match=r"two members of one name: a\.npy"):
        tensor_file.load(path)
    with pytest.raises(ModelError, match=r"no array.*: code\.py"):
        tensor_file.load(archive(tmp_path / NPZ, [("a.npy", good), ("code.py", b"1")]))
    for name in ("../a.npy", "/a.npy", "b/../a.npy", "b\\a.npy", "a\x1b[2J.npy", ".npy/."):
        with pytest.raises(ModelError, match=r"the name of member .* (out of its place|cannot be printed)"):
            tensor_file.load(archive(tmp_path / NPZ, [(name, good)]))
    assert [path.name for path in tmp_path.iterdir()] == [NPZ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"PK", "is truncated or damaged at 2 bytes"),
        (b"garbage" * 100, "is truncated or damaged at 700 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run: git lfs pull"),
        (b"<html></html>", "is a web page"),
    ],
)
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / NPZ).write_bytes(content)
    with pytest.raises(ModelError, match=says):
        tensor_file.load(tmp_path / NPZ)


def test_a_flipped_bit_in_an_npz_is_found(tmp_path: Path) -> None:
    path = tmp_path / NPZ
    write(path, {"a": mx.ones((100,))})
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="CRC"):
        tensor_file.load(path)


def test_files_of_other_tools_are_read(tmp_path: Path) -> None:
    arrays = {
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">f4"),
        "double": np.array([1.5]),
    }
    np.savez_compressed(tmp_path / NPZ, **arrays)
    got, metadata = tensor_file.load(tmp_path / NPZ)
    assert metadata == {}
    for name, array in arrays.items():
        assert np.array_equal(np.asarray(got[name]), array), name
    mx.savez(str(tmp_path / NPZ), a=mx.ones((2, 2)))
    assert mx.array_equal(tensor_file.load(tmp_path / NPZ)[0]["a"], mx.ones((2, 2)))
    mx.save_safetensors(str(tmp_path / SAFETENSORS), {"a": mx.ones((2, 2))})
    got, metadata = tensor_file.load(tmp_path / SAFETENSORS)
    assert got.keys() == {"a"} and tensor_file.FINGERPRINT not in metadata


@pytest.mark.parametrize("comment", [b"made by hand", b"[1]", b"\xff", b'{"a": 1}', b"[" * 60_000])
def test_the_comment_of_another_tool_is_no_metadata(tmp_path: Path, comment: bytes) -> None:
    with zipfile.ZipFile(tmp_path / NPZ, "w") as file:
        file.writestr("a.npy", npy(described("(1,)"), b"\0" * 4))
        file.comment = comment
    assert tensor_file.load(tmp_path / NPZ)[1] == {}


@pytest.mark.parametrize("name", [SAFETENSORS, NPZ])
def test_flipped_bytes_are_refused_or_harmless(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, {"a": mx.ones((3, 2)), "b": mx.zeros((2,), dtype=mx.uint32)})
    content = path.read_bytes()
    draw = random.Random(0)
    header = [i for i, byte in enumerate(content) if byte != 0x20]
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.choice(header)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            mx.eval(list(tensor_file.load(path)[0].values()))
        except ModelError:
            refused += 1
    assert refused > 100


# --- the file itself, and comparing -------------------------------------------


def test_an_absent_file_a_folder_and_an_unknown_ending_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, says in (
        ("absent.npz", "there is no such file"),
        ("folder.npz", "is a folder, wanted a regular file"),
        ("loop.npz", "cannot be read: Too many levels of symbolic links"),
        ("zero.npz", "is a pipe or a device"),
        ("pipe.safetensors", "is a pipe or a device"),
        ("null\0.npz", "is no file name"),
    ):
        with pytest.raises(ModelError, match=says):
            tensor_file.load(tmp_path / name)
    with pytest.raises(ModelError, match=r"got '\.pth'"):
        tensor_file.load(tmp_path / "a.pth")


def test_a_disk_that_does_not_give_the_bytes(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    for name in (SAFETENSORS, NPZ):
        (tmp_path / name).symlink_to("/proc/self/mem")  # page 0 is not mapped: EIO
        with pytest.raises(ModelError, match=f"{name}: cannot be read: Input/output error"):
            tensor_file.load(tmp_path / name)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_finite_is_what_numpy_calls_so(dtype: mx.Dtype) -> None:
    largest = {mx.float16: 65504.0, mx.bfloat16: 3.38e38, mx.float32: 3.4e38}[dtype]
    good = mx.array([[0.0, -0.0, 1.0], [largest, -largest, 1e-7]]).astype(dtype)
    for tensor in (good, good.T, good[0, 0], mx.zeros((0, 2), dtype=dtype)):
        assert is_finite(tensor)
        assert np.isfinite(np.array(tensor.astype(mx.float32))).all()
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = mx.concatenate([good, mx.array([[0.0, value, 0.0]]).astype(dtype)])
        for tensor in (bad, bad.T, bad[2, 1]):
            assert not is_finite(tensor)
            assert not np.isfinite(np.array(tensor.astype(mx.float32))).all()


def test_all_mismatches_are_told() -> None:
    want = {"a": mx.ones((2,)), "b": mx.ones((2,)), "c": mx.ones((2,)), "d": mx.ones((2,))}
    got = {
        "b": mx.ones((3,)),
        "c": mx.ones((2,), dtype=mx.int32),
        "d": mx.ones((2,), dtype=mx.float16),
        "e": mx.ones(1),
    }
    assert mismatches(got, want) == [
        "1 missing: a",
        "1 unknown: e",
        "1 of a wrong shape: b is (3,), wanted (2,)",
        "1 of a wrong type: c is int32, wanted float32",
    ]
    assert mismatches(want, want) == []


@pytest.mark.parametrize("name", [SAFETENSORS, "weights.npz"])
def test_a_file_that_cannot_be_read_back_replaces_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    tensor_file.save(path, [("a", mx.ones((3,)))], {}, 1)
    before = path.read_bytes()
    flush = durable.flush_to_disk

    def lose(descriptor: int) -> None:
        flush(descriptor)
        os.ftruncate(descriptor, 40)

    monkeypatch.setattr(durable, "flush_to_disk", lose)
    with pytest.raises(ResourceError, match="read back"):
        tensor_file.save(path, [("a", mx.zeros((3,)))], {}, 1)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [name]
