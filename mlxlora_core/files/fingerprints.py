"""What a file holds, as a digest of its contents: never what it says of itself.

The digest of a large file is kept in the user's cache, together with what the system tells of the
file: which one it is, its size, and when its contents or anything else about it last changed. Where
that is so still, nothing is read again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from mlxlora_core.errors import MlxloraError, ModelError
from mlxlora_core.files.documents import read_form
from mlxlora_core.files.durable import write_json
from mlxlora_core.files.forms import Map, Table, Text, Whole
from mlxlora_core.files.input_file import open_regular
from mlxlora_core.files.tensor_header import TYPE_NAMES, read_entries
from mlxlora_core.machine.processors import processors

_PART_BYTES = 4 << 20  # read at a time
_LARGE_BYTES = 64 << 20  # a smaller file is read sooner than it is looked up
_CACHED_BYTES = 64 << 20
_PROOF_FORM = Table({"state": Map(Whole(most=2**64)), "digests": Map(Text())})
_SETTLED_NS = 2 * 10**9  # a clock may be so coarse that a change just after is not seen

Digests = dict[str, str]


def content_digest(path: Path, kind: type[MlxloraError] = ModelError) -> str:
    """SHA-256, in hex, of the bytes of a file.

    Args:
        path: of a regular file; a link is followed.
        kind: the error to raise.

    Raises:
        MlxloraError: of ``kind``: it cannot be read, or is no regular file.
    """
    with open_regular(path, kind) as file:
        try:
            return _remembered(file, path, "content", lambda: {"": _of_file(file)})[""]
        except OSError as fault:
            raise kind(f"cannot be read: {fault.strerror}", where=path) from fault


def tensor_digests(path: Path) -> Digests:
    """Name -> digest, in hex, of each tensor of a ``.safetensors``; some of each are in memory at a time.

    Raises:
        ModelError: the file is damaged, or cannot be read.
    """
    with open_regular(path) as file:
        try:
            return _remembered(file, path, "tensors", lambda: _of_tensors(file, path))
        except OSError as fault:
            raise ModelError(f"cannot be read: {fault.strerror}", where=path) from fault


def begin_tensor(name: str, dtype: str, shape: Iterable[int]) -> hashlib._Hash:
    """The digest of a tensor before its bytes.

    Args:
        name: of the tensor.
        dtype: as MLX calls it, such as ``float16``.
        shape: of the tensor.
    """
    return hashlib.sha256(f"{name}\0mlx.core.{dtype}\0{tuple(shape)}\0".encode())


def combine(digests: Mapping[str, str]) -> str:
    """One fingerprint, in hex, of named digests, whatever their order."""
    return hashlib.sha256(b"".join(bytes.fromhex(digests[name]) for name in sorted(digests))).hexdigest()


def _of_file(file: BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _of_tensors(file: BufferedReader, path: Path) -> Digests:
    start, entries = read_entries(file, path)
    descriptor = file.fileno()

    def digest(name: str) -> str:
        entry = entries[name]
        sha = begin_tensor(name, TYPE_NAMES[entry["dtype"]], entry["shape"])
        at, end = (start + offset for offset in entry["data_offsets"])
        while at < end:
            part = os.pread(descriptor, min(_PART_BYTES, end - at), at)
            if not part:
                raise ModelError("became shorter while it was read", where=path, fix="try again")
            sha.update(part)
            at += len(part)
        return sha.hexdigest()

    if os.fstat(descriptor).st_size < _LARGE_BYTES:
        return {name: digest(name) for name in entries}
    with ThreadPoolExecutor(min(8, processors())) as pool:
        return dict(zip(entries, pool.map(digest, entries), strict=True))


# --- what is remembered -------------------------------------------------------


def _remembered(file: BufferedReader, path: Path, what: str, make: Callable[[], Digests]) -> Digests:
    """Digests of an open file: those of before where nothing about it has changed, and else new ones."""
    state, folder = _state(file), _cache()
    if state["size"] < _LARGE_BYTES or folder is None:
        return make()
    name = hashlib.sha256(f"{what} {state['device']} {state['inode']}".encode()).hexdigest()
    proof = folder / f"{name}.json"
    known = _recall(proof, state)
    if known is not None:
        return known
    digests = make()
    if _state(file) != state:
        raise ModelError("was changed while it was read", where=path, fix="try again")
    if time.time_ns() - max(state["changed"], state["modified"]) > _SETTLED_NS:
        with suppress(MlxloraError, OSError, RuntimeError):  # it is only sooner the next time
            write_json(proof, {"state": state, "digests": digests})
    return digests


def _recall(proof: Path, state: Mapping[str, int]) -> Digests | None:
    try:
        told = read_form(proof, _PROOF_FORM, _CACHED_BYTES)
        digests: Digests = told["digests"]
        sound = told["state"] == state and all(len(bytes.fromhex(text)) == 32 for text in digests.values())
    except (MlxloraError, ValueError):
        return None
    return digests if sound else None


def _state(file: BufferedReader) -> dict[str, int]:
    """What tells one file, and one state of it, from another; the time of change cannot be set back."""
    told = os.fstat(file.fileno())
    return {
        "device": told.st_dev,
        "inode": told.st_ino,
        "size": told.st_size,
        "modified": told.st_mtime_ns,
        "changed": told.st_ctime_ns,
    }


def _cache() -> Path | None:
    """The folder of what is remembered from one run to the next, or None where there is no home."""
    named, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    root = named if os.path.isabs(named) else os.path.join(home, ".cache")
    return Path(root, "mlxlora", "digests") if os.path.isabs(root) else None
