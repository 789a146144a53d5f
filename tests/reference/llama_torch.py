"""The Llama family in plain torch: what the numbers of the ``llama`` architecture are held against.

Written for the eye and not for speed, and sharing nothing with mlxlora: positions
are rotated as complex numbers, key and value heads are repeated, the scores are
masked pair by pair and the softmax is spelt out. It reads a dict of tensors with the names of
the original checkpoints, and the keys of their params.json; for what these do not know (norms of heads,
biases, layers without positions or with a window, scaled positions) those of mlxlora's config.json.
It computes in the type of the tensors, positions in float64.
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
    if config.get("head_norms"):
        block |= {"attention.q_norm": (config["head_dim"],), "attention.k_norm": (config["head_dim"],)}
    biased = [name for name in block if name.rpartition(".")[2] in config.get("biases", ())]
    found = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,)}
    if not tied:
        found["output.weight"] = (vocab, dim)
    for layer in range(config["n_layers"]):
        found |= {f"layers.{layer}.{name}.weight": shape for name, shape in block.items()}
        found |= {f"layers.{layer}.{name}.bias": block[name][:1] for name in biased}
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
    return head(weights, run(weights, weights["tok_embeddings.weight"][tokens], config), config)


def run(weights: Weights, x: torch.Tensor, config: Config) -> torch.Tensor:
    """Hidden states (B, T, D) after all layers, of embeddings (B, T, D)."""
    for layer in range(config["n_layers"]):
        at = f"layers.{layer}."
        part = {name.removeprefix(at): w for name, w in weights.items() if name.startswith(at)}
        x = x + attention(part, rms_norm(x, part["attention_norm.weight"], config), config, layer)
        x = x + feed_forward(part, rms_norm(x, part["ffn_norm.weight"], config))
    return x


def head(weights: Weights, x: torch.Tensor, config: Config) -> torch.Tensor:
    """Logits of hidden states; without an output matrix, the embedding is it."""
    x = rms_norm(x, weights["norm.weight"], config)
    return x @ weights.get("output.weight", weights["tok_embeddings.weight"]).T


def rms_norm(x: torch.Tensor, weight: torch.Tensor, config: Config) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["norm_eps"]) * weight


def frequencies(config: Config) -> tuple[torch.Tensor, float]:
    """The angle a position of each pair of features, float64, and what turned features are multiplied by."""
    width, theta = config["head_dim"], config.get("rope_theta", 10000.0)
    plain = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    kind, factor = config.get("rope_scaling"), config.get("rope_factor", 1.0)
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "divisors":
        return plain / torch.tensor(config["rope_divisors"], dtype=torch.float64), 1.0
    if kind == "llama3":
        return torch.stack([llama3(angle, config) for angle in plain]), 1.0
    if kind == "yarn":
        return yarn(plain, config), config["rope_attention_factor"]
    return plain, 1.0


def llama3(angle: torch.Tensor, config: Config) -> torch.Tensor:
    """One frequency by its wavelength: long ones are divided, short ones are not, between them it changes."""
    length, low, high = (
        config[f"rope_{key}"] for key in ("original_len", "low_freq_factor", "high_freq_factor")
    )
    wave = 2 * math.pi / angle
    if wave < length / high:
        return angle
    if wave > length / low:
        return angle / config["rope_factor"]
    smooth = (length / wave - low) / (high - low)
    return (1 - smooth) * angle / config["rope_factor"] + smooth * angle


def yarn(plain: torch.Tensor, config: Config) -> torch.Tensor:
    """The frequencies, from the pair that turns ``beta_fast`` times on more and more divided."""
    width, length = config["head_dim"], config["rope_original_len"]

    def pair_of(turns: float) -> float:
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config["rope_theta"]))

    low, high = pair_of(config["rope_beta_fast"]), pair_of(config["rope_beta_slow"])
    if config.get("rope_truncate", True):
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, width - 1.0)
    ramp = (torch.arange(width // 2, dtype=torch.float64) - low) / (high - low)
    ramp = ramp.clamp(0, 1)
    return plain / config["rope_factor"] * ramp + plain * (1 - ramp)


def rotate(x: torch.Tensor, frequency: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Rotary positions of (B, T, H, E): features 2i and 2i + 1 are one complex number."""
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    turn = torch.polar(torch.full_like(angle, factor), angle)[:, None, :]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn.to(pairs.dtype)).flatten(-2)


def visible(tokens: int, window: int | None) -> torch.Tensor:
    """(T, T) booleans: query i sees key j if j <= i, and with a window only if i - window < j."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for query in range(tokens):
        for key in range(query + 1):
            seen[query, key] = window is None or key > query - window
    return seen


def linear(part: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """(..., inputs) -> (..., outputs)."""
    return x @ part[f"{name}.weight"].T + part.get(f"{name}.bias", 0)


def attention(part: Weights, x: torch.Tensor, config: Config, layer: int) -> torch.Tensor:
    """(B, T, D) -> (B, T, D), each key and value head serving n_heads / n_kv_heads query heads."""
    group = config["n_heads"] // config["n_kv_heads"]
    q, k, v = (linear(part, f"attention.w{n}", x).unflatten(-1, (-1, config["head_dim"])) for n in "qkv")
    if config.get("head_norms"):
        q = rms_norm(q, part["attention.q_norm.weight"], config)
        k = rms_norm(k, part["attention.k_norm.weight"], config)
    if layer not in config.get("unrotated_layers", ()):
        q, k = rotate(q, *frequencies(config)), rotate(k, *frequencies(config))
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / config["head_dim"] ** 0.5
    bound = layer in config.get("window_layers", range(config["n_layers"]))
    unseen = ~visible(x.shape[1], config.get("sliding_window") if bound else None)
    scores = scores.masked_fill(unseen, float("-inf"))
    scores = torch.exp(scores - scores.amax(-1, keepdim=True))
    scores = scores / scores.sum(-1, keepdim=True)
    return linear(part, "attention.wo", torch.einsum("bhqk,bkhe->bqhe", scores, v).flatten(2))


def feed_forward(part: Weights, x: torch.Tensor) -> torch.Tensor:
    """w2(silu(w1 x) · w3 x)."""
    gate = linear(part, "feed_forward.w1", x)
    gate = gate / (1 + torch.exp(-gate))
    return linear(part, "feed_forward.w2", gate * linear(part, "feed_forward.w3", x))


def greedy(weights: Weights, prompt: list[int], count: int, config: Config) -> list[int]:
    """The ``count`` most likely tokens after ``prompt``, the whole text run anew for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(weights, torch.tensor([ids]), config)[0, -1].argmax()))
    return ids[len(prompt) :]
