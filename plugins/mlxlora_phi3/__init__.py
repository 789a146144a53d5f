"""Architecture ``phi3``: Phi-3, Phi-3.5 and Phi-4-mini, their fused linears taken apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mlxlora_core.api import Architecture, Layout, LazyTensor, hookimpl
from mlxlora_phi3 import gguf, gguf_write, hf, hf_write, tables
from mlxlora_phi3.config import MODEL_TYPES, ModelArgs

if TYPE_CHECKING:
    from mlxlora_core.ops import LanguageModel


def read(raw: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """None: there is no spelling of the family's own, beside those of its layouts."""


def tensors(found: Mapping[str, LazyTensor], args: ModelArgs) -> Mapping[str, LazyTensor]:
    """The tensors as they are."""
    return found


def build(args: ModelArgs) -> LanguageModel:
    """A model with lazy, random parameters: they cost nothing as long as nobody reads them."""
    from mlxlora_phi3.model import Model

    return Model(args)


@hookimpl
def mlxlora_architectures() -> Iterable[Architecture]:
    """The one architecture of this plugin."""
    return [
        Architecture(
            name="phi3",
            summary="Phi-3, Phi-3.5 and Phi-4-mini: positions in part of a head, scaled by length",
            model_types=MODEL_TYPES,
            args=ModelArgs,
            read=read,
            tensors=tensors,
            build=build,
            default_targets=("wq", "wv"),
            layouts={
                "hf": Layout(
                    model_types=hf.MODEL_TYPES,
                    read=hf.read,
                    table=tables.hf,
                    notes=hf.notes,
                    write=hf_write.write,
                ),
                "gguf": Layout(
                    model_types=gguf.MODEL_TYPES,
                    read=gguf.read,
                    table=tables.gguf,
                    notes=gguf.notes,
                    write=gguf_write.write,
                ),
            },
        )
    ]
