"""Architecture ``llama``: Llama, Mistral, Qwen and SmolLM, with the names of Llama's original checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mlxlora_core.api import Architecture, Layout, LazyTensor, hookimpl
from mlxlora_llama import gguf, gguf_write, hf, hf_write, tables
from mlxlora_llama.config import MODEL_TYPES, ModelArgs
from mlxlora_llama.params import notes, read

if TYPE_CHECKING:
    from mlxlora_core.ops import LanguageModel

_COMPUTED = (
    ".rope.freqs",
    ".freqs_cis",
    ".freqs_cos",
    ".freqs_sin",
    ".inv_freq",
    ".attention.mask",
    ".causal_mask",
)


def tensors(found: Mapping[str, LazyTensor], args: ModelArgs) -> Mapping[str, LazyTensor]:
    """The checkpoint's tensors as they are, without frequencies and masks, which are computed here."""
    return {name: tensor for name, tensor in found.items() if not f".{name}".endswith(_COMPUTED)}


def build(args: ModelArgs) -> LanguageModel:
    """A model with lazy, random parameters: they cost nothing as long as nobody reads them."""
    from mlxlora_llama.model import Model

    return Model(args)


@hookimpl
def mlxlora_architectures() -> Iterable[Architecture]:
    """The one architecture of this plugin."""
    return [
        Architecture(
            name="llama",
            summary="Llama, Mistral, Qwen and SmolLM: grouped queries, rotary positions, sliding windows",
            model_types=MODEL_TYPES,
            args=ModelArgs,
            read=read,
            notes=notes,
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
