"""Gemma 2 and 3 in plain numpy, float64: what the numbers of the ``gemma`` architecture are held against.

Written for the eye and not for speed, and sharing nothing with mlxlora: the halves
of a head are turned against each other as Hugging Face stores them, key and value
heads are repeated, and the scores are masked pair by pair. Weights have the names
of Hugging Face, and norms hold one less than they multiply by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Weights = Mapping[str, np.ndarray]

#: tensor of a layer in GGUF -> in Hugging Face
GGUF = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Gemma:
    """What a model is.

    Attributes:
        scalar: whose root the scores are divided by.
        windows: of each layer, None where it sees all.
        thetas: base of the rotary wavelengths of each layer.
        divisors: what the frequencies of each layer are divided by.
        cap, final_cap: of scores and logits, None where there is none.
        head_norms: whether heads of queries and keys are normalised.
    """

    dim: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    width: int
    scalar: float
    windows: tuple[int | None, ...]
    thetas: tuple[float, ...]
    divisors: tuple[float, ...]
    cap: float | None = None
    final_cap: float | None = None
    head_norms: bool = False
    eps: float = 1e-5

    def shapes(self, *, tied: bool = True) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor in a checkpoint."""
        queries, keys = self.heads * self.width, self.kv_heads * self.width
        block = {
            "self_attn.q_proj": (queries, self.dim),
            "self_attn.k_proj": (keys, self.dim),
            "self_attn.v_proj": (keys, self.dim),
            "self_attn.o_proj": (self.dim, queries),
            "mlp.gate_proj": (self.hidden, self.dim),
            "mlp.up_proj": (self.hidden, self.dim),
            "mlp.down_proj": (self.dim, self.hidden),
            "input_layernorm": (self.dim,),
            "post_attention_layernorm": (self.dim,),
            "pre_feedforward_layernorm": (self.dim,),
            "post_feedforward_layernorm": (self.dim,),
        }
        if self.head_norms:
            block |= {"self_attn.q_norm": (self.width,), "self_attn.k_norm": (self.width,)}
        found = {"model.embed_tokens.weight": (self.vocabulary, self.dim), "model.norm.weight": (self.dim,)}
        if not tied:
            found["lm_head.weight"] = (self.vocabulary, self.dim)
        for layer in range(len(self.windows)):
            found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
        return found

    def logits(self, weights: Weights, tokens: np.ndarray) -> np.ndarray:
        """Logits (B, T, V) of token ids (B, T)."""
        w = {name: weight.astype(np.float64) for name, weight in weights.items()}
        embedding = w["model.embed_tokens.weight"]
        x = embedding[tokens] * math.sqrt(self.dim)
        for layer in range(len(self.windows)):
            at = f"model.layers.{layer}."
            part = {
                name.removeprefix(at)[: -len(".weight")]: v for name, v in w.items() if name.startswith(at)
            }
            entered = self._norm(x, part["input_layernorm"])
            x = x + self._norm(self._attention(entered, part, layer), part["post_attention_layernorm"])
            entered = self._norm(x, part["pre_feedforward_layernorm"])
            x = x + self._norm(_feed_forward(entered, part), part["post_feedforward_layernorm"])
        out = self._norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", embedding).T
        return _capped(out, self.final_cap)

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * (1 + weight)

    def _attention(self, x: np.ndarray, part: Weights, layer: int) -> np.ndarray:
        batch, length, _ = x.shape
        q, k, v = (
            (x @ part[f"self_attn.{n}_proj"].T).reshape(batch, length, -1, self.width).swapaxes(1, 2)
            for n in "qkv"
        )
        if self.head_norms:
            q, k = self._norm(q, part["self_attn.q_norm"]), self._norm(k, part["self_attn.k_norm"])
        q, k = self._turned(q, layer), self._turned(k, layer)
        group = self.heads // self.kv_heads
        k, v = k.repeat(group, 1), v.repeat(group, 1)
        scores = _capped(q @ k.swapaxes(-1, -2) / math.sqrt(self.scalar), self.cap)
        window = self.windows[layer]
        for query in range(length):
            for key in range(length):
                if key > query or (window is not None and key <= query - window):
                    scores[..., query, key] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        out = (shares / shares.sum(-1, keepdims=True)) @ v
        return out.swapaxes(1, 2).reshape(batch, length, -1) @ part["self_attn.o_proj"].T

    def _turned(self, x: np.ndarray, layer: int) -> np.ndarray:
        half = self.width // 2
        rates = self.thetas[layer] ** (-np.arange(half) / half) / self.divisors[layer]
        angles = np.arange(x.shape[2])[:, None] * rates
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def of_gguf(weights: Weights) -> dict[str, np.ndarray]:
    """Tensors named and stored as in GGUF, as Hugging Face has them."""
    found = {}
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        _, layer, rest = path.split(".", 2) if path.startswith("blk.") else ("", "", path)
        theirs = f"model.layers.{layer}.{GGUF[rest]}" if layer else _TOP[path]
        found[f"{theirs}.weight"] = weight - 1.0 if path.endswith("norm") else weight
    return found


def gguf_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same shapes by the names of GGUF."""
    layer = {theirs: ours for ours, theirs in GGUF.items()}
    top = {theirs: ours for ours, theirs in _TOP.items()}
    found = {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if path in top:
            found[f"{top[path]}.weight"] = shape
        else:
            number, rest = path.removeprefix("model.layers.").split(".", 1)
            found[f"blk.{number}.{layer[rest]}.weight"] = shape
    return found


def _feed_forward(x: np.ndarray, part: Weights) -> np.ndarray:
    gate, up = x @ part["mlp.gate_proj"].T, x @ part["mlp.up_proj"].T
    gelu = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * up) @ part["mlp.down_proj"].T


def _capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)
