"""The CPU's ways of computing give what MLX's plain operations give, and so do their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from mlxlora_core.machine import device
from mlxlora_core.machine.device import on_cpu
from mlxlora_core.model import ops

pytestmark = pytest.mark.skipif(not on_cpu(), reason="elsewhere these are MLX's own operations")


@pytest.fixture(autouse=True, params=["MLX's power", "a runtime's"])
def exponential(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each test with and without an exponential of a runtime; numpy's tells how often it was called."""
    calls: list[int] = []

    def exp(x: mx.array) -> mx.array:
        calls.append(x.size)
        with np.errstate(over="ignore", under="ignore"):
            return mx.array(np.exp(np.array(x)))

    others = {name: function for name, function in device._lent.items() if name != "exp"}
    monkeypatch.setattr(device, "_lent", others | ({"exp": exp} if request.param == "a runtime's" else {}))
    return calls


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def value_and_gradients(function: Callable[..., mx.array], *arguments: Any) -> list[Any]:
    """The value and the gradient of a weighted sum of it, by every argument."""
    arrays = [mx.array(a) for a in arguments]
    value = function(*arrays)
    weights = mx.array(normal(*value.shape, seed=9))
    gradient = mx.grad(lambda *a: (function(*a) * weights).sum(), argnums=tuple(range(len(arrays))))
    gradients = gradient(*arrays)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return [np.array(x) for x in (value, *gradients)]


def torch_gradients(function: Callable[..., torch.Tensor], *arguments: Any) -> list[Any]:
    """The same by torch in float64."""
    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arguments]
    value = function(*tensors)
    (value * torch.tensor(normal(*value.shape, seed=9))).sum().backward()
    return [value.detach().numpy(), *(t.grad.numpy() for t in tensors if t.grad is not None)]


def agree(got: list[Any], want: list[Any], bound: float = 1e-5) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= bound * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0, 1000.0])
def test_silu_times(scale: float) -> None:
    gate, up = normal(70, 80, scale=scale), normal(70, 80, seed=1)
    assert gate.size >= ops.LARGE
    want = torch_gradients(lambda g, u: torch.nn.functional.silu(g) * u, gate, up)
    agree(value_and_gradients(ops.silu_times, gate, up), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_silu_times_rounds_half_precision_where_torch_does(dtype: str) -> None:
    """Computed in half precision throughout, one number in four would differ from torch's."""
    kind, torch_kind = getattr(mx, dtype), getattr(torch, dtype)
    ours = [mx.array(normal(70, 80, scale=3.0, seed=seed)).astype(kind) for seed in range(3)]
    gate, up, dy = (
        torch.tensor(np.array(x.astype(mx.float32))).to(torch_kind).requires_grad_() for x in ours
    )
    value = torch.nn.functional.silu(gate) * up
    value.backward(dy)
    [y], gradients = mx.vjp(ops.silu_times, ours[:2], ours[2:])
    for got, want in zip((y, *gradients), (value, gate.grad, up.grad), strict=True):
        assert got.dtype == kind and want is not None
        other = np.array(got.astype(mx.float32)) != want.detach().float().numpy()
        assert other.mean() < 0.02


@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
def test_gelu_times(scale: float) -> None:
    gate, up = normal(4, 30, 20, scale=scale), normal(4, 30, 20, seed=1)
    want = torch_gradients(lambda g, u: torch.nn.functional.gelu(g, approximate="tanh") * u, gate, up)
    agree(value_and_gradients(ops.gelu_times, gate, up), want)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_rms_norm(scale: float) -> None:
    x, weight = normal(3, 50, 96, scale=scale), normal(96, seed=1)
    want = torch_gradients(lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w, x, weight)
    agree(value_and_gradients(lambda x, w: ops.rms_norm(x, w, 1e-5), x, weight), want)


@pytest.mark.parametrize("offset", [0, 90, 30000])
@pytest.mark.parametrize("length", [1, 2, 30])
@pytest.mark.parametrize("copied", [True, False])
def test_rotate(offset: int, length: int, copied: bool) -> None:
    """As complex numbers times those on the unit circle; from a view of (B, T, H, E) too."""
    x = normal(2, length, 6, 16)
    angle = np.arange(offset, offset + length)[:, None] * 500.0 ** (-np.arange(0, 16, 2) / 16)
    circle = torch.polar(torch.ones(length, 8, dtype=torch.float64), torch.tensor(angle))

    def reference(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.transpose(1, 2).contiguous().unflatten(-1, (8, 2)))
        return torch.view_as_real(pairs * circle).flatten(-2)

    def ours(x: mx.array) -> mx.array:
        x = x.swapaxes(1, 2)
        return ops.rotate(mx.contiguous(x) if copied else x, offset, 500.0)

    agree(value_and_gradients(ours, x), torch_gradients(reference, x), 1e-6)


@pytest.mark.parametrize("length", [1, 30])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rotate_by_listed_angles(length: int, factor: float) -> None:
    """One angle of its own for each pair, one of them none, and all of it made longer."""
    x, angles = normal(2, 6, length, 16), (1.0, 0.5, 0.3, 0.0, 0.01, 3.0, 1e-4, 0.07)
    turns = np.arange(7, 7 + length)[:, None] * np.array(angles)
    circle = torch.polar(torch.full((length, 8), factor, dtype=torch.float64), torch.tensor(turns))

    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (8, 2))) * circle).flatten(-2)

    want = torch_gradients(reference, x)
    agree(value_and_gradients(lambda x: ops.rotate(x, 7, angles, factor), x), want, 1e-6)
    for dtype, bound in ((mx.float16, 4e-3), (mx.bfloat16, 3e-2)):  # as MLX's own operation has it
        got = ops.rotate(mx.array(x).astype(dtype), 7, angles, factor)
        assert got.dtype == dtype
        agree([np.array(got.astype(mx.float32))], want[:1], bound)


def test_listed_angles_of_a_base_are_those_of_the_base() -> None:
    x, angles = mx.array(normal(2, 6, 30, 16)), tuple(500.0 ** (-2 * pair / 16) for pair in range(8))
    assert mx.array_equal(ops.rotate(x, 90, 500.0), ops.rotate(x, 90, angles)).item()


@pytest.mark.parametrize("vocabulary", [64, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cross_entropy(vocabulary: int, scale: float) -> None:
    logits = normal(80, vocabulary, scale=scale)
    targets = np.random.default_rng(1).integers(0, vocabulary, 80)

    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(x, torch.tensor(targets), reduction="sum")

    agree(
        value_and_gradients(lambda x: ops.cross_entropy(x, mx.array(targets)), logits),
        torch_gradients(reference, logits),
    )


@pytest.mark.parametrize("kind", ["causal", "window", "none", "cached"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [24, 150])
def test_attention(kind: str, kv_heads: int, length: int) -> None:
    """150 queries are three tiles where they are causal, the last one of 22."""
    seen = length + 16 if kind == "cached" else length
    queries, keys = normal(2, 4, length, 24), normal(2, kv_heads, seen, 24, seed=1)
    values = normal(2, kv_heads, seen, 24, seed=2)
    assert queries.size >= ops.LARGE
    place = np.arange(seen - length, seen)[:, None] - np.arange(seen)
    masks = {"window": (place >= 0) & (place < 7), "none": None}
    visible = masks.get(kind, place >= 0)
    mask = "causal" if kind in ("causal", "cached") else None if visible is None else mx.array(visible)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attended = None if visible is None else torch.tensor(visible)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attended, scale=0.2, enable_gqa=True)

    agree(
        value_and_gradients(lambda q, k, v: ops.attention(q, k, v, 0.2, mask), queries, keys, values),
        torch_gradients(reference, queries, keys, values),
    )


#: form -> shape of a mask, from B, H, T and S
FORMS: dict[str, Callable[..., tuple[int, ...]]] = {
    "keys": lambda B, H, T, S: (S,),
    "one": lambda B, H, T, S: (1, 1),
    "queries": lambda B, H, T, S: (T, 1),
    "queries and keys": lambda B, H, T, S: (T, S),
    "heads, queries and keys": lambda B, H, T, S: (H, T, S),
    "heads": lambda B, H, T, S: (H, 1, 1),
    "heads and keys": lambda B, H, T, S: (B, H, 1, S),
    "rows of padding": lambda B, H, T, S: (B, 1, 1, S),
    "rows": lambda B, H, T, S: (B, 1, T, S),
    "whole": lambda B, H, T, S: (B, H, T, S),
}


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The formula as it stands, every kv head repeated for its queries."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return ((q @ k.transpose(-1, -2)) * 0.3 + bias).softmax(dim=-1) @ v


@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["booleans", "float32", "float16", "-inf"])
@pytest.mark.parametrize("form", FORMS)
def test_attention_takes_every_form_of_mask_on_every_path(
    form: str, kind: str, kv_heads: int, length: int
) -> None:
    """With the gradient of all that is not boolean; 20 queries go MLX's own way, 40 ours."""
    seen = length + 6
    q, k, v = normal(2, 4, length, 16), normal(2, kv_heads, seen, 16, seed=1), normal(2, kv_heads, seen, 16)
    assert (q.size >= ops.LARGE) == (length == 40)
    shape = FORMS[form](2, 4, length, seen)
    numbers = normal(*shape, seed=3, scale=2.0).astype(np.float16).astype(np.float32)
    sees = numbers > -1
    sees[..., 0] = True
    if kind in ("booleans", "-inf"):
        bias = np.where(sees, 0.0, -np.inf)
        mask = mx.array(sees) if kind == "booleans" else mx.array(bias.astype(np.float32))
        want = torch_gradients(lambda q, k, v: plain_attention(q, k, v, torch.tensor(bias)), q, k, v)
        agree(value_and_gradients(lambda q, k, v: ops.attention(q, k, v, 0.3, mask), q, k, v), want)
        return
    want = torch_gradients(plain_attention, q, k, v, numbers)
    dtype = mx.float16 if kind == "float16" else mx.float32

    def ours(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
        return ops.attention(q, k, v, 0.3, mask.astype(dtype))

    got = value_and_gradients(ours, q, k, v, numbers)
    agree(got[:4], want[:4])
    # A mask of one number sums 14720 terms that cancel to nothing, each rounded.
    agree(got[4:], want[4:], 1e-2 if kind == "float16" else 1e-4)


@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_query_that_sees_no_key_gets_the_mean_of_all_values(kv_heads: int, length: int) -> None:
    q, k, v = (mx.array(normal(2, heads, length, 16, seed=heads)) for heads in (4, kv_heads, kv_heads))
    sees = mx.arange(length)[:, None] != 3
    got = np.array(ops.attention(q, k, v, 0.3, sees))
    assert np.allclose(got[:, :, 3], np.array(v.mean(axis=2, keepdims=False)), atol=1e-6)
    assert np.allclose(
        got, np.array(mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=sees)), atol=1e-5
    )


@pytest.mark.parametrize("length", [1, 20, 40])
@pytest.mark.parametrize(
    ("mask", "got"),
    [
        ("windowed", "'windowed'"),
        (3, "3"),
        ([[True]], "[[True]]"),
        (mx.zeros((1, 1, 1, 1, 1)), "float32 (1, 1, 1, 1, 1)"),
        (mx.zeros((7, 1)), "float32 (7, 1)"),
        (mx.zeros((3, 1, 1)) > 0, "bool (3, 1, 1)"),
        (mx.zeros((1, 1), mx.complex64), "complex64 (1, 1)"),
    ],
)
def test_another_mask_is_refused_on_every_path(length: int, mask: Any, got: str) -> None:
    q = mx.zeros((2, 4, length, 16))
    with pytest.raises(ValueError) as caught:
        ops.attention(q, q, q, 0.3, mask)
    shape = (2, 4, length, length)
    wanted = "None, 'causal', Rows, or booleans or float32 that broadcast to (B, H, T, S)"
    assert f"mask is {got}, wanted {wanted} = {shape}" in str(caught.value)


def test_a_mask_of_a_wider_type_than_the_result_is_refused() -> None:
    q = mx.zeros((2, 4, 20, 16), mx.float16)
    assert ops.attention(q, q, q, 0.3, mx.zeros((20, 20), mx.float16)).dtype == mx.float16
    with pytest.raises(ValueError, match=r"mask is float32 \(20, 20\), wanted .* float16 that broadcast"):
        ops.attention(q, q, q, 0.3, mx.zeros((20, 20)))


@pytest.mark.parametrize("length", [1, 20, 40])
def test_heads_that_cannot_share_are_refused(length: int) -> None:
    q, k = mx.zeros((2, 5, length, 32)), mx.zeros((2, 2, length, 32))
    with pytest.raises(ValueError, match="5 heads of queries cannot share 2 of keys"):
        ops.attention(q, k, k, 0.3, None)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_of_one_token(kv_heads: int) -> None:
    """It sees every key, out of buffers that hold room for more."""
    queries, keys, values = (
        normal(2, 4, 1, 24),
        normal(2, kv_heads, 40, 24),
        normal(2, kv_heads, 40, 24, seed=1),
    )

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k[:, :, :33], v[:, :, :33]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2, enable_gqa=True)

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return ops.attention(q, k[:, :, :33], v[:, :, :33], 0.2, None)

    agree(value_and_gradients(ours, queries, keys, values), torch_gradients(reference, queries, keys, values))


@pytest.mark.parametrize("seed", range(3))
def test_attention_where_one_score_towers_over_the_others(seed: int) -> None:
    """Scores in the hundreds: what is far below the highest counts for nothing, and nothing overflows."""
    queries, keys, values = (normal(1, 2, 80, 32, seed=seed + i, scale=10.0) for i in range(3))

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)

    agree(
        value_and_gradients(lambda q, k, v: ops.attention(q, k, v, 0.2, "causal"), queries, keys, values),
        torch_gradients(reference, queries, keys, values),
        1e-4,
    )


def test_small_and_half_precision_arrays_take_mlx_own_way() -> None:
    gate = mx.array(normal(3, 5))
    assert mx.allclose(ops.silu_times(gate, gate), nn.silu(gate) * gate, atol=1e-6)
    half = mx.array(normal(80, 80)).astype(mx.float16)
    assert ops.silu_times(half, half).dtype == mx.float16


def test_the_exponential_of_a_runtime_is_taken_whatever_the_size(
    exponential: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number has the same bits among few as among many."""
    monkeypatch.delitem(device._lent, "layers", raising=False)  # it would take its place
    large, small = mx.array(normal(70, 80)), mx.array(normal(3, 5))
    for gate in (small, large):
        mx.eval(ops.silu_times(gate, gate))
    assert exponential == ([small.size, large.size] if "exp" in device._lent else [])
