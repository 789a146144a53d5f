"""The parts of a checkpoint folder: which files there are, and what params.json says."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mlxlora_core.api import ModelError, some

PARAMS = "params.json"
TOKENIZER = "tokenizer.model"
_SHARD = re.compile(r"consolidated\.([0-9]{1,9})\.pth")
_PARAMS_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Parts:
    """The files of a checkpoint.

    Attributes:
        shards: the ``.pth`` files by their number, 0 first.
        params: ``params.json``.
        tokenizer: ``tokenizer.model``.
    """

    shards: tuple[Path, ...]
    params: Path
    tokenizer: Path


def find_parts(folder: Path) -> Parts:
    """The files of the checkpoint in ``folder``.

    Raises:
        ModelError: a part is absent, a shard number is missing or there twice,
            or a ``consolidated.*.pth`` has no number (all listed).
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as fault:
        raise ModelError(f"cannot be read: {fault.strerror}", where=folder) from None
    numbered: dict[int, list[str]] = {}
    extra = []
    for name in names:
        if match := _SHARD.fullmatch(name):
            numbered.setdefault(int(match[1]), []).append(name)
        elif name.startswith("consolidated.") and name.endswith(".pth"):
            extra.append(name)
    faults = _number_faults(numbered)
    faults += [f"{name} is no numbered shard" for name in extra]
    faults += [f"{name} is missing" for name in (PARAMS, TOKENIZER) if name not in names]
    if faults:
        raise ModelError(
            some(faults),
            where=folder,
            fix=f"put all consolidated.NN.pth of one model there, from 00 on, with {PARAMS} and {TOKENIZER}",
        )
    shards = tuple(folder / numbered[number][0] for number in sorted(numbered))
    return Parts(shards, folder / PARAMS, folder / TOKENIZER)


def shard_name(number: int) -> str:
    """The file name of a shard: ``consolidated.07.pth``."""
    return f"consolidated.{number:02d}.pth"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device is refused without waiting for it.

    Raises:
        ModelError: the file cannot be opened, or is something else than a file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as fault:
        raise ModelError(f"cannot be read: {fault.strerror}", where=path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError("is no regular file", where=path)
    return os.fdopen(descriptor, "rb")


def read_some(file: BinaryIO, count: int, path: Path) -> bytes:
    """Up to ``count`` bytes of an open file.

    Raises:
        ModelError: the disk does not give them.
    """
    try:
        return file.read(count)
    except OSError as fault:
        raise ModelError(f"cannot be read: {fault.strerror}", where=path) from None


def read_params(path: Path) -> Mapping[str, Any]:
    """The object in params.json, as it stands there.

    Raises:
        ModelError: it is no JSON object (with line and column), or a key is there twice.
    """
    with open_regular(path) as file:
        data = read_some(file, _PARAMS_LIMIT_BYTES + 1, path)
    if len(data) > _PARAMS_LIMIT_BYTES:
        raise ModelError(
            f"is larger than {_PARAMS_LIMIT_BYTES >> 20} MiB, wanted a few lines of JSON", where=path
        )
    try:
        params = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as fault:
        raise ModelError(
            f"is no JSON: {fault.msg}", where=f"{path}:{fault.lineno}:{fault.colno}", fix="mend it"
        ) from None
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        raise ModelError("is not UTF-8", where=f"{path}:{line}", fix="save it as UTF-8") from None
    except (ValueError, RecursionError) as fault:
        raise ModelError(f"is no usable JSON: {fault}", where=path, fix="mend it") from None
    if not isinstance(params, dict):
        raise ModelError(f"holds a {type(params).__name__}, wanted an object", where=path)
    return params


def _number_faults(numbered: Mapping[int, list[str]]) -> list[str]:
    """What is wrong with the numbers of the shards; they must be 0, 1, 2 and so on."""
    if not numbered:
        return [f"{shard_name(0)} is missing"]
    faults = [f"{' and '.join(names)} have one number" for names in numbered.values() if len(names) > 1]
    gaps = max(numbered) + 1 - len(numbered)
    if gaps:
        # A stray number may be huge: only the first gaps are spelt out.
        absent = (shard_name(n) for n in range(max(numbered)) if n not in numbered)
        there = some(names[0] for _, names in sorted(numbered.items()))
        rest = f" and {gaps - 10} more" if gaps > 10 else ""
        faults.append(f"{', '.join(islice(absent, 10))}{rest} missing beside {there}")
    return faults


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless a key stands in it twice."""
    counts = Counter(key for key, _ in pairs)
    twice = sorted(key for key, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"{some(twice)} there twice")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
