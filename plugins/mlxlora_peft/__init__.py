"""Adapters of PEFT, both ways: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import (
    AdapterLoader,
    Exporter,
    ExportSource,
    ForeignAdapter,
    NoOptions,
    hookimpl,
    option,
)


@dataclass(frozen=True)
class PeftOptions:
    """What is said of the base."""

    base: str = option(
        "", help="name or path of the base for base_model_name_or_path; left empty, what --model named"
    )


def detect(path: Path) -> bool:
    """Whether ``path`` is an adapter folder of PEFT, or a file with tensors as it names them."""
    from mlxlora_peft.opening import detect

    return detect(path)


def open_adapter(path: Path, options: NoOptions) -> ForeignAdapter:
    """The adapter at ``path``; see :func:`mlxlora_peft.opening.open_adapter`."""
    from mlxlora_peft.opening import open_adapter

    return open_adapter(path)


def export(source: ExportSource, target: Path, options: PeftOptions) -> None:
    """Write the adapter as PEFT reads it; see :func:`mlxlora_peft.writing.write`."""
    from mlxlora_peft.writing import write

    write(source, target, options.base)


@hookimpl
def mlxlora_adapter_loaders() -> Iterable[AdapterLoader]:
    """The one adapter loader of this plugin."""
    summary = "adapters of PEFT: LoRA, rsLoRA, DoRA, IA3, VeRA"
    return [AdapterLoader(name="peft", summary=summary, detect=detect, open=open_adapter)]


@hookimpl
def mlxlora_exporters() -> Iterable[Exporter]:
    """The one exporter of this plugin."""
    summary = "the adapter alone, as a folder that PEFT reads, and vLLM, TGI and llama.cpp's converter"
    return [
        Exporter(
            name="peft",
            summary=summary,
            options=PeftOptions,
            export=export,
            layout="hf",
            takes="adapter",
            opens="adapter",
        )
    ]
