"""Adapters of mlx-lm, and of Apple's LoRA example for MLX before it, both ways.

mlx-lm writes a folder with ``adapters.safetensors`` and ``adapter_config.json``;
Apple's example wrote ``adapters.npz`` alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlxlora_core.api import AdapterLoader, Exporter, ExportSource, ForeignAdapter, NoOptions, hookimpl


def detect(path: Path) -> bool:
    """Whether ``path`` is an adapter folder of mlx-lm, or a file with updates as it names them."""
    from mlxlora_mlx_lm.opening import detect

    return detect(path)


def open_adapter(path: Path, options: NoOptions) -> ForeignAdapter:
    """The adapter at ``path``; see :func:`mlxlora_mlx_lm.opening.open_adapter`."""
    from mlxlora_mlx_lm.opening import open_adapter

    return open_adapter(path)


def export(source: ExportSource, target: Path, options: NoOptions) -> None:
    """Write the adapter as mlx-lm reads it; see :func:`mlxlora_mlx_lm.writing.write`."""
    from mlxlora_mlx_lm.writing import write

    write(source, target)


@hookimpl
def mlxlora_adapter_loaders() -> Iterable[AdapterLoader]:
    """The one adapter loader of this plugin."""
    summary = "adapters of mlx-lm (LoRA, DoRA) and of Apple's LoRA example for MLX"
    return [AdapterLoader(name="mlx-lm", summary=summary, detect=detect, open=open_adapter)]


@hookimpl
def mlxlora_exporters() -> Iterable[Exporter]:
    """The one exporter of this plugin."""
    summary = "the adapter alone, as a folder that mlx-lm reads"
    return [
        Exporter(
            name="mlx-lm-adapter",
            summary=summary,
            export=export,
            layout="hf",
            takes="adapter",
            opens="adapter",
        )
    ]
