"""The linears of a Llama as Hugging Face's libraries and mlx-lm name and order them."""

from __future__ import annotations

import re

from mlxlora_core.api import ForeignLinear
from mlxlora_llama.config import ModelArgs

_LINEAR = re.compile(r"(?:.+\.)?layers\.([0-9]{1,6})\.(self_attn|mlp)\.([a-z]+)_proj")
_NAMES = {
    ("self_attn", "q"): "attention.wq",
    ("self_attn", "k"): "attention.wk",
    ("self_attn", "v"): "attention.wv",
    ("self_attn", "o"): "attention.wo",
    ("mlp", "gate"): "feed_forward.w1",
    ("mlp", "down"): "feed_forward.w2",
    ("mlp", "up"): "feed_forward.w3",
}


def foreign_linear(path: str, args: ModelArgs) -> ForeignLinear | None:
    """The linear that a path such as ``model.layers.0.self_attn.q_proj`` stands for, or None.

    Queries and keys are turned by rotary positions: here features 2i and 2i + 1
    of a head are a pair, there features i and i + E / 2. So row 2i + s of a head
    is row i + s E / 2 there.
    """
    match = _LINEAR.fullmatch(path)
    name = _NAMES.get((match[2], match[3])) if match else None
    if match is None or name is None or int(match[1]) >= args.n_layers:
        return None
    heads = {"attention.wq": args.n_heads, "attention.wk": args.n_kv_heads}.get(name)
    return ForeignLinear(f"layers.{int(match[1])}.{name}", _rows(heads, args.head_dim) if heads else None)


def _rows(heads: int, width: int) -> list[int]:
    """Which row there each row here is, of ``heads`` heads of even ``width``."""
    half = width // 2
    return [head * width + s * half + i for head in range(heads) for i in range(half) for s in (0, 1)]
