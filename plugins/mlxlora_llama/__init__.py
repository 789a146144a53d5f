"""Architecture ``llama``: Llama and Mistral, with the parameter names of their original checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlxlora_core.api import Architecture, LanguageModel, hookimpl
from mlxlora_llama.config import MODEL_TYPES, ModelArgs, detect, model_args


def rename(name: str) -> str | None:
    """The checkpoint's own name, or None for the rotary frequencies, which are computed here."""
    return None if name == "rope.freqs" or name.endswith(".rope.freqs") else name


def config(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelArgs:
    """Checked arguments out of params.json or config.json; see :func:`mlxlora_llama.config.model_args`."""
    return model_args(raw, shapes)


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
            summary="Llama and Mistral: grouped queries, rotary positions, sliding window, tied or own head",
            model_types=MODEL_TYPES,
            detect=detect,
            config=config,
            rename=rename,
            build=build,
            default_targets=("wq", "wv"),
        )
    ]
