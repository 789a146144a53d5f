from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlxlora_core.errors import DataError, ModelError
from mlxlora_core.files import fingerprints, tensor_file
from mlxlora_core.files.fingerprints import combine, content_digest, tensor_digests


def tensors() -> dict[str, mx.array]:
    kinds = (mx.float32, mx.float16, mx.bfloat16, mx.uint8, mx.int64, mx.bool_)
    each = {f"of {kind}": (mx.arange(6).reshape(2, 3) % 2).astype(kind) for kind in kinds}
    return {**each, "one": mx.array(1.5), "row": mx.zeros((3,)), "none": mx.zeros((0, 4))}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every file is large, and was written long ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "_LARGE_BYTES", 0)
    monkeypatch.setattr(fingerprints, "_SETTLED_NS", -(10**18))
    return tmp_path / "cache" / "mlxlora" / "digests"


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz"])
def test_the_bytes_of_a_file_give_the_fingerprint_that_its_writer_stated(tmp_path: Path, name: str) -> None:
    named = {key: t for key, t in tensors().items() if name != "a.npz" or t.dtype != mx.bfloat16}
    written = tensor_file.save(tmp_path / name, named.items(), {}, len(named))
    assert combine(tensor_file.digests(tmp_path / name)) == written.fingerprint


def test_another_part_size_and_more_threads_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = tmp_path / "a.safetensors"
    written = tensor_file.save(path, [("big", mx.arange(5000)), ("small", mx.array([1]))], {}, 2)
    monkeypatch.setattr(fingerprints, "_PART_BYTES", 7)
    assert combine(tensor_digests(path)) == written.fingerprint


def test_a_fingerprint_in_the_header_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    stated = tensor_file.save(path, [("w", mx.zeros((8,)))], {}, 1).fingerprint
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert tensor_file.stated(path)["fingerprint"] == stated
    assert combine(tensor_file.digests(path)) != stated


def test_a_damaged_file_has_no_digests(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(ModelError):
        tensor_digests(path)


def test_the_digest_of_a_file_is_its_sha_256(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"rows")
    assert content_digest(tmp_path / "rows") == hashlib.sha256(b"rows").hexdigest()
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "absent", "."):
        with pytest.raises(DataError):
            content_digest(tmp_path / name, DataError)


def test_what_is_known_of_a_large_file_is_not_read_again(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"rows")
    first = content_digest(path)
    (proof,) = cache.iterdir()
    told = json.loads(proof.read_text())
    proof.write_text(json.dumps(told | {"digests": {"": "ab" * 32}}))
    assert content_digest(path) == "ab" * 32, "it was read again"
    assert first == hashlib.sha256(b"rows").hexdigest()


def test_a_change_with_the_size_and_the_time_of_before_is_seen(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"rows")
    state = path.stat()
    content_digest(path)
    time.sleep(0.05)  # longer than the ticks of the clock of any file system here
    path.write_bytes(b"ROWS")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert content_digest(path) == hashlib.sha256(b"ROWS").hexdigest()


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_SETTLED_NS", 3600 * 10**9)
    (tmp_path / "rows").write_bytes(b"rows")
    content_digest(tmp_path / "rows")
    assert not cache.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"state": 1}', "x" * 100, '{"state": {}, "digests": {"": "zz"}}']
)
def test_a_damaged_cache_is_made_again(tmp_path: Path, cache: Path, content: str) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"rows")
    content_digest(path)
    (proof,) = cache.iterdir()
    proof.write_text(content)
    assert content_digest(path) == hashlib.sha256(b"rows").hexdigest()
    proof.unlink()
    proof.mkdir()
    assert content_digest(path) == hashlib.sha256(b"rows").hexdigest()


def test_a_cache_that_cannot_be_written_is_none(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "rows").write_bytes(b"rows")
    assert content_digest(tmp_path / "rows") == hashlib.sha256(b"rows").hexdigest()


def test_without_a_home_nothing_is_kept_and_nothing_is_left_in_the_working_directory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for named in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        monkeypatch.setenv("HOME", "relative")
        (tmp_path / "rows").write_bytes(b"rows")
        assert content_digest(tmp_path / "rows") == hashlib.sha256(b"rows").hexdigest()
        assert [path.name for path in tmp_path.iterdir()] == ["rows"]
