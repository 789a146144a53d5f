"""Small random models of any family as folders of Hugging Face, with a tokenizer that has a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import small_tokenizers

from mlxlora_core import plugins
from mlxlora_core.files import save_tensors
from mlxlora_core.model.architectures import foreign_table
from mlxlora_core.model.foreign_layout import foreign_tensors
from mlxlora_core.model.linears import parameters
from mlxlora_core.values import LazyTensor

REGISTRY = plugins.load(environ={plugins.ALLOW_LIST: ""})
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

_SIZES = {
    "dim": 64,
    "n_layers": 2,
    "head_dim": 16,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 424,
    "max_seq_len": 256,
}
_LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_len": 64,
}
#: name -> architecture, and what sets its arguments apart
FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {"model_type": "llama"}),
    "llama tied": ("llama", {"model_type": "llama", "tie_word_embeddings": True, **_LLAMA3}),
    "mistral": ("llama", {"model_type": "mistral", "sliding_window": 24}),
    "qwen2": ("llama", {"model_type": "qwen2", "biases": ("wq", "wk", "wv"), "rope_theta": 1e6}),
    "qwen3": ("llama", {"model_type": "qwen3", "head_norms": True}),
    "smollm3": ("llama", {"model_type": "smollm3", "n_layers": 4, "unrotated_layers": (3,)}),
    "gemma2": (
        "gemma",
        {
            "model_type": "gemma2",
            "query_pre_attn_scalar": 16.0,
            "rope_theta": 1e4,
            "sliding_window": 24,
            "window_layers": (0,),
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": (
        "gemma",
        {
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": 16.0,
            "rope_theta": 1e6,
            "sliding_rope_theta": 1e4,
            "sliding_window": 24,
            "window_layers": (0,),
            "head_norms": True,
        },
    ),
    "phi3": ("phi3", {"model_type": "phi3", "rope_theta": 1e4, "rotary_dim": 8}),
    "olmo2": ("olmo2", {"model_type": "olmo2", "rope_theta": 5e5}),
}


def args_of(family: str) -> Any:
    """The arguments of a small model of a family."""
    name, more = FAMILIES[family]
    return REGISTRY.find("architecture", name).spec.args(**{**_SIZES, **more})


def write(folder: Path, family: str, dtype: str = "float32") -> Path:
    """A folder of Hugging Face with a model of a family, the same every time.

    Args:
        folder: to make.
        family: one of :data:`FAMILIES`.
        dtype: of the weights.
    """
    folder.mkdir()
    component = REGISTRY.find("architecture", FAMILIES[family][0])
    args = args_of(family)
    draw = np.random.default_rng(11)
    shapes = {name: p.shape for name, p in parameters(component.spec.build(args)).items()}
    ours = {name: _lazy(draw, name, shape, dtype) for name, shape in shapes.items()}
    table = {entry.name: entry for entry in foreign_table(component, "hf", args)}
    save_tensors(folder / "model.safetensors", foreign_tensors(component, ours, table), {"format": "pt"})
    write_tokenizer(folder)
    config = {**component.spec.layouts["hf"].write(args), "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path) -> None:
    """The files of a byte-level tokenizer with a chat template and two end ids."""
    tokenizer = small_tokenizers.byte_level(SPECIALS, bos="<s>")
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": small_tokenizers.CHATML}
    small_tokenizers.write(folder, tokenizer, config, [1, 3])


def _lazy(draw: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    """Numbers of about the size of a trained model's; those of norms lie around 1."""
    values = draw.standard_normal(shape) * (1.2 / shape[-1] ** 0.5 if len(shape) > 1 else 0.3)
    array = mx.array((values + 1 if "norm" in name else values).astype(np.float32)).astype(getattr(mx, dtype))
    return LazyTensor(shape, dtype, lambda: array)
