"""Tensors of a GGUF file, each read when it is asked for, in runs of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.api import LazyTensor, ModelError, PackedTensor
from mlxlora_core.files import open_regular
from mlxlora_gguf import unpack
from mlxlora_gguf.blocks import GROUP, BlockType
from mlxlora_gguf.header import Entry, file_state
from mlxlora_gguf.unpack import Array

_RUN_BYTES = 1 << 18  # of a file that are unpacked at a time: what is made of them stays in the cache

_Change = Callable[[BlockType, Array], Array]


def lazy(entry: Entry, state: tuple[int, ...], scales: str) -> LazyTensor:
    """A tensor of a file, packed where the file has it packed.

    Args:
        entry: where it is.
        state: of the file, which must still be so when it is read.
        scales: type of scales and biases: ``exact``, ``float16`` or ``float32``.
    """
    kind = entry.type
    if kind.weights == 1:
        return LazyTensor(entry.shape, kind.dense, partial(_read_dense, entry, state))
    expanded = partial(_read, entry, state, unpack.dense, entry.shape[-1], "float32")
    if not kind.bits or len(entry.shape) < 2:
        return LazyTensor(entry.shape, "float32", expanded, expanded=True)
    dtype = scales if scales != "exact" else "float32" if kind.super_blocks else "float16"
    columns = {"weight": entry.shape[-1] * kind.bits // 32, "scales": entry.shape[-1] // GROUP}
    columns["biases"] = columns["scales"]
    changes: dict[str, _Change] = {"weight": unpack.words, "scales": unpack.scales, "biases": unpack.biases}
    parts = {}
    for name, change in changes.items():
        stored = "uint32" if name == "weight" else dtype
        read = partial(_read, entry, state, change, columns[name], stored)
        parts[name] = LazyTensor((*entry.shape[:-1], columns[name]), stored, read)
    packed = PackedTensor("affine", {"group_size": GROUP, "bits": kind.bits}, parts)
    return LazyTensor(entry.shape, "float32", expanded, packed)


def read_small(entry: Entry, state: tuple[int, ...]) -> list[float]:
    """The numbers of a dense tensor."""
    numbers: Any = _read_dense(entry, state).reshape(-1).astype(mx.float32).tolist()
    return list(numbers)


def _read_dense(entry: Entry, state: tuple[int, ...]) -> mx.array:
    """A tensor whose numbers stand in the file as they are."""
    forms = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
    whole = np.empty((entry.size // entry.row_bytes, entry.row_bytes), np.uint8)
    for start, rows in _runs(entry, state):
        whole[start : start + len(rows)] = rows
    values = whole.view(forms[entry.type.dense])
    if entry.type.dense == "bfloat16":
        wrong = int(np.count_nonzero((values & 0x7F80) == 0x7F80))
    else:
        wrong = values.size - int(np.count_nonzero(np.isfinite(values)))
    if wrong:
        raise _not_finite(entry, wrong)
    array = mx.array(values)
    return (array.view(mx.bfloat16) if entry.type.dense == "bfloat16" else array).reshape(entry.shape)


def _read(entry: Entry, state: tuple[int, ...], change: _Change, columns: int, dtype: str) -> mx.array:
    """What ``change`` makes of the rows of a tensor, in a type that must hold it."""
    whole = np.empty((entry.size // entry.row_bytes, columns), dtype)
    for start, rows in _runs(entry, state):
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
            made = change(entry.type, rows)
            whole[start : start + len(rows)] = made
        if dtype != "uint32":
            _require_finite(entry, made, whole[start : start + len(rows)], dtype)
    return mx.array(whole).reshape(*entry.shape[:-1], columns)


def _require_finite(entry: Entry, made: Array, kept: Array, dtype: str) -> None:
    wrong = kept.size - int(np.count_nonzero(np.isfinite(kept)))
    if wrong and np.isfinite(made).all():
        largest = float(np.abs(made).max())
        raise ModelError(
            f"tensor {entry.name} ({entry.type.name}) has a bias or scale of {largest:g}, "
            f"which {dtype} cannot hold",
            where=entry.path,
            fix="convert it with --loader gguf --set loader.scales=float32",
        )
    if wrong:
        raise _not_finite(entry, wrong)


def _not_finite(entry: Entry, count: int) -> ModelError:
    return ModelError(
        f"tensor {entry.name} ({entry.type.name}) has {count} values that are not finite", where=entry.path
    )


def _runs(entry: Entry, state: tuple[int, ...]) -> Iterator[tuple[int, Array]]:
    """One run of rows after another: the number of its first row, and (R, bytes) that last until the next."""
    count = entry.size // entry.row_bytes
    most = max(1, min(count, _RUN_BYTES // entry.row_bytes))
    buffer = np.empty((most, entry.row_bytes), np.uint8)
    with open_regular(entry.path) as file:
        if file_state(os.fstat(file.fileno())) != state:
            raise ModelError("has changed since it was opened", where=entry.path, fix="run it again")
        file.seek(entry.offset)
        for start in range(0, count, most):
            rows = buffer[: min(most, count - start)]
            _fill(file, rows, entry.path)
            yield start, rows


def _fill(file: BufferedReader, rows: Array, path: Path) -> None:
    """Read as many bytes as ``rows`` has."""
    try:
        read = file.readinto(rows.data)
    except OSError as fault:
        raise ModelError(f"cannot be read: {fault.strerror}", where=path) from None
    if read != rows.nbytes:
        raise ModelError("became shorter while it was read", where=path)
