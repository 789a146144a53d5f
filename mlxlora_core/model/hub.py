"""Models on the Hub of Hugging Face: out of the cache that huggingface_hub keeps, or fetched by it.

Of a model its weights in ``.safetensors``, its config and the files of its
tokenizer are fetched, and nothing else. config.json comes last: where it is in
the cache, so is the rest, and what was broken off is not taken for a model.
"""

from __future__ import annotations

import errno
import importlib
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.errors import MlxloraError, ModelError, ResourceError, listing
from mlxlora_core.files.documents import read_json

_CONFIG, _PARAMS = "config.json", "params.json"
#: the weights in one file, and what names the shards of those in several -> what is fetched last
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", _CONFIG),
    ("consolidated.safetensors", "consolidated.safetensors.index.json", _PARAMS),
)
_BESIDE = re.compile(
    r"(generation_config|tokenizer_config|special_tokens_map|added_tokens|chat_template|tekken|tokenizer)\.json|"
    r"chat_template\.jinja|additional_chat_templates/[^/]+\.jinja|tokenizer\.model(\.v[0-9]+(m[0-9]+)?)?"
)
_VOCABULARY, _OTHER_VOCABULARIES = "tokenizer.json", re.compile(r"tekken\.json|tokenizer\.model.*")
_PART = re.compile(r"(?P<stem>.+)-[0-9]{5}-of-(?P<count>[0-9]{5})\.gguf")
_SHARD = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INDEX_BYTES = 16 << 20
_LOGIN = "log in with: hf auth login"


@dataclass(frozen=True)
class HubName:
    """A name on the Hub.

    Attributes:
        repo: ``org/name``.
        revision: branch, tag or commit; nothing for the main branch.
        file: of a GGUF file there, or nothing for a folder.
    """

    repo: str
    revision: str = ""
    file: str = ""

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{'/' if self.file else ''}{self.file}{at}"

    def pinned(self, commit: str) -> str:
        """The name of this model at a commit."""
        return str(HubName(self.repo, commit, self.file))


@dataclass(frozen=True)
class Fetched:
    """A model in the cache.

    Attributes:
        path: of its folder or file.
        commit: that it is of.
        notes: what its user may not expect, in words.
    """

    path: Path
    commit: str
    notes: tuple[str, ...] = ()


def find_on_hub(name: HubName, fetch: bool = True) -> Fetched | None:
    """A model out of the cache, or from the Hub; None where it would have to be fetched and must not be.

    What a commit names is taken from the cache without a question to the Hub, and so is
    everything where ``HF_HUB_OFFLINE`` is set or the Hub cannot be reached.

    Raises:
        ModelError: there is no such model or revision, it is not for everybody, has no weights
            that are read, or cannot be fetched.
        ResourceError: the disk is full.
    """
    library = _library(name)
    cached = _cached(library, name)
    if library.constants.HF_HUB_OFFLINE:
        return _offline(cached, name, "HF_HUB_OFFLINE forbids to fetch it")
    if not fetch or (cached is not None and _COMMIT.fullmatch(name.revision)):
        return cached
    try:
        return _fetched(library, name)
    except MlxloraError:
        raise
    except Exception as fault:  # whatever the library, and what it speaks HTTP with, make of a network
        refused = _refused(library, name, fault)
        if refused is not None:
            raise refused from fault
        why = f"the Hub cannot be reached ({_first_line(fault)})"
        if cached is None:
            raise ModelError(
                f"cannot be fetched: {why}", where=str(name), fix="try again; what has come is kept"
            ) from fault
        note = f"{why}: what the cache holds of {name} is taken, commit {cached.commit}"
        return Fetched(cached.path, cached.commit, (note,))


def _library(name: HubName) -> Any:
    """huggingface_hub, which only who names a model on the Hub needs."""
    try:
        library = importlib.import_module("huggingface_hub")
        for module in ("constants", "errors", "utils"):
            importlib.import_module(f"huggingface_hub.{module}")
    except ImportError:
        raise ModelError(
            "there is no such folder or file; huggingface_hub, which asks the Hub for it, is not installed",
            where=str(name),
            fix="name a folder or file that is there, or: pip install 'mlxlora[hub]'",
        ) from None
    if sys.stderr is None or not sys.stderr.isatty():  # where its bars would be no lines
        library.utils.disable_progress_bars()
    return library


def _cached(library: Any, name: HubName) -> Fetched | None:
    """What the cache holds of a model, where all of it has come."""
    for last in (name.file,) if name.file else (_CONFIG, _PARAMS):
        found = library.try_to_load_from_cache(name.repo, last, revision=name.revision or None)
        if isinstance(found, str) and _is_whole(Path(found)):
            path = Path(found)
            return Fetched(path if name.file else path.parent, path.parent.name)
    return None


def _is_whole(last: Path) -> bool:
    """Whether all weights lie beside the file that comes last; others may have fetched that alone."""
    there = {path.name for path in last.parent.iterdir()}
    if last.suffix == ".gguf":
        part = _PART.fullmatch(last.name)
        return part is None or len(_parts(there, part)) == int(part["count"])
    whole, index = next((whole, index) for whole, index, end in _WEIGHTS if end == last.name)
    shards = _shards(last.parent / index) if index in there else [whole]
    return bool(shards) and there.issuperset(shards) and any(map(_BESIDE.fullmatch, there))


def _parts(names: Collection[str], one: re.Match[str]) -> list[str]:
    """The parts of a GGUF file in several, of which ``one`` is the name of one."""
    return [name for name in names if (match := _PART.fullmatch(name)) and match.groups() == one.groups()]


def _offline(cached: Fetched | None, name: HubName, why: str) -> Fetched:
    if cached is None:
        raise ModelError(
            f"there is no such folder or file, nor is all of it in the cache of the Hub, and {why}",
            where=str(name),
            fix="fetch it once without HF_HUB_OFFLINE, or name a folder or file that is there",
        )
    return cached


def _fetched(library: Any, name: HubName) -> Fetched:
    """The model as the Hub has it now; files that are in the cache already are not fetched again."""
    info = library.HfApi().model_info(name.repo, revision=name.revision or None)
    commit, names = info.sha, [file.rfilename for file in info.siblings or ()]
    files, last = _wanted(library, name, commit, names)
    if files:
        library.snapshot_download(name.repo, revision=commit, allow_patterns=files)
    # By the name that was asked for, so that the cache knows what it stands for.
    path = Path(library.hf_hub_download(name.repo, last, revision=name.revision or None))
    if path.parent.name != commit:
        raise ModelError("was changed on the Hub while it was fetched", where=str(name), fix="try again")
    return Fetched(path if name.file else path.parent, commit)


def _wanted(library: Any, name: HubName, commit: str, names: Collection[str]) -> tuple[list[str], str]:
    """The files to fetch, and the one that comes last."""
    if name.file:
        if name.file not in names:
            ggufs = listing(sorted(file for file in names if file.endswith(".gguf")))
            raise ModelError(f"has no such file (it has {ggufs})", where=str(name))
        part = _PART.fullmatch(name.file)
        return [file for file in (_parts(names, part) if part else []) if file != name.file], name.file
    for whole, index, last in _WEIGHTS:
        if last not in names or not {whole, index} & {*names}:
            continue
        weights = [whole]
        if index in names:
            path = Path(library.hf_hub_download(name.repo, index, revision=commit))
            weights = [index, *(shard for shard in _shards(path) if shard in names)]
        return [*weights, *_tokenizer(names)], last
    raise _no_weights(name, names)


def _shards(index: Path) -> list[str]:
    """The shards that an index names; what is wrong with it is told when the model is opened."""
    content = read_json(index, _INDEX_BYTES)
    table = content.get("weight_map") if isinstance(content, dict) else None
    names = {name for name in table.values() if isinstance(name, str)} if isinstance(table, dict) else set()
    return sorted(name for name in names if _SHARD.fullmatch(name))


def _tokenizer(names: Collection[str]) -> list[str]:
    """The files of the tokenizer, one vocabulary of several."""
    found = sorted(name for name in names if _BESIDE.fullmatch(name))
    one = _VOCABULARY in found
    return [name for name in found if not (one and _OTHER_VOCABULARIES.fullmatch(name))]


def _no_weights(name: HubName, names: Collection[str]) -> ModelError:
    """The error for a model of which nothing is fetched, with what it has."""
    ggufs = sorted(file for file in names if file.endswith(".gguf") and "/" not in file)
    if ggufs:
        return ModelError(
            f"has GGUF files, of which one is read: {listing(ggufs, 20)}",
            where=str(name),
            fix=f"name one: {name.repo}/{ggufs[0]}",
        )
    pickles = sorted(file for file in names if file.endswith((".bin", ".pth", ".pt")))
    has = f"has {listing(pickles, 4)}, which are pickles and can hold code, and" if pickles else "has"
    read = f"{_CONFIG} with model.safetensors, or with shards and their index"
    return ModelError(f"{has} no weights that are read: {read}", where=str(name))


def _refused(library: Any, name: HubName, fault: Exception) -> MlxloraError | None:
    """The error for an answer of the Hub, or of the disk; None where there was no answer."""
    errors, where = library.errors, str(name)
    if isinstance(fault, errors.GatedRepoError):
        return ModelError(
            "is given only to those whom its owners let", where=where, fix=f"ask on its page, and {_LOGIN}"
        )
    if isinstance(fault, errors.RepositoryNotFoundError):
        return ModelError(
            "there is no such folder or file, and the Hub has no model of this name that it shows to you",
            where=where,
            fix=f"check the name, or {_LOGIN}",
        )
    if isinstance(fault, errors.RevisionNotFoundError):
        return ModelError(f"the Hub has no revision '{name.revision}' of it", where=where)
    if isinstance(fault, errors.HFValidationError):
        return ModelError(f"is no name on the Hub: {_first_line(fault)}", where=where)
    if isinstance(fault, errors.HfHubHTTPError):
        status = getattr(fault.response, "status_code", None)
        if status is not None and status < 500:
            return ModelError(f"cannot be fetched: the Hub answers {status}", where=where, fix=_LOGIN)
    if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"cannot be fetched: {fault.strerror}", where=where, fix="make room on the disk")
    return None


def _first_line(fault: Exception) -> str:
    lines: Sequence[str] = str(fault).strip().splitlines()
    return lines[0] if lines else type(fault).__name__
