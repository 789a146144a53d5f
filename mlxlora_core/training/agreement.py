"""What ranks agree on around their steps: what they train, where they begin, and which adapter stays.

Only rank 0 reads and writes checkpoints; it sends the state to the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlxlora_core.distributed.group import Group
from mlxlora_core.errors import RankError, listing, short
from mlxlora_core.machine.device import runs_ahead
from mlxlora_core.model.adapters import trainable
from mlxlora_core.model.loading import Model
from mlxlora_core.training.identity import Identity
from mlxlora_core.training.loop import Training
from mlxlora_core.training.progress import read_progress

#: versions that may differ from rank to rank: of what belongs to a machine
_OF_A_MACHINE = {"python", "system", "processor", "cores", "runtimes"}
_MOST, _LETTERS = 3, 40  # items named in an error, and letters of a value
_OPTIMIZER = "optimizer:"  # prefix of the names of its tensors
_HEAD_BYTES = 8  # they hold the length of the text before the tensors


def require_agreement(group: Group, identity: Identity) -> None:
    """Refuse ranks that differ in base, rows, settings, versions or plugins.

    Raises:
        RankError: on every rank, with what differs and who has what.
    """
    if group.size == 1:
        return
    given = [json.loads(part) for part in group.share(json.dumps(_items(identity)).encode())]
    names = sorted({name for items in given for name in items})
    faults = [name for name in names if any(items.get(name) != given[0].get(name) for items in given)]
    if faults:
        told = [_told(name, [items.get(name, "none") for items in given]) for name in faults]
        more = f"; and {len(told) - _MOST} more" if len(told) > _MOST else ""
        raise RankError(
            f"the ranks do not train the same: {'; '.join(told[:_MOST])}{more}",
            fix="give every rank the same base, rows, settings, and versions of mlxlora, MLX and plugins",
        )


def _items(identity: Identity) -> dict[str, str]:
    """What must be the same on every rank, as name -> value."""
    versions = {name: v for name, v in identity.versions.items() if name not in _OF_A_MACHINE}
    plugins = {f"plugin {name}": str(p["version"]) for name, p in identity.plugins.items()}
    return {
        "base": identity.base,
        "tokenizer": identity.tokenizer,
        **{f"{split} rows": digest for split, digest in identity.data.items()},
        **{name: json.dumps(value) for name, value in identity.settings.items()},
        **plugins,
        **versions,
        "steps ahead of the host": str(runs_ahead()),  # a signal is heard a step later there
    }


def _told(name: str, values: Sequence[str]) -> str:
    """Who has which value of an item."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    said = (
        f"{short(value, _LETTERS)} on rank{'s'[: len(who) - 1]} {listing(who)}"
        for value, who in ranks.items()
    )
    return f"{name} is {' and '.join(said)}"


def hand_on(group: Group, training: Training, model: Model) -> None:
    """Send rank 0's progress, adapter, optimizer state and way of computing steps to all ranks."""
    if group.size == 1:
        return
    state = {f"{_OPTIMIZER}{name}": tensor for name, tensor in training.optimizer_tensors().items()}
    tensors = {**trainable(model.module), **state}
    prefix = training.prefix
    head = {
        "progress": asdict(training.progress),
        "compiled": training.compiled,
        "packed": training.packed,
        "reuse": prefix is not None and prefix.reuse.on,
    }
    told, found = _broadcast(group, head, tensors)
    if group.leads:
        return
    training.arrange(told["compiled"], told["packed"])
    if prefix is not None:
        prefix.go_on(told["reuse"])
    state = {name: found.pop(f"{_OPTIMIZER}{name}") for name in training.optimizer_tensors()}
    _put(model, found)
    training.restore(read_progress(told["progress"]), state)


def hand_on_adapter(group: Group, step: int, model: Model) -> int:
    """Send rank 0's adapter to all ranks; returns the step that it is from."""
    if group.size == 1:
        return step
    told, found = _broadcast(group, {"step": step}, trainable(model.module))
    _put(model, found)
    return int(told["step"])


def _put(model: Model, tensors: Mapping[str, mx.array]) -> None:
    model.module.update(tree_unflatten(list(tensors.items())))
    mx.eval(list(tensors.values()))


def _broadcast(
    group: Group, head: Mapping[str, Any], tensors: Mapping[str, mx.array]
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Rank 0's head and tensors, on every rank, each of which has tensors of the same names and shapes."""
    content = b""
    if group.leads:
        text = json.dumps(head).encode()
        content = len(text).to_bytes(_HEAD_BYTES, "little") + text + b"".join(map(_bytes, tensors.values()))
    content = group.broadcast(content)
    length = int.from_bytes(content[:_HEAD_BYTES], "little")
    told = json.loads(content[_HEAD_BYTES : _HEAD_BYTES + length])
    return told, dict(_cut(content[_HEAD_BYTES + length :], tensors))


def _bytes(tensor: mx.array) -> bytes:
    return np.array(tensor.reshape(-1).view(mx.uint8)).tobytes()


def _cut(content: bytes, tensors: Mapping[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """The named tensors that stand one after the other in ``content``."""
    start = 0
    for name, like in tensors.items():
        words = mx.array(np.frombuffer(content, np.uint8, like.nbytes, start))
        yield name, words.view(like.dtype).reshape(like.shape)
        start += like.nbytes
