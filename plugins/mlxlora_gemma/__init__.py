"""Architecture ``gemma``: Gemma 2 and the text models of Gemma 3, as Hugging Face and GGUF have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mlxlora_core.api import Architecture, Layout, LazyTensor, hookimpl
from mlxlora_gemma import gguf, gguf_write, hf, hf_write, tables
from mlxlora_gemma.config import MODEL_TYPES, ModelArgs

if TYPE_CHECKING:
    from mlxlora_core.ops import LanguageModel


def read(raw: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """None for every config: Google's own checkpoints are not read."""


def tensors(found: Mapping[str, LazyTensor], args: ModelArgs) -> Mapping[str, LazyTensor]:
    """The tensors as they are."""
    return found


def build(args: ModelArgs) -> LanguageModel:
    """A model with lazy parameters: they cost nothing as long as nobody reads them."""
    from mlxlora_gemma.model import Model

    return Model(args)


@hookimpl
def mlxlora_architectures() -> Iterable[Architecture]:
    """The one architecture of this plugin."""
    return [
        Architecture(
            name="gemma",
            summary="Gemma 2 and Gemma 3 text: four norms a block, layers with a window, capped scores",
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
