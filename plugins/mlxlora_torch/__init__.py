"""Weight loader ``torch-pth``: a PyTorch checkpoint in the layout of Meta's Llama releases.

The folder holds ``consolidated.NN.pth`` (one file a model-parallel shard),
``params.json`` and ``tokenizer.model``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlxlora_core.api import ForeignModel, NoOptions, WeightLoader, hookimpl


def detect(folder: Path) -> bool:
    """Whether ``folder`` holds any ``consolidated.*.pth``."""
    try:
        return any(folder.glob("consolidated.*.pth"))
    except OSError:  # a loop of symbolic links, for one
        return False


def open_folder(folder: Path, options: NoOptions) -> ForeignModel:
    """The checkpoint in ``folder``; see :func:`mlxlora_torch.checkpoint.open_checkpoint`."""
    from mlxlora_torch.checkpoint import open_checkpoint

    return open_checkpoint(folder)


@hookimpl
def mlxlora_weight_loaders() -> Iterable[WeightLoader]:
    """The one loader of this plugin."""
    summary = "PyTorch checkpoints: consolidated.NN.pth, params.json and tokenizer.model"
    return [WeightLoader(name="torch-pth", summary=summary, detect=detect, open=open_folder, dtype="float16")]
