"""A small Llama model as a Hugging Face folder, written with safetensors itself, its numbers drawn."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def write(
    folder: Path,
    tokenizer: Path,
    *,
    layers: int = 2,
    dim: int = 64,
    hidden: int = 128,
    vocab: int = 320,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write the folder: 4 heads, 2 of keys and values, a head of its own, and a SentencePiece tokenizer."""
    draw = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * shape[-1] ** -0.5).to(dtype)

    tensors = {
        "model.embed_tokens.weight": weight(vocab, dim),
        "model.norm.weight": torch.ones(dim, dtype=dtype),
        "lm_head.weight": weight(vocab, dim),
    }
    shapes = {"q": (dim, dim), "k": (dim // 2, dim), "v": (dim // 2, dim), "o": (dim, dim)}
    inner = {"gate": (hidden, dim), "up": (hidden, dim), "down": (dim, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = torch.ones(dim, dtype=dtype)
        tensors |= {f"{at}.self_attn.{name}_proj.weight": weight(*shape) for name, shape in shapes.items()}
        tensors |= {f"{at}.mlp.{name}_proj.weight": weight(*shape) for name, shape in inner.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder
