"""The conformance suite of quantizers.

Subclass :class:`QuantizerSuite` in a test file and run it with pytest::

    class TestMyQuantizer(QuantizerSuite):
        spec = my_plugin.QUANTIZER
        option_sets = ({"bits": 4}, {"bits": 8})
        left_alone = ((8, 60),)

        def error_bound(self, weight, parts, options): ...
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora_core.files import tensor_file
from mlxlora_core.model.linears import QuantizedLinear
from mlxlora_core.options import parse, plain
from mlxlora_core.specs import Quantizer
from mlxlora_core.testing.stand_in import choice

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
        shape: (outputs, inputs) of a weight that it quantizes with any of them.
        left_alone: shapes of weights that it leaves as they are with any of them.
    """

    spec: Quantizer
    option_sets: Sequence[Mapping[str, Any]] = ({},)
    shape: tuple[int, int] = (24, 256)
    left_alone: Sequence[tuple[int, int]] = ()

    def error_bound(self, weight: np.ndarray, parts: Mapping[str, mx.array], options: Any) -> np.ndarray:
        """The most that each dequantized weight may differ from the original.

        Args:
            weight: the original, (outputs, inputs), float32.
            parts: what the quantizer made of it.
            options: that they were made with.

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

    def weight(self, kind: str = "normal", dtype: mx.Dtype = mx.float32, experts: int = 0) -> mx.array:
        """A weight, the same every time, with so many experts in front if there are any."""
        draw = np.random.default_rng(7)
        stack = [WEIGHTS[kind](draw, self.shape).astype(np.float32) for _ in range(max(experts, 1))]
        return mx.array(np.stack(stack) if experts else stack[0]).astype(dtype)

    def parts(self, weight: mx.array, options: Any) -> Mapping[str, mx.array]:
        """``weight`` quantized, which must not be refused."""
        parts = self.spec.quantize(weight, options)
        assert parts is not None, "the quantizer left alone what it should quantize"
        return parts

    def linear(self, options: Any, bias: bool = False) -> QuantizedLinear:
        """The linear that core makes of the parts of a weight."""
        added = mx.random.normal((self.shape[0],), key=mx.random.key(2)) if bias else None
        chosen = choice("quantizer", self.spec, options)
        return QuantizedLinear(chosen, self.parts(self.weight(), options), self.shape, added)

    # --- the tests ---

    def test_options_come_back(self, options: Any) -> None:
        """They come back from config.json as they were."""
        stated = json.loads(json.dumps(plain(options)))
        assert parse(self.spec.options, stated, owner=self.spec.name) == options

    @pytest.mark.parametrize("experts", [0, 3])
    def test_shapes(self, options: Any, experts: int) -> None:
        """The parts are those of the spec, in fewer bytes, and stand for a weight of the same shape."""
        weight = self.weight(experts=experts)
        parts = self.parts(weight, options)
        assert parts.keys() == set(self.spec.parts)
        assert all(isinstance(part, mx.array) for part in parts.values())
        assert sum(part.nbytes for part in parts.values()) < weight.nbytes
        back = self.spec.dequantize(parts, options)
        assert (back.shape, back.dtype) == (weight.shape, mx.float32)

    def test_experts_are_weights_of_their_own(self, options: Any) -> None:
        """Each weight of a stack comes back as it does alone."""
        stack = self.weight(experts=3)
        together = self.spec.dequantize(self.parts(stack, options), options)
        alone = [self.spec.dequantize(self.parts(weight, options), options) for weight in stack]
        assert mx.array_equal(together, mx.stack(alone))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", WEIGHTS)
    def test_error_is_bounded(self, options: Any, kind: str, dtype: str) -> None:
        """Every weight is as near as the quantizer promises, whatever the weights are like."""
        given = self.weight(kind, DTYPES[dtype])
        weight = np.array(given.astype(mx.float32))
        parts = self.parts(given, options)
        for name, array in parts.items():
            assert bool(mx.isfinite(array).all()), f"{name} is not finite"
        error = np.abs(np.array(self.spec.dequantize(parts, options)) - weight)
        assert np.isfinite(error).all()
        over = error - self.error_bound(weight, parts, options)
        assert over.max() <= 0, f"by {over.max()}"

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_comes_back_from_a_file(self, options: Any, dtype: str, tmp_path: Path) -> None:
        """Read from a file, the parts stand for the same weight, bit for bit."""
        parts = self.parts(self.weight(dtype=DTYPES[dtype]), options)
        before = self.spec.dequantize(parts, options)
        tensor_file.save(tmp_path / "parts.safetensors", sorted(parts.items()), {}, len(parts))
        loaded, _ = tensor_file.load(tmp_path / "parts.safetensors")
        assert mx.array_equal(self.spec.dequantize(loaded, options), before)

    def test_its_product_is_that_of_the_dequantized_weight(self, options: Any) -> None:
        """``matmul``, where there is one: values, the gradient of the inputs, and the type of the inputs."""
        matmul = self.spec.matmul
        if matmul is None:
            pytest.skip("the quantizer has no product of its own")
        parts = self.parts(self.weight(), options)
        weight = self.spec.dequantize(parts, options)
        self._check_product(lambda x: matmul(x, parts, options), weight)

    def test_its_bound_product_is_that_of_the_dequantized_weight(self, options: Any) -> None:
        """``bind``, where there is one and it gives products here: values for the rows that it takes."""
        parts = self.parts(self.weight(), options)
        product = self.spec.bind(parts, options) if self.spec.bind else None
        if product is None:
            pytest.skip("the quantizer binds no product here")
        weight = self.spec.dequantize(parts, options)
        for rows in ((1,), (1, 1), (2, 4), (3, 40)):
            for times, right in ((product.times, weight.T), (product.times_back, weight)):
                few = product.most_rows is None or math.prod(rows) <= product.most_rows
                if times is None or (times is product.times and not few):
                    continue
                x = mx.random.normal((*rows, right.shape[0]), key=mx.random.key(0))
                got, want = times(x), x @ right
                assert got.shape == want.shape and got.dtype == x.dtype
                assert _apart(got, want) <= 1e-5

    @pytest.mark.parametrize("bias", [False, True])
    def test_multiplies_by_what_it_dequantizes_to(self, options: Any, bias: bool) -> None:
        """So does the linear that core makes of it, with a bias too."""
        linear = self.linear(options, bias)
        module: Any = linear  # mlx.nn does not annotate its methods
        assert tree_flatten(module.trainable_parameters()) == []
        self._check_product(linear, linear.dequantize(), linear.bias if bias else 0)

    def test_leaves_alone_what_does_not_fit(self, options: Any) -> None:
        """A weight of a shape that it cannot quantize stays dense."""
        for shape in self.left_alone:
            assert self.spec.quantize(mx.ones(shape), options) is None
            assert self.spec.quantize(mx.ones((2, *shape)), options) is None

    def test_touches_nothing_and_gives_the_same_every_time(self, options: Any) -> None:
        """The same weight gives the same parts, and stays as it is."""
        weight = self.weight()
        before = np.array(weight)
        first, second = (self.parts(weight, options) for _ in range(2))
        assert first.keys() == second.keys()
        assert all(mx.array_equal(first[name], second[name]) for name in first)
        assert np.array_equal(np.array(weight), before)

    def _check_product(
        self, product: Callable[[mx.array], mx.array], weight: mx.array, bias: mx.array | int = 0
    ) -> None:
        """Outputs, and the gradient of the inputs, are those of ``weight``."""
        for rows in ((1,), (1, 1), (2, 3)):
            x = mx.random.normal((*rows, self.shape[1]), key=mx.random.key(0))
            towards = mx.random.normal((*rows, self.shape[0]), key=mx.random.key(1))
            want = x @ weight.T + bias
            (got,), (slope,) = mx.vjp(lambda x: product(x), [x], [towards])
            assert got.shape == want.shape
            assert got.dtype == x.dtype
            assert _apart(got, want) <= 1e-5
            assert _apart(slope, towards @ weight) <= 1e-5


def _apart(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max())
