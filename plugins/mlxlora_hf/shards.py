"""The tensors of a folder: of its one weight file, or of the shards that its index names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlxlora_core.api import LazyTensor, ModelError, SafetyError, listing
from mlxlora_core.files import is_in_folder, lazy_tensors, read_json
from mlxlora_hf.folder import Weights, names_in, no_weights

_INDEX_BYTES = 16 << 20
_AGAIN = "download the whole folder again"


@dataclass
class Found:
    """What the weight files hold.

    Attributes:
        tensors: name -> tensor, in the order of the files and of the bytes in them.
        notes: what was left out, in words.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_tensors(folder: Path, called: Weights) -> Found:
    """The tensors of a folder; none is read.

    What is no part of the model by its index, such as shards of another one
    that lie about, is not looked at.

    Raises:
        ModelError: there are no weights, a file is absent or damaged, or the index
            and the shards do not agree (all listed).
        SafetyError: the index names files outside the folder.
    """
    names = names_in(folder)
    if called.index not in names:
        if called.whole not in names:
            raise no_weights(folder, names, called)
        return Found(lazy_tensors(folder / called.whole))
    index = folder / called.index
    shards = _read_index(index)
    if called.whole in names and shards.keys() != {called.whole}:
        raise ModelError(
            f"there are both {called.whole} and {called.index}, which names other files",
            where=folder,
            fix="remove the one that is not of this model",
        )
    absent = [name for name in shards if name not in names]
    if absent:
        raise ModelError(
            f"lacks {len(absent)} of {len(shards)} shards: {listing(absent)}", where=folder, fix=_AGAIN
        )
    return _joined(folder, index, shards)


def _read_index(index: Path) -> dict[str, list[str]]:
    """Shard -> the names of its tensors, in the order of the shards' names."""
    content = read_json(index, _INDEX_BYTES)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(
            "is no index of shards: wanted a weight_map of names to files", where=index, fix=_AGAIN
        )
    shards: dict[str, list[str]] = {}
    for name, shard in sorted(table.items(), key=lambda item: item[1]):
        shards.setdefault(shard, []).append(name)
    outside = [name for name in shards if not is_in_folder(index.parent, name)]
    if outside:
        raise SafetyError(f"names shards outside its folder: {listing(outside)}", where=index)
    other = [name for name in shards if not name.endswith(".safetensors")]
    if other:
        raise ModelError(f"names {listing(other)}, wanted .safetensors files", where=index)
    return shards


def _joined(folder: Path, index: Path, shards: Mapping[str, list[str]]) -> Found:
    """The tensors of all shards that the index names."""
    found, absent, extra = Found(), [], []
    for shard, wanted in shards.items():
        there = lazy_tensors(folder / shard)
        missing = set(wanted) - there.keys()
        absent += [f"{name} in {shard}" for name in sorted(missing)]
        named = set(wanted)
        found.tensors |= {name: tensor for name, tensor in there.items() if name in named}
        extra += sorted(there.keys() - named)
    if absent:
        raise ModelError(f"names tensors that are not there: {listing(absent)}", where=index, fix=_AGAIN)
    found.notes += _left_out(extra, index)
    return found


def _left_out(names: list[str], index: Path) -> Iterator[str]:
    if names:
        yield f"left out, since {index.name} does not name them: {listing(names)}"
