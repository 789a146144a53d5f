"""Files of a model or an adapter, each spoilt in ways that happen, for the suites of those who read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora_core.errors import LINE_BYTES, MlxloraError
from mlxlora_core.values import LazyTensor

_LARGEST_DOCUMENT = 1 << 16  # bytes of a document of which every key is taken away


def spoilt(good: Path, room: Path) -> Iterator[tuple[str, Path]]:
    """What was done, and the folder in which it was done: a copy of a good one below ``room``, one at a time.

    Each file is emptied, cut in the middle and cut by its last byte; a JSON object also loses each of its
    keys and gives way to other documents.
    """
    for file in sorted(path for path in good.rglob("*") if path.is_file()):
        name, data = file.relative_to(good), file.read_bytes()
        cuts = {"is empty": b"", "is half": data[: len(data) // 2], "lacks a byte": data[:-1]}
        for what, content in {**cuts, **_documents(data)}.items():
            folder = room / "spoilt"
            shutil.copytree(good, folder)
            (folder / name).write_bytes(content)
            yield f"{name} {what}", folder
            shutil.rmtree(folder)


def _documents(data: bytes) -> dict[str, bytes]:
    """What may stand in place of a JSON object, by what it is; nothing for what is none."""
    try:
        said: Any = json.loads(data) if len(data) <= _LARGEST_DOCUMENT else None
    except ValueError:
        return {}
    if not isinstance(said, dict):
        return {}
    fewer = {f"lacks {key}": {k: v for k, v in said.items() if k != key} for key in said}
    others: dict[str, Any] = {"is a list": [], "is a number": 7, "is null": None, "says nothing": {}}
    return {what: json.dumps(one).encode() for what, one in {**fewer, **others}.items()}


def assert_refused_or_the_same(
    name: str, want: Mapping[str, mx.array], opened: Callable[[], Mapping[str, LazyTensor]]
) -> None:
    """Assert that opening and reading is refused in one line, or gives what is wanted.

    Args:
        name: what was done to the files.
        want: the tensors that were in them.
        opened: gives those that are found.
    """
    try:
        found = {key: tensor.read() for key, tensor in opened().items()}
        mx.eval(found)
    except MlxloraError as fault:
        line = str(fault)
        assert "\n" not in line and len(line.encode()) <= LINE_BYTES, f"{name}: {line}"
        return
    except Exception as fault:
        pytest.fail(f"{name}: {type(fault).__name__}: {fault}, wanted an error of mlxlora")
    assert found.keys() == want.keys(), f"{name}: is read without an error, with other tensors"
    other = [key for key in want if not mx.array_equal(found[key], want[key])]
    assert other == [], f"{name}: is read without an error, with other numbers"
