"""The numbers of the llama architecture, held against torch and against the formulas."""

from __future__ import annotations

from typing import Any

import llama_torch
import mlx.core as mx
import mlx.nn as nn
import mlxlora_llama
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core.ops import RMSNorm, attention_mask, rotate

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BASE = {
    "dim": 32,
    "n_layers": 3,
    "head_dim": 8,
    "hidden_dim": 40,
    "n_heads": 4,
    "n_kv_heads": 4,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "vocab_size": 50,
}
LLAMA = {**BASE, "n_kv_heads": 2, "rope_theta": 5e5}
MISTRAL = {**BASE, "n_kv_heads": 1, "sliding_window": 7, "rope_theta": 1e6}
CONFIGS = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "one head for each query": BASE,
    "narrow heads": {**LLAMA, "head_dim": 2},
    "wide heads": {**MISTRAL, "head_dim": 20, "n_heads": 3, "n_kv_heads": 3},
    "a window of one": {**MISTRAL, "sliding_window": 1},
    "a window of all but one": {**MISTRAL, "sliding_window": 23},
    "a window that is never full": {**MISTRAL, "sliding_window": 24},
    "large eps": {**LLAMA, "norm_eps": 0.05},
}
TOKENS = 24


def both(config: dict[str, Any], tied: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    """Our model and the reference's weights, the same numbers in both."""
    weights = llama_torch.random_weights(config, tied=tied)
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    model: Any = mlxlora_llama.build(mlxlora_llama.read(config, shapes))
    model.load_weights([(name, mx.array(w.numpy())) for name, w in weights.items()])
    return model, weights


def some_ids(rows: int = 2, tokens: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(3).integers(0, BASE["vocab_size"], (rows, tokens))


def close(got: mx.array, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.array(got), want.detach().numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_torch(name: str, tied: bool) -> None:
    model, weights = both(CONFIGS[name], tied)
    ids = some_ids()
    want = llama_torch.logits(weights, torch.from_numpy(ids), CONFIGS[name])
    assert want.std() > 0.5  # logits that say something
    close(model(mx.array(ids)), want)


@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=["llama", "mistral"])
def test_large_arrays_are_computed_alike(config: dict[str, Any]) -> None:
    """On a CPU, scores and gates of more than 2¹⁶ numbers take another path; so do their gradients."""
    config = {**config, "n_layers": 1, "hidden_dim": 400}
    model, weights = both(config)
    ids = some_ids(2, 100)
    embedded = weights["tok_embeddings.weight"][torch.from_numpy(ids)].requires_grad_()
    want = llama_torch.run(weights, embedded, config)
    want.square().sum().backward()
    entering = mx.array(embedded.detach().numpy())
    close(model.run(entering), want)
    assert embedded.grad is not None
    scale = float(embedded.grad.abs().max())
    close(mx.grad(lambda x: model.run(x).square().sum() / scale)(entering), embedded.grad / scale)


@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=["llama", "mistral"])
def test_greedy_text_is_the_same_token_for_token(config: dict[str, Any]) -> None:
    model, weights = both(config)
    prompt = some_ids(1, 5)[0].tolist()
    cache, given, text = model.make_cache(), prompt, []
    for _ in range(40):
        text.append(int(model(mx.array([given]), cache=cache)[0, -1].argmax()))
        given = text[-1:]
    assert text == llama_torch.greedy(weights, prompt, 40, config)
    assert len(set(text)) > 5


@pytest.mark.parametrize("config", [BASE | {"n_layers": 1}, MISTRAL | {"n_layers": 1, "sliding_window": 100}])
def test_the_cache_holds_when_its_buffers_grow(config: dict[str, Any]) -> None:
    """Tokens 250 to 262 are decoded one by one, over the end of the first buffer."""
    model, weights = both(config)
    ids = some_ids(1, 262)
    cache = model.make_cache()
    parts = [model(mx.array(ids[:, :250]), cache=cache)]
    parts += [model(mx.array(ids[:, i : i + 1]), cache=cache) for i in range(250, 262)]
    want = llama_torch.logits(weights, torch.from_numpy(ids), config)
    close(mx.concatenate(parts, axis=1), want)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=["llama", "mistral"])
def test_gradients_are_those_of_autograd(config: dict[str, Any], tied: bool) -> None:
    """With respect to every weight and to what enters the first layer."""
    model, weights = both(config, tied)
    ids = some_ids(2, 12)
    slope = np.random.default_rng(4).standard_normal((2, 12, BASE["vocab_size"])).astype(np.float32) / 10

    def ours(parameters: Any, hidden: mx.array) -> mx.array:
        model.update(parameters)
        return (model.head(model.run(hidden)) * mx.array(slope)).sum()

    hidden = model.embed(mx.array(ids))
    grads, into = mx.grad(ours, argnums=(0, 1))(model.trainable_parameters(), hidden)

    leaves = {name: w.double().requires_grad_() for name, w in weights.items()}
    entered = leaves["tok_embeddings.weight"][torch.from_numpy(ids)].detach().requires_grad_()
    out = llama_torch.head(leaves, llama_torch.run(leaves, entered, config), config)
    (out * torch.from_numpy(slope)).sum().backward()
    assert entered.grad is not None and entered.grad.abs().max() > 0.1
    scale = float(entered.grad.abs().max())
    close(into / scale, entered.grad / scale)
    compared = dict(tree_flatten(grads))
    assert compared.keys() == leaves.keys()
    for name, leaf in leaves.items():
        if leaf.grad is None:  # an embedding that is not the head: nothing was looked up here
            assert name == "tok_embeddings.weight" and not tied
            continue
        assert leaf.grad.abs().max() > 1e-2
        scale = float(leaf.grad.abs().max())
        close(compared[name] / scale, leaf.grad / scale)


def test_embedding_has_a_gradient() -> None:
    """Through the lookup, it adds up over the places where a token stands."""
    model, weights = both(LLAMA)
    ids = some_ids(2, 12)

    def ours(table: mx.array) -> mx.array:
        model.tok_embeddings.weight = table
        return model(mx.array(ids))[:, :, 0].sum()

    leaf = weights["tok_embeddings.weight"].requires_grad_()
    llama_torch.logits(weights, torch.from_numpy(ids), LLAMA)[:, :, 0].sum().backward()
    assert leaf.grad is not None
    close(mx.grad(ours)(mx.array(leaf.detach().numpy())), leaf.grad)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rms_norm_is_the_formula_in_float32(dtype: mx.Dtype) -> None:
    """1000 squared is no float16: were the mean not taken in float32, it would be infinite."""
    draw = np.random.default_rng(0)
    norm = RMSNorm(48, eps=1e-3)
    norm.weight = mx.array(draw.uniform(0.5, 1.5, 48)).astype(dtype)
    x = mx.array(draw.standard_normal((2, 5, 48)) * np.array([[[1000.0]], [[0.01]]])).astype(dtype)
    exact, weight = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (x, norm.weight))
    want = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-3) * weight
    got = norm(x)
    assert got.dtype == dtype
    rounding = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    np.testing.assert_allclose(np.array(got.astype(mx.float32)), want, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize(("offset", "width"), [(0, 2), (0, 16), (700, 6), (0, 300), (700, 400)])
def test_rotation_is_the_formula(offset: int, width: int, theta: float) -> None:
    """[cos -sin; sin cos] on neighbouring features, in every row and head of the batch."""
    x = np.random.default_rng(1).standard_normal((2, 3, 5, width)).astype(np.float32)
    position = np.arange(offset, offset + 5)[:, None]
    angle = position * theta ** (-np.arange(0, width, 2) / width)
    want = np.empty(x.shape)
    want[..., 0::2] = x[..., 0::2] * np.cos(angle) - x[..., 1::2] * np.sin(angle)
    want[..., 1::2] = x[..., 0::2] * np.sin(angle) + x[..., 1::2] * np.cos(angle)
    np.testing.assert_allclose(np.array(rotate(mx.array(x), offset, theta)), want, atol=2e-4)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize(("held", "tokens"), [(0, 6), (3, 2), (9, 5), (9, 2), (20, 10)])
def test_mask_shows_what_the_definition_shows(held: int, tokens: int, window: int) -> None:
    """Query i sees key j when i - window < j <= i; keys before the mask's first are seen by none."""
    whole = llama_torch.visible(held + tokens, window)[held:].numpy()
    mask = attention_mask(tokens, held, window)
    if isinstance(mask, str):
        assert mask == "causal" and window >= held + tokens
        return
    shown = np.array(mask)
    assert shown.shape == (tokens, min(held + tokens, window + tokens - 1))
    left_out = held + tokens - shown.shape[1]
    assert not whole[:, :left_out].any()
    np.testing.assert_array_equal(shown, whole[:, left_out:])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_hidden_states_keep_the_type_of_the_weights(dtype: mx.Dtype) -> None:
    model, _ = both(MISTRAL)
    ids = mx.array(some_ids())
    exact = model(ids)
    model.set_dtype(dtype)
    cache = model.make_cache()
    assert model.run(model.embed(ids), cache=cache).dtype == dtype
    logits = model(ids)
    assert logits.dtype == dtype
    far = mx.abs(logits.astype(mx.float32) - exact).max() / mx.abs(exact).max()
    assert float(far) < (0.01 if dtype == mx.float16 else 0.08)


def test_a_token_does_not_copy_what_the_cache_holds() -> None:
    """Decoding a token takes a small part of the memory that one layer's keys take."""
    held = 2000
    config = {**BASE, "n_heads": 2, "n_kv_heads": 1, "head_dim": 64, "model_type": "llama"}
    model: Any = mlxlora_llama.build(mlxlora_llama.read({**config, "tie_word_embeddings": False}, {}))
    cache = model.make_cache()
    for entry in cache:
        past = mx.random.normal((1, 1, held, 64))
        mx.eval(entry.update(past, past))
    mx.eval(model.parameters(), model(mx.array([[1]]), cache=cache))
    for token in range(20):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(model(mx.array([[token]]), cache=cache))
        assert mx.get_peak_memory() - before < held * 64 * 4 / 4


def test_build_takes_no_memory_whatever_the_size() -> None:
    """The 405 billion parameters of the largest Llama are only described."""
    config = {
        "model_type": "llama",
        "dim": 16384,
        "n_layers": 126,
        "n_heads": 128,
        "n_kv_heads": 8,
        "norm_eps": 1e-5,
        "hidden_dim": 53248,
        "vocab_size": 128256,
    }
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model: Any = mlxlora_llama.build(mlxlora_llama.read({**config, "tie_word_embeddings": False}, {}))
    assert sum(p.size for _, p in tree_flatten(model.parameters())) > 405e9
    assert mx.get_peak_memory() - before < 1e6


def test_names_are_those_of_the_checkpoint() -> None:
    model, weights = both(LLAMA)
    assert dict(tree_flatten(model.parameters())).keys() == weights.keys()
    assert model.head_path == "output"
    linears = [name for name, m in model.layers[0].named_modules() if type(m) is nn.Linear]
    inside = [*(f"attention.w{x}" for x in "qkvo"), *(f"feed_forward.w{n}" for n in (1, 2, 3))]
    assert sorted(linears) == sorted(inside)


def test_the_context_is_told() -> None:
    for given, told in ((None, None), (512, 512)):
        args = mlxlora_llama.read({**BASE, "model_type": "llama", "max_seq_len": given}, {})
        assert mlxlora_llama.build(args).context_tokens == told


def test_a_tied_head_is_no_linear() -> None:
    model, _ = both(LLAMA, tied=True)
    assert model.head_path == ""
    assert "output" not in model
    model.update(tree_unflatten([("tok_embeddings.weight", mx.zeros((50, 32)))]))
    assert float(mx.abs(model(mx.array(some_ids()))).max()) == 0
