"""The conformance suite of quantizers.

Subclass :class:`QuantizerSuite` in a test file and run it with pytest::

    class TestMyQuantizer(QuantizerSuite):
        spec = my_plugin.QUANTIZER
        option_sets = ({"bits": 4}, {"bits": 8})
        left_alone = ((8, 60),)

        def error_bound(self, weight, packed, options): ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core.model.linears import QuantizedLinear, dense_weight, linear_shape
from mlxlora_core.options import parse, plain
from mlxlora_core.specs import Quantizer, QuantizerOptions

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def _outliers(draw: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    weight = draw.normal(0, 0.01, shape)
    weight[:, ::37] *= 1000
    return weight


#: weights that a quantizer may meet, by what is special about them
WEIGHTS: Mapping[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda draw, shape: draw.normal(0, 0.02, shape),
    "far from zero": lambda draw, shape: 1 + draw.uniform(0, 0.1, shape),
    "symmetric": lambda draw, shape: draw.choice([-0.5, 0.5], shape),
    "all zero": lambda draw, shape: np.zeros(shape),
    "all equal": lambda draw, shape: np.full(shape, -0.3),
    "one outlier a group": _outliers,
    "tiny": lambda draw, shape: draw.uniform(-1e-7, 1e-7, shape),
    "denormal": lambda draw, shape: draw.uniform(-1e-40, 1e-40, shape),
    "large": lambda draw, shape: draw.uniform(-65000, 65000, shape),
}


class QuantizerSuite:
    """What every quantizer must do.

    Attributes:
        spec: the quantizer.
        option_sets: option values to try.
        shape: (outputs, inputs) of a linear that it quantizes with any of them.
        left_alone: shapes of linears that it leaves as they are with any of them.
    """

    spec: Quantizer
    option_sets: Sequence[Mapping[str, Any]] = ({},)
    shape: tuple[int, int] = (24, 256)
    left_alone: Sequence[tuple[int, int]] = ()

    def error_bound(self, weight: np.ndarray, packed: nn.Module, options: Any) -> np.ndarray:
        """The most that each dequantized weight may differ from the original.

        Args:
            weight: the original, (outputs, inputs), float32.
            packed: what the quantizer made of it.
            options: that it was made with.

        Returns:
            An array that broadcasts against ``weight``.
        """
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try every set of options."""
        if "options" in metafunc.fixturenames:
            sets = [parse(self.spec.options, values, owner=self.spec.name) for values in self.option_sets]
            metafunc.parametrize("options", sets, ids=[str(dict(values)) for values in self.option_sets])

    # --- what the tests are made of ---

    def linear(self, kind: str = "normal", dtype: mx.Dtype = mx.float32, bias: bool = False) -> nn.Linear:
        """A dense linear, the same every time."""
        outputs, inputs = self.shape
        draw = np.random.default_rng(7)
        linear = nn.Linear(inputs, outputs, bias=bias)
        linear.weight = mx.array(WEIGHTS[kind](draw, self.shape).astype(np.float32)).astype(dtype)
        if bias:
            linear.bias = mx.array(draw.normal(0, 1, outputs).astype(np.float32)).astype(dtype)
        return linear

    def packed(self, linear: nn.Linear, options: Any) -> nn.Module:
        """``linear`` quantized, which must not be refused."""
        packed = self.spec.quantize(linear, options)
        assert packed is not None, "the quantizer left alone what it should quantize"
        return packed

    # --- the tests ---

    def test_options(self, options: Any) -> None:
        """They say whether the head is quantized, and come back from config.json as they were."""
        assert isinstance(options, QuantizerOptions)
        stated = {k: v for k, v in plain(options).items() if k not in plain(QuantizerOptions())}
        again = parse(self.spec.options, stated, owner=self.spec.name)
        assert again == dataclasses.replace(options, head=QuantizerOptions().head)

    @pytest.mark.parametrize("bias", [False, True])
    def test_shapes(self, options: Any, bias: bool) -> None:
        """The result is a linear of the same shape in fewer bytes."""
        linear = self.linear(bias=bias)
        packed = self.packed(linear, options)
        assert isinstance(packed, QuantizedLinear)
        assert packed.shape == linear_shape(packed) == self.shape
        assert dense_weight(packed).shape == self.shape
        assert ("bias" in packed) == bias
        parameters = _parameters(packed)
        assert sum(array.nbytes for array in parameters.values()) < linear.weight.nbytes
        # What tells a quantized linear from a dense one in a weight file.
        assert parameters.keys() - {"weight", "bias"}

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", WEIGHTS)
    def test_error_is_bounded(self, options: Any, kind: str, dtype: str) -> None:
        """Every weight is as near as the quantizer promises, whatever the weights are like."""
        linear = self.linear(kind, DTYPES[dtype])
        weight = np.array(linear.weight.astype(mx.float32))
        packed = self.packed(linear, options)
        for name, array in _parameters(packed).items():
            assert bool(mx.isfinite(array).all()), f"{name} is not finite"
        error = np.abs(np.array(dense_weight(packed).astype(mx.float32)) - weight)
        assert np.isfinite(error).all()
        over = error - self.error_bound(weight, packed, options)
        assert over.max() <= 0, f"by {over.max()}"

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [False, True])
    def test_comes_back_from_a_file(self, options: Any, bias: bool, dtype: str, tmp_path: Path) -> None:
        """Restored and filled from a file, it gives the same outputs, bit for bit."""
        packed = self.packed(self.linear(bias=bias, dtype=DTYPES[dtype]), options)
        saved = _parameters(packed)
        mx.save_safetensors(str(tmp_path / "linear.safetensors"), saved)
        again = self.spec.restore(self.shape, bias, options)
        assert linear_shape(again) == self.shape
        empty = _parameters(again)
        assert {n: a.shape for n, a in empty.items()} == {n: a.shape for n, a in saved.items()}
        loaded = mx.load(str(tmp_path / "linear.safetensors"))
        assert isinstance(loaded, dict)
        again.update(tree_unflatten(list(loaded.items())))
        for rows in (1, 5):
            x = self._inputs(rows)
            assert np.array_equal(np.array(again(x)), np.array(packed(x)))

    @pytest.mark.parametrize("bias", [False, True])
    def test_multiplies_by_what_it_dequantizes_to(self, options: Any, bias: bool) -> None:
        """Outputs, and the gradient of the inputs, are those of the dequantized weight."""
        linear = self.linear(bias=bias)
        packed = self.packed(linear, options)
        weight = dense_weight(packed).astype(mx.float32)
        for shape in ((1,), (1, 1), (2, 3)):
            x = self._inputs(*shape)
            towards = mx.random.normal((*shape, self.shape[0]), key=mx.random.key(1))
            want = x @ weight.T + (linear.bias if bias else 0)
            (got,), (slope,) = mx.vjp(lambda x: packed(x), [x], [towards])
            assert got.shape == want.shape
            assert got.dtype == x.dtype
            assert _apart(got, want) <= 1e-5
            assert _apart(slope, towards @ weight) <= 1e-5

    def test_leaves_alone_what_does_not_fit(self, options: Any) -> None:
        """A linear of a shape that it cannot quantize stays dense, and is not touched."""
        for outputs, inputs in self.left_alone:
            linear = nn.Linear(inputs, outputs)
            before = np.array(linear.weight)
            assert self.spec.quantize(linear, options) is None
            assert np.array_equal(np.array(linear.weight), before)

    def test_same_bits_every_time(self, options: Any) -> None:
        """The same weights give the same parameters."""
        first, second = (_parameters(self.packed(self.linear(), options)) for _ in range(2))
        assert first.keys() == second.keys()
        assert all(mx.array_equal(first[name], second[name]) for name in first)

    def _inputs(self, *rows: int) -> mx.array:
        return mx.random.normal((*rows, self.shape[1]), key=mx.random.key(0))


def _apart(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max())


def _parameters(module: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))
