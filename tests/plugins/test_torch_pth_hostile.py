"""torch-pth: no file runs code, none is read wrong, and each is refused in one line."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlxlora_torch import open_folder
from mlxlora_torch.program import read_program

from mlxlora_core.api import MlxloraError, ModelError, NoOptions, SafetyError

ROOT = Path(__file__).parents[2]
TABLE = {"norm.weight": torch.arange(4.0), "output.weight": torch.arange(12.0).reshape(3, 4).half()}


class Call:
    """Pickled as a call of ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    """A file that planted code would make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code in a file ran"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder whose .pth each test writes itself."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "params.json").write_text(json.dumps({"dim": 4}))
    (path / "tokenizer.model").write_bytes(b"pieces")
    return path


def shard(folder: Path) -> Path:
    return folder / "consolidated.00.pth"


def refusal(folder: Path, kind: type[MlxloraError]) -> str:
    with pytest.raises(kind) as caught:
        for tensor in open_folder(folder, NoOptions()).tensors.values():
            tensor.read()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(shard(folder)))
    return message


def touch(canary: Path) -> str:
    return f"touch '{canary}'"


def rezip(folder: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the .pth again with members changed."""
    with zipfile.ZipFile(shard(folder)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(shard(folder), "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def put_program(folder: Path, program: bytes) -> None:
    """A good .pth but for the pickle in it."""
    torch.save(TABLE, shard(folder))
    rezip(folder, lambda name, data: program if name.endswith("data.pkl") else data)


# --- code in a pickle ---------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_call_in_the_table(folder: Path, canary: Path, protocol: int) -> None:
    torch.save(TABLE | {"w": Call(os.system, touch(canary))}, shard(folder), pickle_protocol=protocol)
    assert "its pickle asks for posix.system" in refusal(folder, SafetyError)


def test_a_call_instead_of_the_table(folder: Path, canary: Path) -> None:
    torch.save(Call(eval, f"__import__('os').system({touch(canary)!r})"), shard(folder))
    assert "its pickle asks for __builtin__.eval" in refusal(folder, SafetyError)


def test_a_pickle_in_a_pickle(folder: Path, canary: Path) -> None:
    inner = pickle.dumps(Call(os.system, touch(canary)))
    torch.save(TABLE | {"w": Call(pickle.loads, inner)}, shard(folder))
    assert "pickle.loads" in refusal(folder, SafetyError)
    torch.save(TABLE | {"w": Call(torch.storage._load_from_bytes, inner)}, shard(folder))
    assert "torch.storage._load_from_bytes" in refusal(folder, SafetyError)


def test_a_payload_before_the_stream_breaks(folder: Path, canary: Path) -> None:
    program = pickle.dumps({"w": Call(os.system, touch(canary))}, protocol=2)
    for broken in (program[:-1], program[:-4], program[:-1] + b"\xff\xff"):
        put_program(folder, broken)
        assert "posix.system" in refusal(folder, SafetyError)


def test_a_payload_in_a_file_cut_behind_it(folder: Path, canary: Path) -> None:
    torch.save(TABLE | {"w": Call(os.system, touch(canary))}, shard(folder))
    os.truncate(shard(folder), shard(folder).stat().st_size - 60)
    assert "truncated" in refusal(folder, ModelError)


def test_what_torch_allows_takes_no_memory(folder: Path) -> None:
    for function in (bytearray, torch.Tensor, torch.storage.UntypedStorage):
        torch.save(TABLE | {"w": Call(function, 1 << 40)}, shard(folder))
        assert "its pickle" in refusal(folder, SafetyError)


def test_a_storage_does_not_reach_over_the_next(folder: Path) -> None:
    put_program(folder, program(elements=6, shape=(6,)))  # torch, mapped, reads on behind the member
    assert torch.load(shard(folder), weights_only=True, mmap=True)["norm.weight"].shape == (6,)
    assert "wants 6 elements, its storage has 16 bytes" in refusal(folder, ModelError)


def test_a_name_allowed_to_torch_is_not_allowed_here(folder: Path, canary: Path) -> None:
    torch.save(TABLE | {"w": Call(os.system, touch(canary))}, shard(folder))
    with torch.serialization.safe_globals([os.system]):
        assert "posix.system" in refusal(folder, SafetyError)


def test_an_environment_that_asks_for_unsafe_loading(
    folder: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(TABLE | {"w": Call(os.system, touch(canary))}, shard(folder))
    assert "posix.system" in refusal(folder, SafetyError)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"\x80\x02(S'COMMAND'\nios\nsystem\n.", "os system"),  # INST
        (b"\x80\x02(cos\nsystem\nS'COMMAND'\no.", "os.system"),  # OBJ
        (b"\x80\x02cos\nsystem\nX\x07\x00\x00\x00COMMAND\x85\x81.", "os.system"),  # NEWOBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x07COMMAND\x85R.", "os.system"),  # STACK_GLOBAL
        (b"\x80\x04)\x8c\x06system\x93.", "a computed name"),  # STACK_GLOBAL of a tuple
        (b"\x80\x02\x82\x01.", "EXT1 1"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.", "NEWOBJ"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "sets the state"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"\x80\x02X\x02\x00\x00\x00os)R.", "calls text"),
        (b"\x80\x02ctorch\nhub.load\n.", "asks for torch.hub.load"),
        (b"\x80\x02ccollections\nOrderedDict\n.__init__.__globals__\n", ""),
    ],
)
def test_every_way_to_reach_code(folder: Path, canary: Path, program: bytes, words: str) -> None:
    command = touch(canary).encode()
    program = program.replace(b"X\x07\x00\x00\x00COMMAND", b"X" + struct.pack("<I", len(command)) + command)
    program = program.replace(b"\x8c\x07COMMAND", b"\x8c" + bytes([len(command)]) + command)
    put_program(folder, program.replace(b"'COMMAND'", b'"' + command + b'"'))
    if words:
        assert words in refusal(folder, SafetyError)
    else:
        refusal(folder, ModelError)


def test_names_cannot_forge_a_message(folder: Path) -> None:
    put_program(folder, b"\x80\x02c\x1b[2Jevil\nname\n.")
    message = refusal(folder, SafetyError)
    assert "\\x1b[2Jevil.name" in message


# --- code and bombs in other formats ------------------------------------------


def test_the_format_before_zip(folder: Path, canary: Path) -> None:
    torch.save({"w": Call(os.system, touch(canary))}, shard(folder), _use_new_zipfile_serialization=False)
    assert "bare pickle" in refusal(folder, SafetyError)
    torch.save(TABLE, shard(folder), _use_new_zipfile_serialization=False)
    assert "bare pickle" in refusal(folder, SafetyError)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bare_pickle(folder: Path, canary: Path, protocol: int) -> None:
    shard(folder).write_bytes(pickle.dumps(Call(os.system, touch(canary)), protocol=protocol))
    assert "bare pickle" in refusal(folder, SafetyError)


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_bare_pickle_without_a_mark(folder: Path, canary: Path, protocol: int) -> None:
    shard(folder).write_bytes(pickle.dumps(Call(os.system, touch(canary)), protocol=protocol))
    assert "is no PyTorch checkpoint" in refusal(folder, ModelError)


def test_a_torchscript_archive(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(shard(folder)))
    assert "TorchScript" in refusal(folder, SafetyError)


@pytest.mark.parametrize(
    ("head", "kind", "words"),
    [
        (b"7z\xbc\xaf\x27\x1c", SafetyError, "7z archive"),
        (b"\x1f\x8b\x08", SafetyError, "gzip archive"),
        (b"BZh9", SafetyError, "bzip2 archive"),
        (b"\xfd7zXZ\x00", SafetyError, "xz archive"),
        (b"\x28\xb5\x2f\xfd", SafetyError, "zstd archive"),
        (b"Rar!\x1a\x07", SafetyError, "rar archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ModelError, "run: git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", ModelError, "web page"),
        (b"\xef\xbb\xbf\n  <html>", ModelError, "web page"),
        (b"GGUF\x03\x00", ModelError, "is no PyTorch checkpoint"),
        (b'{"error": "not found"}', ModelError, "is no PyTorch checkpoint"),
        (b"", ModelError, "is empty"),
    ],
)
def test_what_is_no_zip(folder: Path, head: bytes, kind: type[MlxloraError], words: str) -> None:
    shard(folder).write_bytes(head + bytes(600) if head else b"")
    assert words in refusal(folder, kind)


def test_a_tar_archive(folder: Path) -> None:
    with tarfile.open(shard(folder), "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    assert "tar archive" in refusal(folder, SafetyError)


def test_a_zip_that_is_not_torchs(folder: Path) -> None:
    np.savez(folder / "weights.npz", a=np.zeros(3))
    (folder / "weights.npz").rename(shard(folder))
    assert "not one of torch.save" in refusal(folder, ModelError)


def test_a_zip_bomb(folder: Path) -> None:
    torch.save(TABLE, shard(folder))
    rezip(folder, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(folder, SafetyError)


def test_two_members_of_one_name(folder: Path, canary: Path) -> None:
    put_program(folder, pickle.dumps({"w": Call(os.system, touch(canary))}, protocol=2))
    evil = shard(folder).read_bytes()
    torch.save(TABLE, shard(folder))
    good = zipfile.ZipFile(shard(folder)).read("consolidated.00/data.pkl")
    shard(folder).write_bytes(evil)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile notices, too
        with zipfile.ZipFile(shard(folder), "a") as archive:
            archive.writestr("consolidated.00/data.pkl", good)
    assert "two members of one name" in refusal(folder, SafetyError)


def test_a_zip_behind_a_zip(folder: Path, canary: Path) -> None:
    # Python reads the last archive of a file; another reader may take the first.
    put_program(folder, pickle.dumps({"w": Call(os.system, touch(canary))}, protocol=2))
    evil = shard(folder).read_bytes()
    torch.save(TABLE, shard(folder))
    shard(folder).write_bytes(evil + shard(folder).read_bytes())
    assert "in front of its first member" in refusal(folder, SafetyError)


def test_members_and_comments_of_others(folder: Path) -> None:
    torch.save(TABLE, shard(folder))
    with zipfile.ZipFile(shard(folder), "a") as archive:
        archive.writestr("consolidated.00/extra/run.py", "print()")
    assert "holds extra/run.py" in refusal(folder, SafetyError)
    torch.save(TABLE, shard(folder))
    with zipfile.ZipFile(shard(folder), "a") as archive:
        archive.comment = b"PK\x03\x04"
    assert "zip comment" in refusal(folder, SafetyError)


def test_the_other_byte_order(folder: Path) -> None:
    torch.save(TABLE, shard(folder))
    rezip(folder, lambda name, data: b"big" if name.endswith("byteorder") else data)
    assert "big-endian" in refusal(folder, ModelError)


# --- sizes that lie -----------------------------------------------------------


def program(
    shape: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    elements: Any = 4,
    key: str = "0",
    kind: str = "FloatStorage",
) -> bytes:
    """What torch.save writes for one tensor ``norm.weight``, with any numbers in it."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Storage):
                return ("storage", getattr(torch, kind), key, "cpu", elements)
            return None

    file = io.BytesIO()
    rebuild = Call(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, stride, False, OrderedDict())
    Pickler(file, protocol=2).dump({"norm.weight": rebuild})
    return file.getvalue()


def test_the_handmade_program_is_good(folder: Path) -> None:
    put_program(folder, program())
    assert open_folder(folder, NoOptions()).tensors["norm.weight"].read().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"shape": (5,)}, "needs 20 bytes, its storage has 16"),
        ({"offset": 1}, "needs 20 bytes, its storage has 16"),
        ({"stride": (2,)}, "needs 28 bytes, its storage has 16"),
        ({"shape": (1 << 60,)}, "its storage has 16"),
        ({"shape": (1 << 60,), "stride": (0,)}, "its storage has 16"),  # one element shown often
        ({"shape": (1 << 62, 1 << 62), "stride": (0, 0)}, "its storage has 16"),
        ({"elements": 400}, "wants 400 elements, its storage has 16 bytes"),
        ({"elements": 3, "shape": (3,)}, "wants 3 elements, its storage has 16 bytes"),
        ({"shape": (1 << 2000,)}, "no proper shape"),
        ({"shape": (1 << 2000,) * 8, "stride": (0,) * 8}, "no proper shape"),
        ({"shape": (1,) * 20_000, "stride": (0,) * 20_000}, "no proper shape"),
        ({"stride": (1 << 2000,)}, "no proper shape"),
        ({"shape": (0, 1 << 31), "stride": (0, 0)}, "has an axis of 2147483648 elements"),
        ({"elements": 1 << 2000}, "no proper name"),
        ({"key": "9"}, "data/9 is missing"),
        ({"key": "../version"}, "data/../version is missing"),
        ({"shape": (-1,)}, "no proper shape"),
        ({"offset": -1}, "no proper shape"),
        ({"shape": (2, 2)}, "no proper shape"),
        ({"shape": (4.0,)}, "no proper shape"),
        ({"elements": -4}, "no proper name"),
        ({"elements": "4"}, "no proper name"),
        ({"kind": "HalfStorage"}, "wants 4 elements, its storage has 16 bytes"),
    ],
)
def test_numbers_that_do_not_fit_the_file(folder: Path, numbers: dict[str, Any], words: str) -> None:
    put_program(folder, program(**numbers))
    assert words in refusal(folder, ModelError)


def test_an_unusual_program_takes_no_memory_and_no_time(tmp_path: Path) -> None:
    deep = b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s."  # a key of many nested tuples
    with pytest.raises(ModelError, match="a key is a tuple"):
        read_program(deep, tmp_path)
    long = b"\x80\x02}" + b")" + b"\x85" * 4_000_000 + b"."  # as many as the largest table that is read
    with pytest.raises(ModelError, match="more than 1000000 instructions"):
        read_program(long, tmp_path)
    far = b"\x80\x02}r\xff\xff\xff\xff."  # remembers its dict under number 4294967295
    assert read_program(far, tmp_path) == {}


def test_a_bit_that_flipped(folder: Path) -> None:
    torch.save(TABLE, shard(folder))
    data = bytearray(shard(folder).read_bytes())
    data[data.index(TABLE["output.weight"].numpy().tobytes()) + 3] ^= 4
    shard(folder).write_bytes(data)
    assert "the bytes of output.weight do not match their checksum" in refusal(folder, ModelError)


def test_a_file_cut_anywhere(folder: Path) -> None:
    torch.save(TABLE, shard(folder))
    whole = shard(folder).read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        shard(folder).write_bytes(whole[:length])
        refusal(folder, ModelError)


def test_random_damage_is_refused_or_harmless(folder: Path) -> None:
    torch.save(TABLE, shard(folder))
    whole = shard(folder).read_bytes()
    draw = random.Random(5)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3, 20))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        shard(folder).write_bytes(data)
        try:
            got = {name: t.read() for name, t in open_folder(folder, NoOptions()).tensors.items()}
        except MlxloraError as fault:
            assert "\n" not in str(fault)
            refused += 1
        else:  # the bytes between the members do not matter; the values must be right
            for name, value in got.items():
                np.testing.assert_array_equal(np.array(value), TABLE[name].numpy())
    assert refused > 100


# --- the source itself --------------------------------------------------------


def test_nothing_in_the_tree_loads_unsafely() -> None:
    files = [
        path
        for name in ("mlxlora_core", "plugins", "tests", "examples", "benchmarks")
        for path in (ROOT / name).rglob("*.py")
    ]
    assert ROOT / "plugins/mlxlora_torch/reader.py" in files
    loads, faults = 0, []
    for path in files:
        text = path.read_text()
        if "weights_only" not in text and not ("torch" in text and "load" in text):
            continue  # parsing takes a while
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            given = {word.arg: word.value for word in node.keywords}
            safe = given.get("weights_only")
            name = node.func
            is_load = isinstance(name, ast.Attribute) and name.attr == "load"
            is_load = is_load and ast.unparse(name) == "torch.load"
            loads += is_load
            if (is_load or safe is not None) and not (isinstance(safe, ast.Constant) and safe.value is True):
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert loads >= 2
    assert faults == []
