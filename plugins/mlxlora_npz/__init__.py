"""Exporter ``npz``: the files of Apple's LoRA example for MLX, as numpy reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import Exporter, ExportSource, hookimpl, option


@dataclass(frozen=True)
class NpzOptions:
    """What type the weights are written in."""

    dtype: str = option(
        "stored",
        help="type of the weights; stored is that of the model, which must not be bfloat16",
        choices=("stored", "float16", "float32"),
    )


def export(source: ExportSource, target: Path, options: NpzOptions) -> None:
    """Write weights.npz, config.json, the tokenizer and, where there is an adapter, adapters.npz.

    Raises:
        ModelError: a weight that the type cannot hold.
        ResourceError: the disk is full.
    """
    from mlxlora_npz.files import write

    write(source, target, options.dtype)


@hookimpl
def mlxlora_exporters() -> Iterable[Exporter]:
    """The one exporter of this plugin."""
    summary = "weights.npz, config.json and the tokenizer, as MLX's first LoRA example names them"
    return [Exporter(name="npz", summary=summary, options=NpzOptions, export=export, opens="model")]
