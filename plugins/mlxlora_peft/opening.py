"""What an adapter of PEFT holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxlora_core.api import ForeignAdapter, MlxloraError, ModelError
from mlxlora_core.files import lazy_tensors
from mlxlora_peft import config as configs
from mlxlora_peft.config import CONFIG
from mlxlora_peft.low_rank import low_rank
from mlxlora_peft.names import (
    EMBEDDING_A,
    EMBEDDING_B,
    IA3,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    VERA_B,
    VERA_D,
    Held,
    is_peft_name,
    taken_apart,
)
from mlxlora_peft.vectors import ia3, vera

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def detect(path: Path) -> bool:
    """Whether a path is a folder of PEFT's, or a file with tensors under its names."""
    try:
        if path.is_dir():
            config = configs.read(path / CONFIG)
            return configs.is_of_peft(config) or any((path / name).is_file() for name in (TENSORS, PICKLE))
        if path.name in (TENSORS, PICKLE):
            return path.is_file()
        return path.suffix == ".safetensors" and any(map(is_peft_name, lazy_tensors(path)))
    except (MlxloraError, OSError):
        return False


def open_adapter(path: Path) -> ForeignAdapter:
    """The adapter in a folder of PEFT, or in a file with the config beside it.

    The tensors say the modules and the ranks, the config what they are multiplied with. Without a
    config the scale is not known.

    Args:
        path: the folder, or the file.

    Raises:
        ModelError: what is not computed here, by name; a damaged file or one that lacks a part.
    """
    file = _file(path)
    config = configs.read(file.parent / CONFIG)
    where = file.parent / CONFIG
    if not configs.is_of_peft(config):
        if path.is_dir():
            raise ModelError("says no peft_type, which every adapter of PEFT has", where=where)
        config = {}  # of another tool
    kind = configs.check(config, where) if config else ""
    held = _held(file)
    opened: ForeignAdapter = _kind(kind, held, file)(config, held, where)
    return replace(opened, notes=[*configs.notes(config), *held.notes])


def _file(path: Path) -> Path:
    """The file with the tensors.

    Raises:
        ModelError: it is a pickle, or there is none.
    """
    file = path / TENSORS if path.is_dir() else path
    if file.suffix == ".bin" or (path.is_dir() and not file.is_file() and (path / PICKLE).is_file()):
        fix = "load it with PEFT and save it again: save_pretrained writes adapter_model.safetensors"
        raise ModelError(f"{PICKLE} is a pickle, which is not read", where=path, fix=fix)
    if not file.is_file():
        raise ModelError(f"there is no {file.name}", where=path, fix="name the folder that PEFT has saved")
    return file


def _held(file: Path) -> Held:
    """The tensors of a file by module and part."""
    held = taken_apart(lazy_tensors(file))
    if not held.modules:
        raise ModelError("holds no adapter of PEFT", where=file)
    return held


def _kind(kind: str, held: Held, file: Path) -> Any:
    """The function that opens what is held.

    Raises:
        ModelError: the tensors are of another kind than the config says.
    """
    parts = {part for module in held.modules.values() for part in module}
    found = sorted(name for name, (own, _) in _OPENERS.items() if parts & own)
    if len(found) != 1 or (kind and found != [kind]):
        said = f"peft_type says {kind}" if kind else "there is no config"
        raise ModelError(f"its tensors are those of {' and '.join(found)}, but {said}", where=file)
    return _OPENERS[found[0]][1]


#: peft_type -> the parts of its tensors' names, and what makes an adapter of them
_OPENERS: Mapping[str, tuple[frozenset[str], Any]] = {
    "LORA": (frozenset({LORA_A, LORA_B, MAGNITUDE, EMBEDDING_A, EMBEDDING_B}), low_rank),
    "IA3": (frozenset({IA3}), ia3),
    "VERA": (frozenset({VERA_B, VERA_D}), vera),
}
