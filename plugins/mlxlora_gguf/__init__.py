"""The files of llama.cpp: weight loader and exporter ``gguf``, adapter loader and exporter ``gguf-lora``.

A GGUF file holds a model, its config and its tokenizer; a large one comes in parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import (
    AdapterLoader,
    Exporter,
    ExportSource,
    ForeignAdapter,
    ForeignModel,
    NoOptions,
    WeightLoader,
    hookimpl,
    option,
    report_note,
)

#: types that hold groups with a scale and a bias, so that packed weights are taken as they are
_PACKED = ("auto", "Q8_0", "Q4_1", "Q5_1")


@dataclass(frozen=True)
class GgufOptions:
    """In which type the scales of packed weights are kept."""

    scales: str = option(
        "exact",
        help="type of the scales of packed weights; exact is that of the file, and float32 for Q4_K and Q5_K",
        choices=("exact", "float16", "float32"),
    )


@dataclass(frozen=True)
class ExportOptions:
    """In which form a model is written."""

    type: str = option(
        "auto",
        help="type of the weights; auto keeps what the model has: Q4_1 for 2 to 4 bits, Q5_1 for 5, "
        "Q8_0 for 6 and 8, else F16, BF16 or F32",
        choices=("auto", "F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_1"),
    )
    pre: str = option(
        "",
        help="name in llama.cpp of the rule by which the tokenizer splits a text; "
        "left out, it is read off tokenizer.json",
    )
    context_length: int | None = option(
        None, help="longest text, where the model does not state it", unit="tokens", minimum=1
    )


@dataclass(frozen=True)
class LoraOptions:
    """In which form an adapter is written."""

    type: str = option("F32", help="type of its matrices", choices=("F32", "F16"))


def detect(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder of them with no other weights."""
    from mlxlora_gguf.parts import is_gguf

    return is_gguf(path)


def open_path(path: Path, options: GgufOptions) -> ForeignModel:
    """The model at ``path``; see :func:`mlxlora_gguf.model.open_model`."""
    from mlxlora_gguf.model import open_model

    return open_model(path, options.scales)


@hookimpl
def mlxlora_weight_loaders() -> Iterable[WeightLoader]:
    """The one loader of this plugin."""
    summary = "GGUF files of llama.cpp, in one file or in parts"
    return [WeightLoader(name="gguf", summary=summary, options=GgufOptions, detect=detect, open=open_path)]


def packed(options: ExportOptions) -> bool:
    """Whether the type has groups that packed weights fit into."""
    return options.type in _PACKED


def wrote(path: Path) -> bool:
    """See :func:`mlxlora_gguf.model_export.is_ours`."""
    from mlxlora_gguf.model_export import is_ours

    return is_ours(path)


def export(source: ExportSource, target: Path, options: ExportOptions) -> None:
    """Write ``model.gguf``; see :func:`mlxlora_gguf.model_export.export_model`."""
    from mlxlora_gguf.model_export import export_model

    for note in export_model(source, target, options.type, options.pre, options.context_length):
        report_note(note)


def export_adapter(source: ExportSource, target: Path, options: LoraOptions) -> None:
    """Write ``adapter.gguf``; see :func:`mlxlora_gguf.lora_export.export_adapter`."""
    from mlxlora_gguf.lora_export import export_adapter as export_it

    for note in export_it(source, target, options.type):
        report_note(note)


def detect_adapter(path: Path) -> bool:
    """Whether a path is a GGUF file with an adapter."""
    from mlxlora_gguf.lora import is_adapter

    return is_adapter(path)


def open_adapter(path: Path, options: NoOptions) -> ForeignAdapter:
    """The adapter at ``path``; see :func:`mlxlora_gguf.lora.open_adapter`."""
    from mlxlora_gguf.lora import open_adapter as open_it

    return open_it(path)


@hookimpl
def mlxlora_adapter_loaders() -> Iterable[AdapterLoader]:
    """The LoRA files of llama.cpp."""
    return [
        AdapterLoader(
            name="gguf-lora",
            summary="LoRA files of llama.cpp",
            options=NoOptions,
            detect=detect_adapter,
            open=open_adapter,
        )
    ]


@hookimpl
def mlxlora_exporters() -> Iterable[Exporter]:
    """A model, or an adapter, as one file of llama.cpp."""
    summary = "one GGUF file of llama.cpp, weights of 2 to 5 bits in Q4_1 and Q5_1 without loss"
    return [
        Exporter(
            name="gguf",
            summary=summary,
            options=ExportOptions,
            export=export,
            layout="gguf",
            packed=packed,
            ending=".gguf",
            wrote=wrote,
            opens="model",
        ),
        Exporter(
            name="gguf-lora",
            summary="a LoRA file of llama.cpp, for a base that stays as it is",
            options=LoraOptions,
            export=export_adapter,
            layout="gguf",
            takes="adapter",
            ending=".gguf",
            wrote=wrote,
            opens="adapter",
        ),
    ]
