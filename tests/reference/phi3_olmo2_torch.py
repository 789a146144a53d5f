"""Phi-3 and OLMo 2 in plain torch: what the numbers of ``phi3`` and ``olmo2`` are held against.

Written for the eye and not for speed, and sharing nothing with mlxlora: the
tensors are read under the names and in the order that Hugging Face stores them
in, fused ones as they are, the halves of a head are turned against each other,
scores are masked pair by pair. The config is that of Hugging Face, its rotary
positions in the older two keys. It computes in the type of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

Weights = Mapping[str, torch.Tensor]
Config = Mapping[str, Any]


def shapes(config: Config, *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the checkpoint of a model."""
    dim, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    width = head_width(config)
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    if config["model_type"] == "phi3":
        block = {
            "self_attn.qkv_proj.weight": (queries + 2 * keys, dim),
            "mlp.gate_up_proj.weight": (2 * hidden, dim),
            "input_layernorm.weight": (dim,),
        }
    else:
        block = {
            "self_attn.q_proj.weight": (queries, dim),
            "self_attn.k_proj.weight": (keys, dim),
            "self_attn.v_proj.weight": (keys, dim),
            "self_attn.q_norm.weight": (queries,),
            "self_attn.k_norm.weight": (keys,),
            "mlp.gate_proj.weight": (hidden, dim),
            "mlp.up_proj.weight": (hidden, dim),
            "post_feedforward_layernorm.weight": (dim,),
        }
    block |= {
        "self_attn.o_proj.weight": (dim, queries),
        "mlp.down_proj.weight": (dim, hidden),
        "post_attention_layernorm.weight": (dim,),
    }
    if config.get("attention_bias"):
        rows = {"q": queries, "k": keys, "v": keys, "o": dim}
        block |= {f"self_attn.{name}_proj.bias": (count,) for name, count in rows.items()}
    found = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    if not tied:
        found["lm_head.weight"] = (vocab, dim)
    for layer in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return found


def random_weights(config: Config, *, tied: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights large enough that attention is far from uniform and every layer counts."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(config, tied=tied).items():
        noise = torch.randn(shape, generator=draw)
        weights[name] = noise * 1.5 / shape[-1] ** 0.5
        if len(shape) == 1:
            weights[name] = 0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise
    return weights


def logits(weights: Weights, tokens: torch.Tensor, config: Config) -> torch.Tensor:
    """Logits (B, T, V) of token ids (B, T)."""
    embedding = weights["model.embed_tokens.weight"]
    x, layer = embedding[tokens], phi3_layer if config["model_type"] == "phi3" else olmo2_layer
    for number in range(config["num_hidden_layers"]):
        at = f"model.layers.{number}."
        x = layer({n.removeprefix(at): w for n, w in weights.items() if n.startswith(at)}, x, config)
    return rms_norm(x, weights["model.norm.weight"], config) @ weights.get("lm_head.weight", embedding).T


def phi3_layer(part: Weights, x: torch.Tensor, config: Config) -> torch.Tensor:
    """A norm before each of the two, whose linears are fused: queries, keys, values; gate, up."""
    width = head_width(config)
    keys = config["num_key_value_heads"] * width
    fused = rms_norm(x, part["input_layernorm.weight"], config) @ part["self_attn.qkv_proj.weight"].T
    q, k, v = fused.split([config["num_attention_heads"] * width, keys, keys], -1)
    x = x + attention(q, k, v, config) @ part["self_attn.o_proj.weight"].T
    fused = rms_norm(x, part["post_attention_layernorm.weight"], config) @ part["mlp.gate_up_proj.weight"].T
    gate, up = fused.split(config["intermediate_size"], -1)
    return x + (gate / (1 + torch.exp(-gate)) * up) @ part["mlp.down_proj.weight"].T


def olmo2_layer(part: Weights, x: torch.Tensor, config: Config) -> torch.Tensor:
    """A norm after each of the two, and one of all queries and one of all keys."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ part[f"self_attn.{name}_proj.weight"].T + part.get(f"self_attn.{name}_proj.bias", 0)

    q = rms_norm(linear("q", x), part["self_attn.q_norm.weight"], config)
    k = rms_norm(linear("k", x), part["self_attn.k_norm.weight"], config)
    out = linear("o", attention(q, k, linear("v", x), config))
    x = x + rms_norm(out, part["post_attention_layernorm.weight"], config)
    gate, up = x @ part["mlp.gate_proj.weight"].T, x @ part["mlp.up_proj.weight"].T
    out = (gate / (1 + torch.exp(-gate)) * up) @ part["mlp.down_proj.weight"].T
    return x + rms_norm(out, part["post_feedforward_layernorm.weight"], config)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, config: Config) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight


def head_width(config: Config) -> int:
    """E."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Config) -> torch.Tensor:
    """(B, T, H E), (B, T, K E) twice -> (B, T, H E)."""
    width = head_width(config)
    q, k, v = (part.unflatten(-1, (-1, width)) for part in (q, k, v))
    q, k = rotate(q, config), rotate(k, config)
    group, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / width**0.5
    window = config.get("sliding_window") or length
    query, key = torch.arange(length)[:, None], torch.arange(length)
    scores = scores.masked_fill(~((query - window < key) & (key <= query)), -math.inf)
    shares = torch.exp(scores - scores.amax(-1, keepdim=True))
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhe->bqhe", shares, v).flatten(2)


def rotate(x: torch.Tensor, config: Config) -> torch.Tensor:
    """Rotary positions of (B, T, H, E): of the first features of a head, i and i + half are a pair."""
    turned = int(x.shape[-1] * (config.get("partial_rotary_factor") or 1))
    half, length = turned // 2, x.shape[1]
    frequency = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) * 2 / turned)
    factor, scaling = 1.0, config.get("rope_scaling")
    if scaling:
        original, longest = config["original_max_position_embeddings"], config["max_position_embeddings"]
        divisors = scaling["long_factor" if length > original else "short_factor"]
        frequency = frequency / torch.tensor(divisors, dtype=torch.float64)
        factor = max(1.0, math.sqrt(1 + math.log(longest / original) / math.log(original)))
    angle = torch.arange(length, dtype=torch.float64)[:, None, None] * frequency
    sin, cos = (factor * f(angle).to(x.dtype) for f in (torch.sin, torch.cos))
    low, high = x[..., :half], x[..., half:turned]
    return torch.cat([low * cos - high * sin, low * sin + high * cos, x[..., turned:]], -1)
