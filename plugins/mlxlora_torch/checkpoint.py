"""Open a checkpoint folder: check every part, then hand over tensors that are read one at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mlxlora_core.api import ForeignModel, LazyTensor
from mlxlora_core.files import open_regular, refuse_stand_in
from mlxlora_torch.archive import open_archive
from mlxlora_torch.folder import TOKENIZER, find_parts, read_params
from mlxlora_torch.reader import Reader, need_torch
from mlxlora_torch.shards import join


def open_checkpoint(folder: Path) -> ForeignModel:
    """The checkpoint in ``folder``.

    The shards are joined: a tensor that they split has its whole shape. Tensors
    come in the order of the first file.

    Raises:
        ModelError: a part is absent or damaged, or the parts do not fit each other.
        SafetyError: a file wants more than to hold tensors.
        PluginError: torch is absent or too old.
    """
    parts = find_parts(folder)
    params = read_params(parts.params)
    with open_regular(parts.tokenizer) as file:
        refuse_stand_in(file, parts.tokenizer)
    shards = [open_archive(path) for path in parts.shards]
    tensors = join(shards, params)
    need_torch()
    reader = Reader(shards)
    reader.check_shards(tensors)
    return ForeignModel(
        config=params,
        tokenizer={TOKENIZER: parts.tokenizer},
        tensors={t.name: LazyTensor(t.shape, t.dtype, partial(reader.read, t)) for t in tensors},
        notes=[*parts.notes, *shards[0].notes],
    )
