"""Tiny random models that transformers makes, and the folders that they would be saved as."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

import torch


def centred(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Weights of about the size of a trained model's; those of norms lie around 1."""
    drawn = noise * 1.2 / noise.shape[-1] ** 0.5 if noise.ndim > 1 else 0.3 * noise
    return 1 + 0.5 * drawn if "norm" in name else drawn


def random_model(
    transformers: Any,
    config: Any,
    dtype: torch.dtype,
    values: Callable[[str, torch.Tensor], torch.Tensor] = centred,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of theirs in float64, and its weights in ``dtype``, the same numbers.

    Args:
        transformers: the library.
        config: of theirs; whether it ties the head says whether there is a weight for it.
        dtype: that both can hold.
        values: what a weight holds, of its name and of noise in its shape.
    """
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(values(name, torch.randn(weight.shape, generator=draw)).to(dtype))
    weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return model, weights


def spellings(model: Any, stated: dict[str, Any], dropped: Collection[str]) -> dict[str, dict[str, Any]]:
    """config.json as transformers 5 writes it, and as those before it did.

    Args:
        model: of theirs.
        stated: what only the old one says.
        dropped: keys that only the new one has.
    """
    new = json.loads(json.dumps(model.config.to_dict()))
    kept = {key: value for key, value in new.items() if key not in dropped}
    return {"new": new, "old": {**kept, "rope_scaling": None, **stated}}
