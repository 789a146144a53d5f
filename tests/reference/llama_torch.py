"""Llama and Mistral in plain torch, float32: what the numbers of the ``llama`` architecture are held against.

Written for the eye and not for speed, and sharing nothing with mlxlora: positions
are rotated as complex numbers, key and value heads are repeated, the scores are
masked pair by pair and the softmax is spelt out. It reads a dict of tensors with the names of
the original checkpoints, and the keys of their params.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Weights = Mapping[str, torch.Tensor]
Config = Mapping[str, Any]


def shapes(config: Config, *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the checkpoint of a model."""
    dim, hidden, vocab = config["dim"], config["hidden_dim"], config["vocab_size"]
    queries = config["n_heads"] * config["head_dim"]
    keys = config["n_kv_heads"] * config["head_dim"]
    block = {
        "attention.wq": (queries, dim),
        "attention.wk": (keys, dim),
        "attention.wv": (keys, dim),
        "attention.wo": (dim, queries),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    }
    found = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,)}
    if not tied:
        found["output.weight"] = (vocab, dim)
    for layer in range(config["n_layers"]):
        found |= {f"layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return found


def random_weights(config: Config, *, tied: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights large enough that attention is far from uniform and every layer counts."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(config, tied=tied).items():
        noise = torch.randn(shape, generator=draw)
        weights[name] = 1 + 0.2 * noise if len(shape) == 1 else noise * 1.5 / shape[-1] ** 0.5
    return weights


def logits(weights: Weights, tokens: torch.Tensor, config: Config) -> torch.Tensor:
    """Logits (B, T, V) of token ids (B, T)."""
    return head(weights, run(weights, weights["tok_embeddings.weight"][tokens], config), config)


def run(weights: Weights, x: torch.Tensor, config: Config) -> torch.Tensor:
    """Hidden states (B, T, D) after all layers, of embeddings (B, T, D)."""
    for layer in range(config["n_layers"]):
        at = f"layers.{layer}."
        part = {name.removeprefix(at): w for name, w in weights.items() if name.startswith(at)}
        x = x + attention(part, rms_norm(x, part["attention_norm.weight"], config), config)
        x = x + feed_forward(part, rms_norm(x, part["ffn_norm.weight"], config))
    return x


def head(weights: Weights, x: torch.Tensor, config: Config) -> torch.Tensor:
    """Logits of hidden states; without an output matrix, the embedding is it."""
    x = rms_norm(x, weights["norm.weight"], config)
    return x @ weights.get("output.weight", weights["tok_embeddings.weight"]).T


def rms_norm(x: torch.Tensor, weight: torch.Tensor, config: Config) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["norm_eps"]) * weight


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions of (B, T, H, E): features 2i and 2i + 1 are one complex number."""
    width = x.shape[-1]
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None, :]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def visible(tokens: int, window: int | None) -> torch.Tensor:
    """(T, T) booleans: query i sees key j if j <= i, and with a window only if i - window < j."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for query in range(tokens):
        for key in range(query + 1):
            seen[query, key] = window is None or key > query - window
    return seen


def attention(part: Weights, x: torch.Tensor, config: Config) -> torch.Tensor:
    """(B, T, D) -> (B, T, D), each key and value head serving n_heads / n_kv_heads query heads."""
    group = config["n_heads"] // config["n_kv_heads"]
    width, theta = config["head_dim"], config.get("rope_theta", 10000.0)
    q = rotate((x @ part["attention.wq.weight"].T).unflatten(-1, (-1, width)), theta)
    k = rotate((x @ part["attention.wk.weight"].T).unflatten(-1, (-1, width)), theta)
    v = (x @ part["attention.wv.weight"].T).unflatten(-1, (-1, width))
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / width**0.5
    unseen = ~visible(x.shape[1], config.get("sliding_window"))
    scores = scores.masked_fill(unseen, float("-inf"))
    scores = torch.exp(scores - scores.amax(-1, keepdim=True))
    scores = scores / scores.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhe->bqhe", scores, v).flatten(2) @ part["attention.wo.weight"].T


def feed_forward(part: Weights, x: torch.Tensor) -> torch.Tensor:
    """w2(silu(w1 x) · w3 x)."""
    gate = x @ part["feed_forward.w1.weight"].T
    gate = gate / (1 + torch.exp(-gate))
    return (gate * (x @ part["feed_forward.w3.weight"].T)) @ part["feed_forward.w2.weight"].T


def greedy(weights: Weights, prompt: list[int], count: int, config: Config) -> list[int]:
    """The ``count`` most likely tokens after ``prompt``, the whole text run anew for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(weights, torch.tensor([ids]), config)[0, -1].argmax()))
    return ids[len(prompt) :]
