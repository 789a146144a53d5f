"""How the shards of one model fit together.

A checkpoint split for model parallelism has every tensor in every shard. The
linears that widen (``wq wk wv w1 w3 output``) are split by rows, those that
narrow, and the embedding, by columns; all else is replicated. Source: the
parallel layers of Meta's Llama 2 release (ColumnParallelLinear splits axis 0
of the weight, RowParallelLinear and ParallelEmbedding axis 1), after Shoeybi
et al. 2019, arXiv:1909.08053, section 3. Since Llama 3 the embedding is split
by rows (VocabParallelEmbedding): each part has the whole width. Where each part
has all rows too, as many as the heads together, it is replicated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, listing
from mlxlora_torch.archive import Archive
from mlxlora_torch.folder import shard_name

_AXES = {
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0),
    **dict.fromkeys(("wo", "w2", "tok_embeddings"), 1),
}
_EMBEDDING, _NORM, _HEAD = "tok_embeddings.weight", "norm.weight", "output.weight"
_QUERY = "layers.0.attention.wq.weight"


@dataclass(frozen=True)
class Joined:
    """A tensor of the whole model.

    Attributes:
        name: of the tensor.
        shape: of the whole.
        dtype: of its elements.
        axis: along which the shards hold parts of it, or None when each holds all of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axis: int | None


def join(shards: Sequence[Archive], params: Mapping[str, Any]) -> list[Joined]:
    """The tensors that the shards make together, in the order in which the first shard stores them.

    Args:
        shards: all of them, by number.
        params: what params.json says.

    Raises:
        ModelError: a shard is missing or too many, or they do not fit each other (all listed).
    """
    first, *others = shards
    width = _width(first, params)
    _check_count(first, len(shards), width, params)
    faults = [fault for other in others for fault in _differences(first, other)]
    joined = [_joined(first, name, len(shards), width) for name in sorted(first.tensors, key=first.position)]
    faults += [
        f"{tensor.name} cannot be joined along axis {tensor.axis}: its shape is {tensor.shape}"
        for tensor in joined
        if tensor.axis is not None and tensor.axis >= len(tensor.shape)
    ]
    if faults:
        raise ModelError(
            "the shards are not of one model: " + listing(faults),
            where=first.path.parent,
            fix="put all shards of one download there, and nothing else",
        )
    return joined


def _joined(first: Archive, name: str, count: int, width: int | None) -> Joined:
    """The whole of a tensor of which every shard has as much as the first."""
    tensor = first.tensors[name]
    axis = _axis(name) if count > 1 else None
    if axis is not None and name == _EMBEDDING and tensor.shape[1:] == (width,):
        axis = None if _is_whole(first, count) else 0
    shape = tuple(size * count if i == axis else size for i, size in enumerate(tensor.shape))
    return Joined(name, shape, tensor.dtype, axis)


def _is_whole(first: Archive, count: int) -> bool:
    """Whether the embedding of each shard has as many rows as the heads of all of them together."""
    head = first.tensors.get(_HEAD)
    return head is not None and first.tensors[_EMBEDDING].shape[0] == count * (head.shape or (0,))[0]


def _axis(name: str) -> int | None:
    """The axis that the shards split, by the module that owns the weight."""
    *_, module, kind = ("", "", *name.split("."))
    return _AXES.get(module) if kind == "weight" else None


def _differences(first: Archive, other: Archive) -> list[str]:
    """How the tensors of two shards differ in name, shape or dtype."""
    faults = []
    for archive, names in (
        (first, other.tensors.keys() - first.tensors.keys()),
        (other, first.tensors.keys() - other.tensors.keys()),
    ):
        if names:
            faults.append(f"{archive.path.name} lacks {listing(sorted(names))}")
    for name, tensor in first.tensors.items():
        twin = other.tensors.get(name, tensor)
        if (twin.shape, twin.dtype) != (tensor.shape, tensor.dtype):
            faults.append(
                f"{name} is {tensor.dtype} {tensor.shape} in {first.path.name}"
                f" and {twin.dtype} {twin.shape} in {other.path.name}"
            )
    return faults


def _check_count(first: Archive, count: int, width: int | None, params: Mapping[str, Any]) -> None:
    """Compare the number of shards with the one that the shapes ask for, where they tell.

    A norm has the model's whole width in each shard. The embedding is split by
    columns, so its columns in one shard times the shards make the width; where
    it is split by rows, the rows of the first query tell.
    """
    embedding = first.tensors.get(_EMBEDDING)
    if width is None or embedding is None or len(embedding.shape) != 2 or not embedding.shape[1]:
        return
    columns = embedding.shape[1]
    wanted, rest = divmod(width, columns)
    if rest or not wanted:
        raise ModelError(
            f"{_EMBEDDING} has {columns} columns, which do not divide the model's width {width}",
            where=first.path,
        )
    if wanted == 1:
        wanted = _query_parts(first, width, params) or count
    folder: Path = first.path.parent
    if count < wanted:
        missing = listing(shard_name(number) for number in range(count, min(wanted, count + 100)))
        raise ModelError(
            f"found {count} of {wanted} shards: {missing} missing",
            where=folder,
            fix="download the rest of the model",
        )
    if count > wanted:
        extra = listing(shard_name(number) for number in range(wanted, count))
        raise ModelError(
            f"found {count} shards, the model has {wanted}: {extra} too many",
            where=folder,
            fix="take out the shards of other models",
        )


def _query_parts(first: Archive, width: int, params: Mapping[str, Any]) -> int:
    """Of how many parts the first query is one, 0 where nothing tells."""
    query, heads = first.tensors.get(_QUERY), params.get("n_heads")
    if query is None or not query.shape or not query.shape[0] or type(heads) is not int or heads < 1:
        return 0
    head_dim = params.get("head_dim")
    rows = heads * (head_dim if type(head_dim) is int else width // heads)
    return rows // query.shape[0] if rows > 0 and rows % query.shape[0] == 0 else 0


def _width(first: Archive, params: Mapping[str, Any]) -> int | None:
    """The model's width: the length of its last norm, or else what params.json says."""
    norm = first.tensors.get(_NORM)
    if norm is not None and len(norm.shape) == 1:
        return norm.shape[0]
    width = params.get("dim")
    return width if type(width) is int and width > 0 else None
