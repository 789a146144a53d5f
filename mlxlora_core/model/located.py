"""Finds a model by its path, by a file that an installed distribution ships, or by its name on the Hub.

``package:NAME/FILE`` stands for a file, or a folder, of an installed distribution; its
code is not imported. ``org/name``, ``org/name@revision`` and ``org/name/FILE.gguf``
stand for a model on the Hub of Hugging Face, where there is neither such a path nor
a folder ``org``: a slip in a path of one's own asks nobody.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.model.hub import HubName, find_on_hub
from mlxlora_core.model.shipped import PREFIX, find_shipped
from mlxlora_core.path_text import path_text

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:/(?P<file>[A-Za-z0-9][A-Za-z0-9._-]{{0,200}}\.gguf))?"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,100}))?"
)


@dataclass(frozen=True)
class LocatedModel:
    """Where a model is.

    Attributes:
        path: of the folder or file.
        name: by which exactly this one is found again: that of a model on the Hub has its commit.
        revision: the commit, or the version of the distribution; nothing of a path.
        notes: what its user may not expect, in words.
    """

    path: Path
    name: str
    revision: str = ""
    notes: tuple[str, ...] = ()


def locate_model(model: str | os.PathLike[str], *, fetch: bool = True) -> LocatedModel:
    """Find the model that is named; one on the Hub is fetched where it is not in the cache.

    A path that is not there is given back as it is: whoever opens it says so.

    Args:
        model: what it is named by; what is no text is a path.
        fetch: whether one on the Hub may be fetched; what is not in the cache is else
            given back as if it were a path.

    Raises:
        UsageError: a name of a shipped file that names no file.
        ModelError: no such distribution, file or model, or the Hub does not give it.
        ResourceError: the disk is full.
    """
    if not isinstance(model, str):
        return LocatedModel(Path(model), path_text(Path(model)))
    if model.startswith(PREFIX):
        found = find_shipped(model)
        return LocatedModel(found.path, found.name, found.version)
    name = hub_name(model)
    if name is None:
        return LocatedModel(Path(model), path_text(Path(model)))
    fetched = find_on_hub(name, fetch)
    if fetched is None:
        return LocatedModel(Path(model), model, notes=(f"{model} would be fetched from the Hub",))
    return LocatedModel(fetched.path, name.pinned(fetched.commit), fetched.commit, fetched.notes)


def is_path(model: str, folder: Path | None = None) -> bool:
    """Whether a model is named by a path, there or not, and by nothing else.

    Args:
        model: what it is named by.
        folder: that a relative path starts from; None for the working folder.
    """
    return not model.startswith(PREFIX) and hub_name(model, folder) is None


def hub_name(text: str, folder: Path | None = None) -> HubName | None:
    """The name on the Hub that a text is, or None for what is a path or looks like no name there."""
    match = _HUB.fullmatch(text)
    if (
        match is None
        or "--" in text
        or ".." in text
        or os.path.lexists((folder or Path()) / text.partition("/")[0])
    ):
        return None
    return HubName(match["repo"], match["revision"] or "", match["file"] or "")
