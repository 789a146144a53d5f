"""The conformance suite over the gemma architecture, as Hugging Face and as GGUF spell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gemma_numpy
import numpy as np
from gemma_numpy import Gemma

from mlxlora_core import plugins as registry
from mlxlora_core.testing.architecture import ArchitectureSuite

ARCHITECTURES = {
    c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("architecture")
}
GEMMA3 = Gemma(
    dim=12,
    hidden=20,
    vocabulary=17,
    heads=4,
    kv_heads=2,
    width=6,
    scalar=64.0,
    windows=(5, 5, None),
    thetas=(10.0, 10.0, 100.0),
    divisors=(1.0, 1.0, 4.0),
    head_norms=True,
)
GEMMA2 = Gemma(
    dim=12,
    hidden=20,
    vocabulary=17,
    heads=4,
    kv_heads=1,
    width=8,
    scalar=8.0,
    windows=(4, None, 4),
    thetas=(10000.0,) * 3,
    divisors=(1.0,) * 3,
    cap=1.5,
    final_cap=3.0,
)


class TestGemma3(ArchitectureSuite):
    """As transformers 5 spells it: two rotary bases, the one scaled, norms of heads, tied."""

    spec = ARCHITECTURES["gemma"]
    layout = "hf"
    wide = ("float16",)
    plain = GEMMA3
    raw: Mapping[str, Any] = {
        "model_type": "gemma3_text",
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 20,
        "vocab_size": 17,
        "rms_norm_eps": 1e-5,
        "query_pre_attn_scalar": 64,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    }
    sizes = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "sliding_window",
    )

    @property
    def checkpoint(self) -> Mapping[str, tuple[int, ...]]:  # type: ignore[override]  # a field there
        return self.plain.shapes()

    def reference(self, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
        return self.plain.logits(weights, tokens)


class TestGemma2(TestGemma3):
    """As transformers before 5 spelt it: caps, a window in every second layer, one key head, own head."""

    plain = GEMMA2
    raw: Mapping[str, Any] = {
        "model_type": "gemma2",
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 20,
        "vocab_size": 17,
        "rms_norm_eps": 1e-5,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "rope_theta": 10000.0,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": False,
    }

    @property
    def checkpoint(self) -> Mapping[str, tuple[int, ...]]:  # type: ignore[override]  # a field there
        return self.plain.shapes(tied=False)


class TestGemma2InGguf(TestGemma3):
    """Norms with the 1 added, and what GGUF leaves unsaid."""

    layout = "gguf"
    plain = GEMMA2
    raw: Mapping[str, Any] = {
        "general.architecture": "gemma2",
        "gemma2.embedding_length": 12,
        "gemma2.block_count": 3,
        "gemma2.attention.head_count": 4,
        "gemma2.attention.head_count_kv": 1,
        "gemma2.attention.key_length": 8,
        "gemma2.attention.value_length": 8,
        "gemma2.feed_forward_length": 20,
        "gemma2.attention.layer_norm_rms_epsilon": 1e-5,
        "gemma2.attention.sliding_window": 4,
        "gemma2.attn_logit_softcapping": 1.5,
        "gemma2.final_logit_softcapping": 3.0,
    }
    sizes = (
        "gemma2.embedding_length",
        "gemma2.block_count",
        "gemma2.attention.head_count",
        "gemma2.attention.head_count_kv",
        "gemma2.attention.key_length",
        "gemma2.feed_forward_length",
    )

    @property
    def checkpoint(self) -> Mapping[str, tuple[int, ...]]:  # type: ignore[override]  # a field there
        return gemma_numpy.gguf_names(self.plain.shapes())

    def reference(self, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
        return self.plain.logits(gemma_numpy.of_gguf(weights), tokens)


class TestGemma3InGguf(TestGemma2InGguf):
    """A pattern of windows, and a base of their own for the layers that have one."""

    plain = replace(GEMMA3, scalar=6.0)
    raw: Mapping[str, Any] = {
        "general.architecture": "gemma3",
        "gemma3.embedding_length": 12,
        "gemma3.block_count": 3,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 2,
        "gemma3.attention.key_length": 6,
        "gemma3.feed_forward_length": 20,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-5,
        "gemma3.attention.sliding_window": 5,
        "gemma3.attention.sliding_window_pattern": 3,
        "gemma3.rope.freq_base": 100.0,
        "gemma3.rope.freq_base_swa": 10.0,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 4.0,
    }
    sizes = tuple(key.replace("gemma2", "gemma3") for key in TestGemma2InGguf.sizes)
