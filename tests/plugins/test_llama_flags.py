"""What sets the families of the ``llama`` architecture apart, each flag against torch in float64."""

from __future__ import annotations

import math
from typing import Any

import llama_torch
import mlx.core as mx
import mlxlora_llama
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlxlora_llama import mlxlora_architectures
from mlxlora_llama.config import ModelArgs
from mlxlora_llama.rope import turning

from mlxlora_core.errors import ModelError
from mlxlora_core.model.architectures import folder_args
from mlxlora_core.options import plain

pytestmark = pytest.mark.usefixtures("one_torch_thread")

(SPEC,) = mlxlora_architectures()
BASE = {
    "model_type": "llama",
    "dim": 32,
    "n_layers": 4,
    "head_dim": 8,
    "hidden_dim": 40,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "rope_theta": 100.0,
    "vocab_size": 50,
}
LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_original_len": 16,
    "rope_low_freq_factor": 0.5,
    "rope_high_freq_factor": 2.0,
}
YARN = {
    "rope_scaling": "yarn",
    "rope_factor": 4.0,
    "rope_original_len": 16,
    "rope_beta_fast": 3.0,
    "rope_beta_slow": 0.5,
    "rope_attention_factor": 1.2,
}
FLAGS: dict[str, dict[str, Any]] = {
    "a window in some layers": {"sliding_window": 5, "window_layers": (1, 3)},
    "a window in no layer but the last": {"sliding_window": 1, "window_layers": (3,)},
    "layers without positions": {"unrotated_layers": (0, 3)},
    "biases of Qwen 2": {"biases": ("wq", "wk", "wv")},
    "every bias": {"biases": ("wq", "wk", "wv", "wo", "w1", "w2", "w3")},
    "norms of heads": {"head_norms": True, "head_dim": 12},
    "linear": {"rope_scaling": "linear", "rope_factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn at fractions of a pair": {**YARN, "rope_truncate": False},
    "divisors": {"rope_scaling": "divisors", "rope_divisors": (1.0, 1.5, 4.0, 8.0)},
    "all of it": {
        **YARN,
        "sliding_window": 6,
        "window_layers": (0, 2),
        "unrotated_layers": (1, 2),
        "biases": ("wk", "wo", "w2"),
        "head_norms": True,
    },
}
TOKENS = 32


def model_of(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    model: Any = mlxlora_llama.build(ModelArgs(**config, tie_word_embeddings="output.weight" not in weights))
    model.load_weights([(name, mx.array(w.float().numpy())) for name, w in weights.items()])
    return model


def both(flags: dict[str, Any], tied: bool = False) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """Our model, the reference's weights in float64, the same numbers in both, and the config."""
    config = BASE | flags
    weights = {n: w.double() for n, w in llama_torch.random_weights(config, tied=tied).items()}
    return model_of(config, weights), weights, config


def some_ids(rows: int = 2, tokens: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(3).integers(0, BASE["vocab_size"], (rows, tokens))


def far(got: mx.array, want: torch.Tensor) -> float:
    """How far apart two results are, as a part of the largest number."""
    exact = want.detach().numpy()
    return float(np.abs(np.array(got) - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize("name", FLAGS)
def test_logits_are_those_of_torch(name: str) -> None:
    tied = name in ("biases of Qwen 2", "norms of heads", "all of it")
    model, weights, config = both(FLAGS[name], tied)
    want = llama_torch.logits(weights, torch.from_numpy(some_ids()), config)
    assert far(model(mx.array(some_ids())), want) < 1e-5
    plainly = {k: config[k] for k in BASE}
    if set(weights) == set(llama_torch.shapes(plainly, tied=tied)):  # the flag itself counts
        other = llama_torch.logits(weights, torch.from_numpy(some_ids()), plainly)
        assert float((want - other).abs().max() / other.abs().max()) > 1e-2


@pytest.mark.parametrize("name", FLAGS)
def test_decoding_with_the_cache_is_the_full_forward(name: str) -> None:
    """A prompt in two parts, longer than the window and the original length, then token by token."""
    model, weights, config = both(FLAGS[name])
    ids, cache = some_ids(), model.make_cache()
    parts = [model(mx.array(ids[:, :20]), cache=cache), model(mx.array(ids[:, 20:29]), cache=cache)]
    parts += [model(mx.array(ids[:, i : i + 1]), cache=cache) for i in range(29, TOKENS)]
    want = llama_torch.logits(weights, torch.from_numpy(ids), config)
    assert far(mx.concatenate(parts, axis=1), want) < 1e-5


def test_gradients_are_those_of_autograd() -> None:
    """Of every weight, with all flags at once and arrays that take the ways of a CPU."""
    model, weights, config = both({**FLAGS["all of it"], "n_layers": 3, "unrotated_layers": (2,)})
    ids = some_ids(4, 60)
    slope = np.random.default_rng(4).standard_normal((4, 60, BASE["vocab_size"]))

    def ours(parameters: Any) -> mx.array:
        model.update(parameters)
        return (model(mx.array(ids)) * mx.array(slope.astype(np.float32))).sum()

    got = dict(tree_flatten(mx.grad(ours)(model.trainable_parameters())))
    leaves = {name: w.requires_grad_() for name, w in weights.items()}
    (llama_torch.logits(leaves, torch.from_numpy(ids), config) * torch.from_numpy(slope)).sum().backward()
    assert got.keys() == leaves.keys()
    for name, leaf in leaves.items():
        if name.endswith("wk.bias") and ".2." in name:
            continue  # without positions, what is added to every key changes no weight: noise around 0
        assert leaf.grad is not None and leaf.grad.abs().max() > 1e-2, name
        assert far(got[name], leaf.grad) < 1e-4, name


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn", "yarn at fractions of a pair", "divisors"])
@pytest.mark.parametrize("width", [8, 64, 128])
def test_frequencies_are_those_of_the_formula(name: str, width: int) -> None:
    config = {**BASE, **FLAGS[name], "head_dim": width, "rope_theta": 5e5}
    if "rope_original_len" in config:
        config |= {"rope_original_len": 8192, "rope_beta_fast": 32.0} if name[0] == "y" else {}
    if name == "divisors":
        config["rope_divisors"] = tuple(1.0 + n for n in range(width // 2))
    got = turning(ModelArgs(**config))
    assert isinstance(got, tuple)
    np.testing.assert_allclose(got, llama_torch.frequencies(config)[0].numpy(), rtol=1e-12)
    plain = llama_torch.frequencies({**config, "rope_scaling": None})[0].numpy()
    assert len(set(np.round(np.array(got) / plain, 9))) >= (1 if name == "linear" else 2)


def test_llama_3_1_keeps_divides_and_blends_as_published() -> None:
    """A wavelength below 8192 / 4 is kept, one above 8192 divided by 8, those between are blends."""
    numbers = {
        "rope_factor": 8.0,
        "rope_original_len": 8192,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
    }
    args = ModelArgs(**{**BASE, "head_dim": 128, "rope_theta": 5e5, "rope_scaling": "llama3", **numbers})
    angles = turning(args)
    assert isinstance(angles, tuple)
    waves = [2 * math.pi * 5e5 ** (pair / 64) for pair in range(64)]
    ratios = [5e5 ** (-pair / 64) / angle for pair, angle in enumerate(angles)]
    assert all(abs(r - 1) < 1e-12 for r, wave in zip(ratios, waves, strict=True) if wave < 2048)
    assert all(abs(r - 8) < 1e-12 for r, wave in zip(ratios, waves, strict=True) if wave > 8192)
    assert ratios == sorted(ratios) and {round(r, 6) for r in ratios} > {1.0, 8.0}


def test_a_model_without_flags_says_nothing_of_them() -> None:
    """So folders written before keep their config, and what is fingerprinted of it."""
    told = {key: value for key, value in plain(ModelArgs(**BASE)).items() if value is not None}
    assert told.keys() == BASE.keys() | {"tie_word_embeddings"}


@pytest.mark.parametrize("name", FLAGS)
def test_the_flags_come_back_from_a_config(name: str) -> None:
    args = ModelArgs(**BASE, **{k: v for k, v in FLAGS[name].items() if k not in BASE})
    written = {key: value for key, value in plain(args).items() if value is not None}
    assert folder_args(SPEC, written) == args


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"window_layers": [1]}, "window_layers: there is no sliding_window"),
        ({"sliding_window": 4, "window_layers": [4]}, "window_layers: wanted different numbers below"),
        ({"unrotated_layers": [1, 1]}, "unrotated_layers: wanted different numbers below n_layers 4"),
        ({"unrotated_layers": [-1]}, "unrotated_layers: must be at least 0"),
        ({"biases": ["wq", "output"]}, "biases: must be one of wq, wk, wv, wo, w1, w2, w3"),
        ({"biases": ["wq", "wq"]}, "biases: wanted different names"),
        ({"rope_scaling": "su"}, "rope_scaling: must be one of linear, llama3, yarn, divisors, got 'su'"),
        ({"rope_scaling": "linear"}, "rope_factor: rope_scaling linear needs it"),
        ({"rope_factor": 2.0}, "rope_factor: rope_scaling None has no use for it"),
        ({**LLAMA3, "rope_truncate": True}, "rope_truncate: rope_scaling llama3 has no use for it"),
        ({**LLAMA3, "rope_low_freq_factor": 2.0}, "rope_high_freq_factor: wanted more than 2.0"),
        ({**YARN, "rope_beta_slow": 3.0}, "rope_beta_fast: wanted more than 3.0"),
        ({**YARN, "rope_theta": 1.0}, "rope_theta: got 1.0, rope_scaling yarn needs more than 1"),
        ({"rope_scaling": "divisors", "rope_divisors": [1.0]}, "rope_divisors: got 1, wanted head_dim / 2"),
        ({"rope_scaling": "divisors", "rope_divisors": [0.0] * 4}, "rope_divisors: must be at least 0.001"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError) as caught:
        folder_args(SPEC, BASE | flags)
    assert told in caught.value.what
