"""A small Llama model in a GGUF file, its weights in any of the types, and what they are in float64."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path
from typing import Any

import gguf_files
import llama_torch
import numpy as np
import torch
from gguf_files import BYTE_LEVEL, Tensor

VOCAB, DIM, HIDDEN, HEADS, KV_HEADS, LAYERS = 264, 256, 256, 4, 2, 2
CONFIG: dict[str, Any] = {
    "dim": DIM,
    "hidden_dim": HIDDEN,
    "vocab_size": VOCAB,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "head_dim": DIM // HEADS,
    "n_layers": LAYERS,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
KEYS = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": DIM,
    "llama.feed_forward_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": DIM // HEADS,
    "llama.vocab_size": VOCAB,
}
#: the names here -> the names in the file
NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def foreign(name: str) -> str:
    path = name.removesuffix(".weight")
    if path.startswith("layers."):
        _, layer, path = path.split(".", 2)
        return f"blk.{layer}.{NAMES[path]}.weight"
    return f"{NAMES[path]}.weight"


def halves(kind: str, data: bytes) -> bytes:
    """Blocks with scales that make weights of about the size of a model's."""
    draw, content = random.Random(kind), bytearray(data)
    for at in range(0, len(data), gguf_files.TYPES[kind][2]):
        for number, half in enumerate(gguf_files.HALVES[kind]):
            bits = {"Q4": 8, "Q5": 16, "Q8": 128, "Q6": 32}[kind[:2]]
            scale = draw.uniform(0.5, 1.5) * 0.1 / bits / (32 if kind.endswith("K") else 1)
            struct.pack_into(
                "<e", content, at + half, -bits * scale if number and not kind.endswith("K") else scale
            )
    return bytes(content)


def write(path: Path, kinds: list[str], *, tied: bool) -> dict[str, torch.Tensor]:
    """A model whose weights take turns at the types; gives them under the names here, in float64."""
    tensors, weights = [], {}
    for number, (name, shape) in enumerate(llama_torch.shapes(CONFIG, tied=tied).items()):
        if len(shape) == 1:
            kind = "F32"
            data = struct.pack(f"<{shape[0]}f", *(1 + 0.01 * n / shape[0] for n in range(shape[0])))
        else:
            kind = kinds[number % len(kinds)]
            _, in_block, size = gguf_files.TYPES[kind]
            data = random.Random(name).randbytes(math.prod(shape) // in_block * size)
            if in_block > 1:
                data = halves(kind, data)
            else:
                numbers = np.random.default_rng(number).normal(0, 0.06, shape).astype(np.float32)
                bits = numbers.astype("<f2").tobytes() if kind == "F16" else numbers.tobytes()
                data = (
                    b"".join(bits[at + 2 : at + 4] for at in range(0, len(bits), 4))
                    if kind == "BF16"
                    else bits
                )
        tensors.append(Tensor(foreign(name), shape, kind, data))
        weights[name] = torch.tensor(gguf_files.weights(kind, data), dtype=torch.float64).reshape(shape)
    path.write_bytes(gguf_files.gguf({**KEYS, **BYTE_LEVEL, "tokenizer.ggml.add_bos_token": True}, tensors))
    return weights
