"""The tensors of a model among what a ``.pth`` holds, by the names that the model itself gives them.

What trains a model often wraps it, and saves more than it: the tensors then
stand in a dict below ``model`` or ``state_dict``, beside the optimizer, and their
names begin with that of the wrapper. Whatever is taken off or left out is told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, listing
from mlxlora_torch.program import RESAVE, StoredTensor, kind_of

#: keys below which trainers save the tensors of a model
_TABLES = ("model", "state_dict", "model_state_dict", "module", "model_state", "network", "net", "weights")
_DEPTH = 4

_DATA_PARALLEL = "module."
#: modules that wrappers put between those of the model
_BETWEEN = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ANCHOR = re.compile(r"(.+\.)tok_embeddings\.weight")
#: computed from the config, whatever type they are stored in
_COMPUTED = re.compile(r"(.*\.)?(rope\.freqs|freqs_(cis|cos|sin)|inv_freq|causal_mask|attn_mask)")
_SHOWN_LETTERS = 80

Tensors = dict[str, StoredTensor]


def model_tensors(value: Any, readable: Mapping[str, int], where: Path) -> tuple[Tensors, list[str]]:
    """The tensors of the model by its own names, and what was done to find them, in words.

    Args:
        value: what the pickle leaves behind.
        readable: the dtypes that can be read; a buffer of another, such as complex frequencies, is left out.
        where: the file, for messages.

    Raises:
        ModelError: it is no dict of tensors, or two tensors have one name.
    """
    table, notes = _table(value, where)
    other = [
        f"{_shown(name)} is {kind_of(value)}"
        for name, value in table.items()
        if not (isinstance(name, str) and isinstance(value, StoredTensor))
    ]
    if other:
        raise ModelError(f"holds more than named tensors: {listing(other)}", where=where, fix=RESAVE)
    if not table:
        raise ModelError("holds no tensor", where=where)
    tensors, taken = _own_names(table, where)
    computed = [n for n, t in tensors.items() if t.dtype not in readable and _COMPUTED.fullmatch(n)]
    if computed:
        notes.append(f"left out, since they are computed: {listing(map(_shown, computed))}")
    return {name: t for name, t in tensors.items() if name not in computed}, [*notes, *taken]


def _table(value: Any, where: Path) -> tuple[Mapping[Any, Any], list[str]]:
    """The dict of tensors in ``value``, and what was left out beside it."""
    path: list[str] = []
    beside: list[Any] = []
    while isinstance(value, dict) and not _holds_tensors(value) and len(path) < _DEPTH:
        found = [key for key in _TABLES if _leads_to_tensors(value.get(key), _DEPTH - len(path))]
        found = found or [key for key, inner in value.items() if _holds_tensors(inner)]
        if len(found) > 1:
            raise ModelError(
                f"holds several tables of tensors: {listing(map(_shown, found))}", where=where, fix=RESAVE
            )
        if not found:
            break
        beside += [key for key in value if key != found[0]]
        path.append(_shown(found[0]))
        value = value[found[0]]
    if not isinstance(value, dict):
        raise ModelError(f"holds {kind_of(value)}, wanted a dict of tensors", where=where, fix=RESAVE)
    if not path:
        return value, []
    rest = f"; left out beside them: {listing(map(_shown, beside))}" if beside else ""
    return value, [f"the tensors stand below {' and '.join(path)}{rest}"]


def _leads_to_tensors(value: Any, depth: int) -> bool:
    """Whether a value is a dict of tensors, or holds one below a name that trainers give it."""
    if _holds_tensors(value) or not isinstance(value, dict) or not depth:
        return _holds_tensors(value)
    return any(_leads_to_tensors(value.get(key), depth - 1) for key in _TABLES)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(inner, StoredTensor) for inner in value.values())


def _own_names(table: Mapping[str, StoredTensor], where: Path) -> tuple[Tensors, list[str]]:
    """The tensors without what wrappers put into their names, and what that was."""
    names = {name: _BETWEEN.sub("", name) for name in table}
    taken = sorted({match[2] + "." for name in table for match in _BETWEEN.finditer(name)})
    while all(name.startswith(_DATA_PARALLEL) for name in names.values()):
        names = {name: short.removeprefix(_DATA_PARALLEL) for name, short in names.items()}
        taken.append(_DATA_PARALLEL)
    above = {match[1] for short in names.values() if (match := _ANCHOR.fullmatch(short))}
    if len(above) == 1:
        (prefix,) = above
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
        taken.append(prefix)
    if len(set(names.values())) < len(names):
        raise ModelError(f"has two tensors of one name without {listing(taken)}", where=where, fix=RESAVE)
    told = [f"taken off the names of the tensors: {listing(map(_shown, dict.fromkeys(taken)))}"]
    return {names[name]: tensor for name, tensor in table.items()}, told if taken else []


def _shown(name: Any) -> str:
    """A key as a message has it, cut where it is long."""
    text = repr(name)
    return text if len(text) <= _SHOWN_LETTERS else text[:_SHOWN_LETTERS] + "..."
