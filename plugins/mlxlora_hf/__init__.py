"""Weight loader ``hf``: what Hugging Face, mlx-lm and Mistral publish as ``.safetensors``.

The folder holds ``config.json`` and ``model.safetensors``, or shards with
``model.safetensors.index.json``; or Mistral's ``params.json`` and
``consolidated.safetensors``. Weights that mlx-lm has packed stay packed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlxlora_core.api import ForeignModel, NoOptions, WeightLoader, hookimpl


def detect(folder: Path) -> bool:
    """Whether ``folder`` is one of Hugging Face's, mlx-lm's or Mistral's, and none of mlxlora's own."""
    from mlxlora_hf.folder import Kind, kind_of

    return kind_of(folder) is not Kind.OTHER


def open_folder(folder: Path, options: NoOptions) -> ForeignModel:
    """The model in ``folder``; see :func:`mlxlora_hf.checkpoint.open_checkpoint`."""
    from mlxlora_hf.checkpoint import open_checkpoint

    return open_checkpoint(folder)


@hookimpl
def mlxlora_weight_loaders() -> Iterable[WeightLoader]:
    """The one loader of this plugin."""
    summary = "Hugging Face and mlx-lm folders, dense or quantized, and Mistral's consolidated.safetensors"
    return [WeightLoader(name="hf", summary=summary, detect=detect, open=open_folder)]
