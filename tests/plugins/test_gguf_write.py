"""What a model is in the metadata of GGUF: read again it computes the same, or it is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import small_models
from mlxlora_llama.rope import turning

from mlxlora_core.errors import ModelError
from mlxlora_core.model.architectures import foreign_table
from mlxlora_core.model.foreign_layout import foreign_tensors
from mlxlora_core.model.linears import parameters
from mlxlora_core.values import LazyTensor

YARN = {
    "rope_scaling": "yarn",
    "rope_factor": 4.0,
    "rope_original_len": 64,
    "rope_beta_fast": 32.0,
    "rope_beta_slow": 1.0,
    "rope_attention_factor": 1.3,
}
SCALED = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_len": 64}
SCALED |= {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
LONG = {"rope_original_len": 64, "rope_attention_factor": 1.2}
#: family, and arguments beside its own
SAID: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in small_models.FAMILIES if family != "mistral"),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 256}),
    ("llama", {"n_heads": 2, "n_kv_heads": 1}),  # heads of their own width
    ("llama", {"biases": ("wq", "wo", "w2")}),
    ("llama", {"max_seq_len": None}),
    ("llama", {"rope_scaling": "linear", "rope_factor": 4.0}),
    ("llama", SCALED),
    ("llama", {"rope_scaling": "divisors", "rope_divisors": tuple(1.0 + i / 3 for i in range(8))}),
    ("llama", YARN),
    ("qwen2", {**YARN, "tie_word_embeddings": True}),
    ("qwen3", {"biases": ("wq", "wk", "wv")}),
    ("gemma2", {"window_layers": None}),
    ("gemma2", {"rope_factor": 2.0}),
    ("gemma2", {"sliding_rope_theta": 500.0}),
    ("gemma3", {"rope_factor": 8.0, "final_logit_softcapping": 20.0, "tie_word_embeddings": False}),
    ("gemma3", {"sliding_window": None, "sliding_rope_theta": None, "window_layers": None}),
    ("phi3", {"rotary_dim": None, "sliding_window": 64}),
    (
        "phi3",
        {**LONG, "rope_short_divisors": (1.0, 1.1, 2.0, 3.0), "rope_long_divisors": (2.0, 3.0, 4.0, 5.0)},
    ),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {}, "a token sees 24 tokens .* in texts of up to 256"),
    ("mistral", {"max_seq_len": None}, "whatever its length"),
    ("qwen2", {"sliding_window": 8, "window_layers": (1,)}, "sees 8 tokens"),
    ("llama", {"unrotated_layers": (1,)}, "layers 1 are without positions"),
    ("smollm3", {"unrotated_layers": None}, "layers none are without positions"),
    ("llama", {"head_norms": True}, "are normalised"),
    ("qwen3", {"head_norms": None}, "not normalised"),
    ("qwen2", {"biases": ("wq", "wo")}, "wo have a bias"),
    ("qwen2", {"n_heads": 2}, "2 heads of 16 are not 64 wide"),
    ("qwen3", SCALED, "divisors .rope_scaling llama3"),
    ("llama", {**YARN, "rope_truncate": False}, "rope_truncate"),
    ("gemma2", {"query_pre_attn_scalar": 17.0}, "query_pre_attn_scalar is 17, there 16"),
    ("gemma2", {"attn_logit_softcapping": None}, "not capped"),
    ("gemma2", {"tie_word_embeddings": False}, "head is not the embedding"),
    ("gemma2", {"sliding_window": None, "window_layers": None}, "no layer has a window"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "scores are capped"),
    ("gemma3", {"head_norms": None}, "not normalised"),
    ("gemma3", {"rope_factor": 8.0, "sliding_rope_theta": None}, "with a window too"),
    ("phi3", {"n_heads": 2}, "2 heads of 16 are not 64 wide"),
    ("olmo2", {"tie_word_embeddings": True}, "its head is the embedding"),
    ("olmo2", {"attention_bias": True}, "have a bias"),
]


def shapes_of(component: Any, args: Any) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a model in GGUF, by name."""
    ours = {
        name: LazyTensor(p.shape, "float32", lambda: None)  # type: ignore[arg-type, return-value]  # not read
        for name, p in parameters(component.spec.build(args)).items()
    }
    table = {entry.name: entry for entry in foreign_table(component, "gguf", args)}
    return {name: t.shape for name, t in foreign_tensors(component, ours, table).items()}


@pytest.mark.parametrize(("family", "more"), SAID, ids=lambda value: str(value)[:60])
def test_what_is_written_is_read_as_the_same(family: str, more: dict[str, Any]) -> None:
    component = small_models.REGISTRY.find("architecture", small_models.FAMILIES[family][0])
    args = dataclasses.replace(small_models.args_of(family), **more)
    layout = component.spec.layouts["gguf"]
    config = layout.write(args)
    again = layout.read(config, shapes_of(component, args))
    if family == "mistral":  # a llama there, and no text is longer than the window
        args = dataclasses.replace(args, model_type="llama", sliding_window=None)
    if args.max_seq_len is None:
        assert "llama.context_length" not in config
    if getattr(args, "rope_scaling", None) in ("llama3", "divisors"):
        assert turning(again) == pytest.approx(turning(args), rel=1e-12)
        fields = [f.name for f in dataclasses.fields(args) if f.name.startswith("rope_")]
        args = dataclasses.replace(args, **{name: getattr(again, name) for name in fields})
    if getattr(args, "rope_scaling", None) == "yarn":
        assert again.rope_attention_factor == pytest.approx(1.3, rel=1e-12)
        again = dataclasses.replace(again, rope_attention_factor=1.3)
    assert again == args


@pytest.mark.parametrize(("family", "more", "what"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, more: dict[str, Any], what: str
) -> None:
    component = small_models.REGISTRY.find("architecture", small_models.FAMILIES[family][0])
    args = dataclasses.replace(small_models.args_of(family), **more)
    with pytest.raises(ModelError, match=what) as caught:
        component.spec.layouts["gguf"].write(args)
    assert "\n" not in str(caught.value) and "llama.cpp" in str(caught.value)
