"""How much disk a training takes."""

from __future__ import annotations

from mlxlora_core.model.adapters import trainable
from mlxlora_core.model.loading import Model
from mlxlora_core.training.settings import SaveConfig

#: of a checkpoint, in sizes of the adapter: itself and two moments of the optimizer, and one for good measure
_CHECKPOINT = 4
_LOGS_BYTES = 16 << 20  # reports, the page, what observers write


def written_bytes(model: Model, saving: SaveConfig) -> int:
    """How many bytes a training writes at most, with those of files that are still to be replaced.

    Args:
        model: with the adapter on it.
        saving: which checkpoints are kept; one more is the best, and one more is being written.
    """
    adapter = sum(tensor.nbytes for tensor in trainable(model.module).values())
    return (saving.keep + 2) * _CHECKPOINT * adapter + 2 * adapter + _LOGS_BYTES
