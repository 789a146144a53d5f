"""Which files make a model: one, or the parts of one, named ``NAME-00001-of-00003.gguf``."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, listing
from mlxlora_core.files import open_regular
from mlxlora_gguf.header import MAGIC, Header, read_header

_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_ENDING = ".gguf"
_OTHERS = (".safetensors", ".pth", ".npz", ".bin")  # weights beside which a GGUF file is a copy
_PARTS_LIMIT = 1000
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder of them with no other weights; never raises."""
    try:
        if not path.is_dir():
            with open_regular(path) as file:
                return file.read(len(MAGIC)) == MAGIC
        names = os.listdir(path)
    except (OSError, ModelError, ValueError):
        return False
    return any(name.endswith(_ENDING) for name in names) and not any(name.endswith(_OTHERS) for name in names)


def find_parts(path: Path) -> list[Path]:
    """The files of the model that a path names: a file, any part of one, or a folder with one model.

    Raises:
        ModelError: a folder with none or several models, or parts that are missing (all listed).
    """
    if path.is_dir():
        path = path / _only_model(path)
    match = _PART.fullmatch(path.name)
    if not match or int(match[3]) == 1:
        return [path]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count <= _PARTS_LIMIT:
        raise ModelError(f"names part {int(match[2])} of {count}, wanted at most {_PARTS_LIMIT}", where=path)
    parts = [
        path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}{_ENDING}") for number in range(1, count + 1)
    ]
    absent = [part.name for part in parts if not part.exists()]
    if absent:
        raise ModelError(
            f"is one of {count} parts, of which {len(absent)} are missing: {listing(absent, 3)}",
            where=path,
            fix="put all parts into one folder",
        )
    return parts


def _only_model(folder: Path) -> str:
    """The first file of the only model in a folder; what its pictures are read by is no model."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(_ENDING))
    except OSError as fault:
        raise ModelError(f"cannot be read: {fault.strerror}", where=folder) from None
    models: dict[str, str] = {}
    for name in names:
        match = _PART.fullmatch(name)
        models.setdefault(f"{match[1]}-of-{match[3]}" if match else name, name)
    found = list(models.values())
    if len(found) > 1:
        found = [name for name in found if "mmproj" not in name.lower()] or found
    if len(found) != 1:
        raise ModelError(
            f"holds {len(found)} GGUF models, wanted one: {listing(found, 5)}",
            where=folder,
            fix=f"name one of them, such as {folder / found[0]}" if found else "",
        )
    return found[0]


def read_parts(paths: Sequence[Path]) -> list[Header]:
    """The headers of all parts of a model, which must belong together.

    Raises:
        ModelError: a file is damaged, or is not the part that its name says.
    """
    headers = [read_header(path) for path in paths]
    for number, header in enumerate(headers):
        _check_part(header, number, len(headers), headers[0].keys)
    if len(headers) > 1:
        _check_tensors(headers)
    return headers


def _check_part(header: Header, number: int, count: int, first: Mapping[str, Any]) -> None:
    """Refuse a file that is not part ``number`` of ``count``, or of another model than the first."""
    stated = header.keys.get(_COUNT, 1), header.keys.get(_NUMBER, 0)
    if stated[0] in (0, 1) and count == 1:
        return
    if stated != (count, number):
        raise ModelError(
            f"is part {number} of {count} by its name, counted from 0, "
            f"and {stated[1]!r:.40} of {stated[0]!r:.40} by its keys",
            where=header.path,
            fix="give the parts the names that they had, NAME-00001-of-00002.gguf and so on, in one folder",
        )
    other = [key for key, value in header.keys.items() if key != _NUMBER and first.get(key) != value]
    if other:
        raise ModelError(
            f"is a part of another model than the first: {listing(other, 3)} differ",
            where=header.path,
        )


def _check_tensors(headers: Sequence[Header]) -> None:
    """Refuse parts that hold a tensor twice, or another number of tensors than they should."""
    names = [entry.name for header in headers for entry in header.tensors]
    if len(set(names)) < len(names):
        ((twice, _),) = Counter(names).most_common(1)
        raise ModelError(f"tensor {twice} is in two parts", where=headers[0].path)
    wanted = headers[0].keys.get(_TENSORS)
    if wanted != len(names):
        raise ModelError(
            f"has {len(names)} tensors in {len(headers)} parts, wanted {wanted!r:.40} ({_TENSORS})",
            where=headers[0].path,
        )
