"""Checkpoints: a training that was killed goes on from the newest one and ends bit for bit the same.

A checkpoint is a folder ``step-0000120`` that appears whole::

    adapter.safetensors    the adapter file of that step
    optimizer.safetensors  the state of the optimizer
    state.json             step, counters, losses, seed
    MANIFEST.json          size and SHA-256 of these, and what the training is made of

It counts only when its manifest verifies. What a step draws at random is a
function of (seed, step), and the rows of a step are one of (seed, step) and the
data, so that seed and step are the random state and the place in the data.

Here they are found and checked, without MLX; :mod:`mlxlora_core.training.saving` writes
them and goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from mlxlora_core.errors import (
    ModelError,
    PluginError,
    ResourceError,
    SafetyError,
    listing,
)
from mlxlora_core.files import leftovers
from mlxlora_core.files.documents import read_json
from mlxlora_core.files.forms import Flag, Form, Map, Option, Plain, Table, Text, Whole, shown, sound
from mlxlora_core.files.targets import hold_only_files
from mlxlora_core.files.tensor_header import FINGERPRINT, stated
from mlxlora_core.plugins import Registry
from mlxlora_core.training.progress import STATE_FORM

SCHEMA = 1
#: name of the folder of what is kept of the rows, which is a temporary one
PREFIX = "prefix"
MANIFEST = "MANIFEST.json"
ADAPTER, OPTIMIZER, STATE = PARTS = ("adapter.safetensors", "optimizer.safetensors", "state.json")

_NAME = re.compile(r"step-([0-9]{7,})")
_JSON_BYTES = 16 * 2**20  # far more than any manifest or state has

_FILE = Table({"bytes": Whole(), "sha256": Text()})
_PLUGIN = Table({"distribution": Text(), "version": Text()})

#: what MANIFEST.json is held against
MANIFEST_FORM = Table(
    {
        "schema": Whole(least=1),
        "step": Whole(),
        "finished": Flag(),
        "files": Table(dict.fromkeys(PARTS, _FILE)),
        "base": Text(),
        "tokenizer": Option(Text()),
        "data": Map(Text()),
        "settings": Map(Plain()),
        "plugins": Map(_PLUGIN),
        "versions": Map(Text()),
        "sha256": Text(),
    }
)


class Start(Enum):
    """How a training starts where an earlier one may have left checkpoints."""

    BEGIN = "begin"  # refused where a training has not ended
    OVERWRITE = "overwrite"  # begin, whatever is there
    RESUME = "resume"  # go on; refused where there is nothing to go on from
    CONTINUE = "continue"  # go on where a training has not ended, else begin


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what its manifest says.

    Attributes:
        folder: where it is.
        manifest: what ``MANIFEST.json`` holds.
        state: what ``state.json`` holds.
    """

    folder: Path
    manifest: Mapping[str, Any]
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps made before it."""
        return int(self.manifest["step"])

    @property
    def finished(self) -> bool:
        """Whether the training was at its end."""
        return bool(self.manifest["finished"])


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        valid: checkpoints that verify, newest first.
        damaged: folder -> why it does not verify, newest first.
        strange: those of both that mlxlora has not written, or that hold files of somebody else too.
    """

    valid: tuple[Checkpoint, ...]
    damaged: Mapping[Path, str]
    strange: tuple[Path, ...] = ()

    @property
    def notes(self) -> list[str]:
        """A line on each that is passed over."""
        return [f"warning: {folder} was skipped: {reason}" for folder, reason in self.damaged.items()]


def find(folder: Path) -> Found:
    """The checkpoints in a folder, which may be absent; nothing is changed.

    Raises:
        ModelError: it is no folder, or a checkpoint was made by a newer mlxlora.
        ResourceError: the folder cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise ModelError("is no folder of checkpoints", where=folder, fix="move it away")
    try:
        names = [path.name for path in folder.iterdir() if step_of(path.name)] if folder.is_dir() else []
    except OSError as fault:
        raise ResourceError(f"cannot be read: {fault.strerror}", where=folder) from fault
    valid, damaged = [], {}
    for name in sorted(names, key=step_of, reverse=True):
        try:
            valid.append(_verified(folder / name))
        except _Damaged as fault:
            damaged[folder / name] = fault.what
    strange = [folder / name for name in names if not is_ours(folder / name)]
    return Found(tuple(valid), damaged, tuple(strange))


def is_ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint that mlxlora has written, sound or not, and holds nothing else.

    Its manifest shows that, or else the header of one of its files.
    """
    try:
        if folder.is_symlink() or not folder.is_dir() or not hold_only_files(folder, [MANIFEST, *PARTS]):
            return False
        empty = not any(folder.iterdir())
    except OSError:
        return False
    return empty or _is_manifest(folder / MANIFEST) or any(FINGERPRINT in stated(folder / n) for n in PARTS)


def _is_manifest(path: Path) -> bool:
    try:
        manifest = read_json(path, _JSON_BYTES)
    except ModelError:
        return False
    return isinstance(manifest, dict) and {"schema", "step", "files", "sha256"} <= manifest.keys()


def find_for(how: Start, folder: Path) -> Found:
    """The checkpoints in a folder, which a training may start with so.

    Raises:
        ModelError: there is none to resume.
        SafetyError: a training that has not ended, or what mlxlora has not written, would be lost.
        MlxloraError: as :func:`find`.
    """
    if how is Start.RESUME:
        return find_to_resume(folder)
    if how is Start.CONTINUE:
        _clear(folder)
        return find(folder)
    return find_to_begin(folder, overwrite=how is Start.OVERWRITE)


def find_to_resume(folder: Path) -> Found:
    """The checkpoints in a folder, of which there is one that verifies.

    Raises:
        ModelError: there is none.
        MlxloraError: as :func:`find`.
    """
    _clear(folder)
    found = find(folder)
    if found.valid:
        return found
    damaged = "".join(f"; {path.name}: {reason}" for path, reason in found.damaged.items())
    raise ModelError(
        f"there is no checkpoint that verifies: looked for step-*/{MANIFEST}{damaged}",
        where=folder,
        fix="leave --resume out to begin, or name the --adapter-file that was trained",
    )


def find_to_begin(folder: Path, *, overwrite: bool) -> Found:
    """The checkpoints in a folder, none of which is of a training that can go on unless ``overwrite``.

    Raises:
        SafetyError: they are, or something else stands there that mlxlora has not written.
        MlxloraError: as :func:`find`.
    """
    _clear(folder)
    found = find(folder)
    refuse_strange([folder for folder in found.strange if folder in found.damaged])
    there = found.valid or found.damaged
    if there and not overwrite and not (found.valid and found.valid[0].finished):
        where = f"step {found.valid[0].step}" if found.valid else "none of them verifies"
        raise SafetyError(
            f"holds checkpoints of a training that has not ended ({where})",
            where=folder,
            fix="go on with --resume, or begin anew with --overwrite",
        )
    refuse_strange(found.strange)
    return found


def refuse_strange(folders: Sequence[Path]) -> None:
    """Refuse to remove or to replace what has the name of a checkpoint and holds what is none of ours.

    Raises:
        SafetyError: there is such a folder.
    """
    if folders:
        raise SafetyError(
            "has the name of a checkpoint, holds what mlxlora has not written, and was left alone",
            where=folders[0],
            fix="move it away",
        )


def _clear(folder: Path) -> None:
    """Remove what a training that was killed has left: half a checkpoint, and what it kept of the rows."""
    leftovers.clear_leftovers(folder, "step-*")
    leftovers.clear_leftovers(folder, PREFIX)


def check_plugins(found: Found, registry: Registry) -> None:
    """Refuse to go on without the plugins that the newest checkpoint was made with.

    Raises:
        PluginError: with how to install them.
    """
    if not found.valid:
        return
    newest = found.valid[0]
    active = {plugin.name for plugin in registry.plugins if plugin.status == "active"}
    gone = {n: p for n, p in newest.manifest["plugins"].items() if n not in active}
    if gone:
        wanted = sorted({f"{p['distribution']}=={p['version']}" for p in gone.values() if p["version"]})
        raise PluginError(
            f"the checkpoint was made with plugins that are not active: {listing(gone)}",
            where=newest.folder,
            fix=f"pip install {' '.join(wanted)}" if wanted else "name the plugin's file with -P",
        )


class _Damaged(ModelError):
    """Why a folder is no checkpoint."""


def step_of(name: str) -> int:
    """The step in the name of a checkpoint, or 0."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


def _verified(folder: Path) -> Checkpoint:
    """A checkpoint whose files are what its manifest says.

    Raises:
        _Damaged: it is none.
        ModelError: a newer mlxlora has made it.
    """
    manifest = _read_part(folder / MANIFEST)
    if type(manifest) is not dict or type(manifest.get("schema")) is not int or manifest["schema"] < 1:
        raise _Damaged(f"{MANIFEST} is not one of mlxlora")
    if manifest["schema"] > SCHEMA:
        raise ModelError(
            f"was made by a newer mlxlora (format {shown(manifest['schema'])}, this one knows {SCHEMA})",
            where=folder,
            fix="upgrade with: pip install --upgrade mlxlora",
        )
    _require_form(MANIFEST_FORM, manifest, MANIFEST)
    if manifest.pop("sha256") != digest(manifest):
        raise _Damaged(f"{MANIFEST} is not what was written")
    if manifest["step"] != step_of(folder.name):
        raise _Damaged(f"{MANIFEST} is that of another checkpoint")
    for name in PARTS:
        _check_part(folder / name, manifest["files"][name])
    state = _read_part(folder / STATE)
    _require_form(STATE_FORM, state, STATE)
    if state["step"] != manifest["step"]:
        raise _Damaged(f"{STATE} is of step {state['step']}, wanted {manifest['step']}")
    return Checkpoint(folder, manifest, state)


def _read_part(path: Path) -> Any:
    """The value in one of the JSON files of a checkpoint."""
    try:
        return read_json(_required(path), _JSON_BYTES, _Damaged)
    except _Damaged as fault:
        raise _Damaged(f"{path.name} {fault.what}") from fault


def _required(path: Path) -> Path:
    if path.is_symlink() or not path.is_file():
        raise _Damaged("is not there" if not path.exists() else "is a link or no regular file")
    return path


def _require_form(form: Form, value: Any, name: str) -> None:
    """Refuse what does not agree with its form; nothing of a checkpoint is made up."""
    faults = sound(form, value)[1]
    if faults:
        raise _Damaged(f"{name} is not what mlxlora writes: {listing(faults, 3)}")


def _check_part(path: Path, stated: Mapping[str, Any]) -> None:
    try:
        if path.is_symlink() or not path.is_file():
            raise _Damaged(f"there is no {path.name}")
        size = path.stat().st_size
        if size != stated["bytes"]:
            raise _Damaged(f"{path.name} has {size} bytes, {stated['bytes']} were written")
        if sha256(path) != stated["sha256"]:
            raise _Damaged(f"{path.name} is not what was written")
    except OSError as fault:
        raise _Damaged(f"{path.name} cannot be read: {fault.strerror}") from fault


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of what a manifest says, without this."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256, in hex, of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
