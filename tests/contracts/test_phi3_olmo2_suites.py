"""The conformance suite over ``phi3`` and ``olmo2``, as Hugging Face and GGUF spell them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import phi3_olmo2_torch
import torch

from mlxlora_core import plugins as registry
from mlxlora_core.testing.architecture import ArchitectureSuite

ARCHITECTURES = {
    c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("architecture")
}

PHI3: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 20,
    "vocab_size": 17,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "sliding_window": 5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 1024,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 9.0]},
}
PLAIN = {**PHI3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
for key in ("sliding_window", "partial_rotary_factor", "rope_scaling"):
    del PLAIN[key]
OLMO2: dict[str, Any] = {
    "model_type": "olmo2",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 17,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "max_position_embeddings": 4096,
}
BIASED = {**OLMO2, "num_key_value_heads": 4, "head_dim": 4, "attention_bias": True}


class TestPhi3(ArchitectureSuite):
    """Three quarters of a head turned, by the divisors of a short text; a window; a tied head."""

    spec = ARCHITECTURES["phi3"]
    layout = "hf"
    raw: Mapping[str, Any] = PHI3
    checkpoint = phi3_olmo2_torch.shapes(PHI3, tied=True)
    theirs: Mapping[str, Any] = PHI3
    names: Mapping[str, str] = {}
    sizes: tuple[str, ...] = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "sliding_window",
        "max_position_embeddings",
        "original_max_position_embeddings",
    )

    def reference(self, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
        named = {}
        for name, weight in weights.items():
            for ours, theirs in self.names.items():
                name = name.replace(ours, theirs)
            named[name] = torch.from_numpy(weight)
        return phi3_olmo2_torch.logits(named, torch.from_numpy(tokens).long(), self.theirs).numpy()


class TestPlainPhi3(TestPhi3):
    """Whole heads of a width of their own, no window, an own head."""

    raw = theirs = PLAIN
    checkpoint = phi3_olmo2_torch.shapes(PLAIN)
    sizes = (
        *(
            name
            for name in TestPhi3.sizes
            if name not in ("sliding_window", "original_max_position_embeddings")
        ),
        "head_dim",
    )


class TestPhi3OfGguf(TestPhi3):
    """The keys and names of llama.cpp."""

    layout = "gguf"
    raw: Mapping[str, Any] = {
        "general.architecture": "phi3",
        "phi3.embedding_length": 24,
        "phi3.block_count": 3,
        "phi3.attention.head_count": 3,
        "phi3.attention.head_count_kv": 1,
        "phi3.feed_forward_length": 20,
        "phi3.attention.layer_norm_rms_epsilon": 1e-5,
        "phi3.rope.freq_base": 100.0,
        "phi3.rope.dimension_count": 6,
        "phi3.attention.sliding_window": 5,
        "phi3.context_length": 4096,
        "phi3.rope.scaling.original_context_length": 1024,
        "phi3.rope.scaling.attn_factor": (1 + np.log(4) / np.log(1024)) ** 0.5,
        "rope_factors_short.weight": PHI3["rope_scaling"]["short_factor"],
        "rope_factors_long.weight": PHI3["rope_scaling"]["long_factor"],
    }
    names: Mapping[str, str] = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.": "model.layers.",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    }
    sizes = (
        "phi3.embedding_length",
        "phi3.block_count",
        "phi3.attention.head_count",
        "phi3.attention.head_count_kv",
        "phi3.feed_forward_length",
        "phi3.rope.dimension_count",
        "phi3.context_length",
        "phi3.rope.scaling.original_context_length",
    )

    @property
    def checkpoint(self) -> Mapping[str, tuple[int, ...]]:  # type: ignore[override]  # a field there
        found = {}
        for name, shape in phi3_olmo2_torch.shapes(self.theirs, tied=True).items():
            for ours, theirs in self.names.items():
                name = name.replace(theirs, ours)
            found[name] = shape
        return found


class TestOlmo2(TestPhi3):
    """Grouped heads, an own head."""

    spec = ARCHITECTURES["olmo2"]
    raw = theirs = OLMO2
    checkpoint = phi3_olmo2_torch.shapes(OLMO2)
    sizes = tuple(name for name in TestPlainPhi3.sizes if name != "head_dim")


class TestOlmo2WithBiases(TestOlmo2):
    """Biases, as many key heads as query heads, heads not D / H wide, a tied head."""

    raw = theirs = BIASED
    checkpoint = phi3_olmo2_torch.shapes(BIASED, tied=True)


class TestOlmo2OfGguf(TestPhi3OfGguf):
    """The keys and names of llama.cpp."""

    unsaid = ("gguf",)  # llama.cpp has no such model whose head is the embedding
    spec = ARCHITECTURES["olmo2"]
    theirs = OLMO2
    raw: Mapping[str, Any] = {
        "general.architecture": "olmo2",
        "olmo2.embedding_length": 24,
        "olmo2.block_count": 2,
        "olmo2.attention.head_count": 4,
        "olmo2.attention.head_count_kv": 2,
        "olmo2.feed_forward_length": 20,
        "olmo2.attention.layer_norm_rms_epsilon": 1e-5,
        "olmo2.rope.freq_base": 100.0,
        "olmo2.context_length": 4096,
    }
    names: Mapping[str, str] = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.": "model.layers.",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    sizes = (
        "olmo2.embedding_length",
        "olmo2.block_count",
        "olmo2.attention.head_count",
        "olmo2.attention.head_count_kv",
        "olmo2.feed_forward_length",
        "olmo2.context_length",
    )
