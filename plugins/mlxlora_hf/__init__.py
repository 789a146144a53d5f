"""Weight loader ``hf``: what Hugging Face, mlx-lm and Mistral publish; exporters ``hf`` and ``mlx-lm``.

The folder holds ``config.json`` and ``model.safetensors``, or shards with
``model.safetensors.index.json``; or Mistral's ``params.json`` and
``consolidated.safetensors``. Weights that mlx-lm has packed stay packed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import Exporter, ExportSource, ForeignModel, NoOptions, WeightLoader, hookimpl, option


@dataclass(frozen=True)
class ExportOptions:
    """What type dense weights are written in."""

    dtype: str = option(
        "stored",
        help="type of dense weights; stored is that of the model",
        choices=("stored", "float16", "bfloat16", "float32"),
    )


def detect(folder: Path) -> bool:
    """Whether ``folder`` is one of Hugging Face's, mlx-lm's or Mistral's, and none of mlxlora's own."""
    from mlxlora_hf.folder import Kind, kind_of

    return kind_of(folder) is not Kind.OTHER


def open_folder(folder: Path, options: NoOptions) -> ForeignModel:
    """The model in ``folder``; see :func:`mlxlora_hf.checkpoint.open_checkpoint`."""
    from mlxlora_hf.checkpoint import open_checkpoint

    return open_checkpoint(folder)


def export_hugging_face(source: ExportSource, target: Path, options: ExportOptions) -> None:
    """See :func:`mlxlora_hf.export.write_hugging_face`."""
    from mlxlora_hf.export import write_hugging_face

    write_hugging_face(source, target, options.dtype)


def export_mlx_lm(source: ExportSource, target: Path, options: ExportOptions) -> None:
    """See :func:`mlxlora_hf.export.write_mlx_lm`."""
    from mlxlora_hf.export import write_mlx_lm

    write_mlx_lm(source, target, options.dtype)


def takes_packed(options: ExportOptions) -> bool:
    """mlx-lm reads weights that are packed as MLX packs them."""
    return True


@hookimpl
def mlxlora_weight_loaders() -> Iterable[WeightLoader]:
    """The one loader of this plugin."""
    summary = "Hugging Face and mlx-lm folders, dense or quantized, and Mistral's consolidated.safetensors"
    return [WeightLoader(name="hf", summary=summary, detect=detect, open=open_folder)]


@hookimpl
def mlxlora_exporters() -> Iterable[Exporter]:
    """Folders of Hugging Face, and of mlx-lm."""
    return [
        Exporter(
            name="hf",
            summary="folder of Hugging Face: transformers, vLLM and the converters of others open it",
            options=ExportOptions,
            export=export_hugging_face,
            layout="hf",
            opens="model",
        ),
        Exporter(
            name="mlx-lm",
            summary="folder of mlx-lm, its quantized weights as they are",
            options=ExportOptions,
            export=export_mlx_lm,
            layout="hf",
            packed=takes_packed,
            opens="model",
        ),
    ]
