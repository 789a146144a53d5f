"""Weight loader ``gguf``: the files of llama.cpp, their weights as packed as they stand there.

A GGUF file holds a model, its config and its tokenizer; a large one comes in parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import ForeignModel, WeightLoader, hookimpl, option


@dataclass(frozen=True)
class GgufOptions:
    """In which type the scales of packed weights are kept."""

    scales: str = option(
        "exact",
        help="type of the scales of packed weights; exact is that of the file, and float32 for Q4_K and Q5_K",
        choices=("exact", "float16", "float32"),
    )


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
