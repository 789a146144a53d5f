"""The conformance suite over every architecture that is registered."""

from __future__ import annotations

from collections.abc import Mapping

import llama_torch
import numpy as np
import torch

from mlxlora_core import registry
from mlxlora_core.testing.architecture import ArchitectureSuite

ARCHITECTURES = {
    c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("architecture")
}


LLAMA = {
    "dim": 12,
    "n_layers": 2,
    "head_dim": 4,
    "hidden_dim": 20,
    "n_heads": 3,
    "n_kv_heads": 3,
    "norm_eps": 1e-5,
    "vocab_size": 17,
}
TIED = {**LLAMA, "n_kv_heads": 1}
MISTRAL = {
    **LLAMA,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 6,
    "sliding_window": 4,
    "rope_theta": 1e6,
    "max_seq_len": 4096,
}


class TestLlama(ArchitectureSuite):
    """An own head, as many key heads as query heads, and rotary frequencies in the checkpoint."""

    spec = ARCHITECTURES["llama"]
    raw = LLAMA
    tensors = llama_torch.shapes(LLAMA) | {"rope.freqs": (2,)}
    sizes = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size")

    def reference(self, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
        tensors = {name: torch.from_numpy(weight) for name, weight in weights.items()}
        return llama_torch.logits(tensors, torch.from_numpy(tokens).long(), self.raw).numpy()


class TestTiedLlama(TestLlama):
    """No output matrix, and one key head for all queries."""

    raw = TIED
    tensors = llama_torch.shapes(TIED, tied=True)


class TestMistral(TestLlama):
    """Grouped queries, heads not D / H wide, a window shorter than the input, a stated context."""

    raw = MISTRAL
    tensors = llama_torch.shapes(MISTRAL)
    sizes = (*TestLlama.sizes, "sliding_window", "max_seq_len")


def test_every_architecture_is_covered() -> None:
    assert {TestLlama.spec.name} == set(ARCHITECTURES)
