"""A checkpoint of the family ``mosaic`` and, in numpy alone, the logits that its authors' code would give."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "model_type": "mosaic",
    "d_model": 32,
    "n_blocks": 2,
    "n_heads": 4,
    "n_experts": 4,
    "k_experts": 2,
    "d_expert": 24,
}
VOCABULARY = 272  # more than the 258 ids of the tokenizer
EXPERT_PARTS = ("gate", "up", "down")


def shapes(vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the checkpoint."""
    width, hidden, experts = CONFIG["d_model"], CONFIG["d_expert"], CONFIG["n_experts"]
    found: dict[str, tuple[int, ...]] = {"embed.weight": (vocabulary, width)}
    for block in range(CONFIG["n_blocks"]):
        found |= {
            f"blocks.{block}.norm1.weight": (width,),
            f"blocks.{block}.attn.qkv.weight": (3 * width, width),
            f"blocks.{block}.attn.out.weight": (width, width),
            f"blocks.{block}.norm2.weight": (width,),
            f"blocks.{block}.moe.router.weight": (experts, width),
        }
        for expert in range(experts):
            for part, shape in zip(EXPERT_PARTS, [(hidden, width)] * 2 + [(width, hidden)], strict=True):
                found[f"blocks.{block}.moe.experts.{expert}.{part}.weight"] = shape
    return found | {"final.weight": (width,), "lm_head.weight": (vocabulary, width)}


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights, the same every time."""
    draw = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes().items():
        normal = draw.normal(size=shape)
        made[name] = (1 + normal / 10 if len(shape) == 1 else normal * shape[-1] ** -0.5).astype(np.float32)
    return made


def write(folder: Path, weights: Mapping[str, np.ndarray]) -> Path:
    """Write ``base.npz``, ``base.json`` and ``bytes.json``; gives the path of the first."""
    np.savez(folder / "base.npz", **weights)
    (folder / "base.json").write_text(json.dumps(CONFIG))
    (folder / "bytes.json").write_text('{"end_of_turn": 256, "end_of_text": 257}')
    return folder / "base.npz"


def logits(
    weights: Mapping[str, np.ndarray], tokens: np.ndarray, config: Mapping[str, Any] = CONFIG
) -> np.ndarray:
    """Logits (B, T, V) of ids (B, T), in float64, by the weights of a checkpoint."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    x = w["embed.weight"][tokens]
    for i in range(config["n_blocks"]):
        start = f"blocks.{i}."
        block = {name.removeprefix(start): array for name, array in w.items() if name.startswith(start)}
        x = x + _attention(_norm(x, block["norm1.weight"]), block)
        x = x + _mixture(_norm(x, block["norm2.weight"]), block, config["k_experts"])
    return _norm(x, w["final.weight"]) @ w["lm_head.weight"].T


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * weight


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _rotate(x: np.ndarray) -> np.ndarray:
    """Feature i of the first half turns with feature i of the second (B, H, T, E)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[-2])[:, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1
    )


def _attention(x: np.ndarray, block: Mapping[str, np.ndarray]) -> np.ndarray:
    rows, length, width = x.shape
    fused = (x @ block["attn.qkv.weight"].T).reshape(rows, length, 3, CONFIG["n_heads"], -1)
    q, k, v = fused.transpose(2, 0, 3, 1, 4)
    scores = _rotate(q) @ _rotate(k).swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    seen = np.tril(np.ones((length, length), dtype=bool))
    mixed = _softmax(np.where(seen, scores, -np.inf)) @ v
    return mixed.swapaxes(1, 2).reshape(rows, length, width) @ block["attn.out.weight"].T


def _mixture(x: np.ndarray, block: Mapping[str, np.ndarray], chosen: int) -> np.ndarray:
    scores = x @ block["moe.router.weight"].T
    least = np.sort(scores, axis=-1)[..., -chosen, None]
    shares = _softmax(np.where(scores >= least, scores, -np.inf))
    total = np.zeros_like(x)
    for expert in range(CONFIG["n_experts"]):
        gate, up, down = (block[f"moe.experts.{expert}.{part}.weight"] for part in EXPERT_PARTS)
        inner = x @ gate.T
        total += shares[..., expert, None] * ((inner / (1 + np.exp(-inner)) * (x @ up.T)) @ down.T)
    return total


def loss(weights: Mapping[str, np.ndarray], rows: list[list[int]]) -> float:
    """Mean nats of each id of the rows but the first."""
    total, count = 0.0, 0
    for ids in rows:
        chances = _softmax(logits(weights, np.array([ids[:-1]]))[0])
        total -= np.log(chances[np.arange(len(ids) - 1), ids[1:]]).sum()
        count += len(ids) - 1
    return total / count
