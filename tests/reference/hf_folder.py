"""Small folders as Hugging Face, mlx-lm and Mistral lay them out, written with safetensors itself."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

VOCAB, WIDTH, HIDDEN, LAYERS = 40, 64, 96, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
PARAMS = {
    "dim": WIDTH,
    "n_layers": LAYERS,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "hidden_dim": HIDDEN,
    "norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "rope_theta": 10000.0,
}
_CODES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.uint32: "U32"}

Tensors = Mapping[str, mx.array]


def shapes(head: bool = True) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        found |= {
            f"{at}.input_layernorm.weight": (WIDTH,),
            f"{at}.self_attn.q_proj.weight": (WIDTH, WIDTH),
            f"{at}.self_attn.k_proj.weight": (WIDTH // 2, WIDTH),
            f"{at}.self_attn.v_proj.weight": (WIDTH // 2, WIDTH),
            f"{at}.self_attn.o_proj.weight": (WIDTH, WIDTH),
            f"{at}.post_attention_layernorm.weight": (WIDTH,),
            f"{at}.mlp.gate_proj.weight": (HIDDEN, WIDTH),
            f"{at}.mlp.up_proj.weight": (HIDDEN, WIDTH),
            f"{at}.mlp.down_proj.weight": (WIDTH, HIDDEN),
        }
    found["model.norm.weight"] = (WIDTH,)
    return found | ({"lm_head.weight": (VOCAB, WIDTH)} if head else {})


def dense(dtype: mx.Dtype = mx.bfloat16, head: bool = True, seed: int = 0) -> dict[str, mx.array]:
    """Random tensors of the model."""
    draw = np.random.default_rng(seed)
    return {
        n: mx.array(draw.standard_normal(s).astype(np.float32)).astype(dtype) for n, s in shapes(head).items()
    }


def save(path: Path, tensors: Tensors) -> None:
    """Write a ``.safetensors`` by the letter of its format, without a library that mlxlora reads it with."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, tensor in tensors.items():
        start = len(data)
        data += np.array(tensor.view(getattr(mx, f"uint{8 * tensor.dtype.size}"))).tobytes()
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write(folder: Path, tensors: Tensors | None = None, config: Mapping[str, Any] | None = None) -> Path:
    """A folder of one file."""
    folder.mkdir(exist_ok=True)
    save(folder / "model.safetensors", dense() if tensors is None else tensors)
    write_json(folder / "config.json", CONFIG if config is None else config)
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    return folder


def write_shards(
    folder: Path, tensors: Tensors | None = None, count: int = 2, config: Mapping[str, Any] | None = None
) -> Path:
    """A folder of several files with an index."""
    tensors = dense() if tensors is None else tensors
    write(folder, {}, config)
    (folder / "model.safetensors").unlink()
    shards = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    table = {name: shards[i * count // len(tensors)] for i, name in enumerate(tensors)}
    for shard in shards:
        save(folder / shard, {name: tensor for name, tensor in tensors.items() if table[name] == shard})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": table})
    return folder


def packed(
    tensors: Tensors, bits: Mapping[str, tuple[int, int]], otherwise: tuple[int, int] = (32, 4)
) -> dict[str, mx.array]:
    """The tensors with every matrix packed by MLX's own quantizer.

    Args:
        tensors: dense.
        bits: path -> (group size, bits) of those that differ; (0, 0) leaves one dense.
        otherwise: of the others.
    """
    out: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        group, width = bits.get(path, otherwise)
        if tensor.ndim != 2 or not width:
            out[name] = tensor
            continue
        words, scales, biases = mx.quantize(tensor, group, width)
        out |= {f"{path}.weight": words, f"{path}.scales": scales, f"{path}.biases": biases}
    return out
