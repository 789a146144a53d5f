"""Adapter loader ``gguf-lora``: the LoRA files of llama.cpp."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlxlora_core.api import ForeignAdapter, LazyTensor, MlxloraError, ModelError, listing
from mlxlora_gguf.header import Entry, Header, read_header
from mlxlora_gguf.parts import is_gguf
from mlxlora_gguf.reading import lazy

#: what a file says of itself
TYPE, KIND, ALPHA, LORA = "general.type", "adapter.type", "adapter.lora.alpha", "lora"
#: what stands behind the name of a weight for its two matrices, (R, inputs) and (outputs, R)
LORA_A, LORA_B = ".lora_a", ".lora_b"
#: its matrices are (V, R) and (D, R)
EMBEDDING = "token_embd.weight"

_INVOCATION = "adapter.alora.invocation_tokens"
_NORM, _WEIGHT = "_norm.weight", ".weight"


def is_adapter(path: Path) -> bool:
    """Whether a path is a GGUF file with an adapter; never raises."""
    try:
        return not path.is_dir() and is_gguf(path) and read_header(path).keys.get(TYPE) == "adapter"
    except (MlxloraError, OSError):
        return False


def open_adapter(path: Path) -> ForeignAdapter:
    """The adapter in a file; nothing of its tensors is read.

    Raises:
        ModelError: it is damaged, no LoRA, or has what cannot be converted.
    """
    header = read_header(path)
    alpha = _alpha(header)
    pairs, skipped = _pairs(header)
    ranks = {
        name: a.shape[-1] if name + _WEIGHT == EMBEDDING else a.shape[0] for name, (a, _) in pairs.items()
    }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    options = {"rank": rank, "scale": alpha / rank if alpha else 1.0}
    notes = (
        [f"{len(skipped)} norms are left out, as llama.cpp does ({listing(skipped, 2)})"] if skipped else []
    )
    return ForeignAdapter(
        adapter=LORA,
        options=options,
        linears={name: _tensors(name, *pair, header) for name, pair in pairs.items()},
        outputs={"lora_b": 1},
        overrides={
            name: {"rank": own, "scale": alpha / own if alpha else 1.0}
            for name, own in ranks.items()
            if own != rank
        },
        layout="gguf",
        embedding_alone=True,
        notes=notes,
    )


def _alpha(header: Header) -> float:
    """What is divided by the rank to be the scale; 0 stands for a scale of 1."""
    keys, where = header.keys, header.path
    kind = keys.get(KIND)
    if keys.get(TYPE) != "adapter" or kind != LORA:
        raise ModelError(f"is an adapter of type {kind!r:.40}, wanted {LORA!r} ({KIND})", where=where)
    if _INVOCATION in keys:
        raise ModelError(
            f"is an aLoRA, which changes the model from some tokens on ({_INVOCATION}); "
            "there is no such adapter here",
            where=where,
        )
    alpha = keys.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or alpha < 0:
        raise ModelError(f"has {ALPHA} {alpha!r:.40}, wanted a number of at least 0", where=where)
    return alpha


def _pairs(header: Header) -> tuple[dict[str, tuple[Entry, Entry]], list[str]]:
    """Module path there -> its two matrices, and the norms, which are left out."""
    halves: dict[str, dict[str, Entry]] = {LORA_A: {}, LORA_B: {}}
    skipped, other = [], []
    for entry in header.tensors:
        name, dot, ending = entry.name.rpartition(".")
        if dot + ending in halves and name.endswith(_WEIGHT):
            halves[dot + ending][name.removesuffix(_WEIGHT)] = entry
        elif entry.name.endswith(_NORM):
            skipped.append(entry.name)
        else:
            other.append(entry.name)
    if other:
        raise ModelError(f"has tensors that are no LoRA: {listing(other, 3)}", where=header.path)
    alone = sorted(halves[LORA_A].keys() ^ halves[LORA_B].keys())
    if alone or not halves[LORA_A]:
        what = f"lacks one of the two matrices of {listing(alone, 3)}" if alone else "has no LoRA in it"
        raise ModelError(what, where=header.path, fix="make it again")
    return {name: (a, halves[LORA_B][name]) for name, a in halves[LORA_A].items()}, skipped


def _tensors(name: str, a: Entry, b: Entry, header: Header) -> dict[str, LazyTensor]:
    """The matrices as they are here: (inputs, R), or (V, R) of an embedding, and (R, outputs)."""
    embedding = name + _WEIGHT == EMBEDDING
    inner = 1 if embedding else 0
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[inner] != b.shape[1]:
        raise ModelError(f"{name} has matrices {a.shape} and {b.shape}, which do not fit", where=header.path)
    first, second = (lazy(entry, header.state, "exact") for entry in (a, b))
    return {"lora_a": first if embedding else _turned(first), "lora_b": _turned(second)}


def _turned(tensor: LazyTensor) -> LazyTensor:
    """A matrix turned round, its numbers expanded."""
    return LazyTensor(tensor.shape[::-1], tensor.dtype, partial(_read_turned, tensor))


def _read_turned(tensor: LazyTensor) -> mx.array:
    return mx.contiguous(tensor.read().T)
