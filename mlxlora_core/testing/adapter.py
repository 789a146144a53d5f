"""The conformance suite of adapters.

Subclass :class:`AdapterSuite` in a test file and run it with pytest::

    class TestMyAdapter(AdapterSuite):
        spec = my_plugin.ADAPTER
        option_sets = ({}, {"rank": 2})
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxlora_core.errors import UsageError
from mlxlora_core.model.linears import QuantizedLinear, StackedLinear, dense_weight, linear_shape
from mlxlora_core.options import NoOptions, parse, plain
from mlxlora_core.specs import Adapter
from mlxlora_core.testing.stand_in import ROUNDING, choice
from mlxlora_core.values import Place

OUTPUTS, INPUTS, ROWS = 32, 64, 10
ODD_SHAPES = ((1, 64), (64, 1), (33, 7), (129, 65))


def _dense(bias: bool = False, dtype: mx.Dtype = mx.float32) -> nn.Linear:
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    linear.set_dtype(dtype)
    return linear


def _rounded() -> nn.Module:
    weight = _dense().weight
    parts = ROUNDING.quantize(weight, NoOptions())
    assert parts is not None
    return QuantizedLinear(choice("quantizer", ROUNDING, NoOptions()), parts, weight.shape)


#: what an adapter may be asked to wrap
LINEARS: Mapping[str, Callable[[], nn.Module]] = {
    "dense": _dense,
    "dense with bias": lambda: _dense(bias=True),
    "dense float16": lambda: _dense(dtype=mx.float16),
    "4 bits of MLX": lambda: nn.QuantizedLinear.from_linear(_dense(), 32, 4),
    "3 bits of MLX with bias": lambda: nn.QuantizedLinear.from_linear(_dense(bias=True), 64, 3),
    "of a quantizer": _rounded,
}


class AdapterSuite:
    """What every adapter must do.

    Attributes:
        spec: the adapter.
        option_sets: option values to try; they must not drop anything at random.
        tolerance: how far the fused linear may be from the adapted one.
    """

    spec: Adapter
    option_sets: Sequence[Mapping[str, Any]] = ({},)
    tolerance = 1e-4

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try every linear with every set of options."""
        if "options" in metafunc.fixturenames:
            sets = [parse(self.spec.options, values, owner=self.spec.name) for values in self.option_sets]
            metafunc.parametrize("options", sets, ids=[str(dict(values)) for values in self.option_sets])
        if "linear" in metafunc.fixturenames:
            metafunc.parametrize("kind", LINEARS)

    @pytest.fixture
    def linear(self, kind: str) -> nn.Module:
        """A linear with weights that are the same every time."""
        mx.random.seed(0)
        return LINEARS[kind]()

    # --- what the tests are made of ---

    def wrapped(self, linear: nn.Module, options: Any) -> nn.Module:
        """An adapter at its start, the same every time."""
        mx.random.seed(1)
        place = Place("layers.3.attention.wq", 3, linear_shape(linear))
        module = self.spec.wrap(linear, place, options)
        assert module is not None, "the adapter left alone a linear that it must wrap"
        return module

    def trained(self, linear: nn.Module, options: Any) -> nn.Module:
        """An adapter whose parameters have left their start."""
        module = self.wrapped(linear, options)
        module.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), module.trainable_parameters()))
        return module

    # --- the tests ---

    def test_options_come_back(self, options: Any) -> None:
        """They come back from an adapter file as they were."""
        stated = json.loads(json.dumps(plain(options)))
        assert parse(self.spec.options, stated, owner=self.spec.name) == options

    @pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
    def test_linears_of_odd_shapes(self, options: Any, shape: tuple[int, int]) -> None:
        """It fits them, or says so in one line; the place that it is told is that of the linear."""
        outputs, inputs = shape
        linear = nn.Linear(inputs, outputs)
        try:
            module = self.spec.wrap(linear, Place("layers.0.odd", 0, shape), options)
        except UsageError as fault:
            assert str(outputs) in str(fault) and str(inputs) in str(fault)
            return
        if module is not None:
            x = mx.random.normal((ROWS, inputs), key=mx.random.key(2))
            assert _apart(module(x), linear(x)) <= 1e-6
            assert self.spec.fuse(module, linear.weight).shape == shape

    def test_a_stack_of_linears_is_wrapped_or_left_alone(self, options: Any) -> None:
        """One that it cannot wrap is no error: None leaves it as it is."""
        stack = StackedLinear(3, INPUTS, OUTPUTS)
        module = self.spec.wrap(stack, Place("layers.0.experts", 0, linear_shape(stack)), options)
        if module is not None:
            x = mx.random.normal((ROWS, INPUTS), key=mx.random.key(2))
            chosen = mx.arange(ROWS) % 3
            assert _apart(module(x, chosen), stack(x, chosen)) <= 1e-6
            assert self.spec.fuse(module, stack.weight).shape == stack.weight.shape

    def test_starts_as_the_linear(self, linear: nn.Module, options: Any) -> None:
        """At the start the outputs are those of the linear, in the same type."""
        x = _inputs(linear)
        want = linear(x)
        got = self.wrapped(linear, options)(x)
        assert got.dtype == want.dtype
        assert _apart(got, want) <= 1e-6

    def test_keeps_the_linear_frozen(self, linear: nn.Module, options: Any) -> None:
        """The linear is the child ``linear``, frozen; everything else trains."""
        module = self.wrapped(linear, options)
        assert module.linear is linear
        parameters = dict(tree_flatten(module.parameters()))
        added = {name for name in parameters if not name.startswith("linear.")}
        assert added
        assert set(dict(tree_flatten(module.trainable_parameters()))) == added
        assert all(mx.issubdtype(parameters[name].dtype, mx.floating) for name in added)

    def test_trains_nothing_but_itself(self, linear: nn.Module, options: Any) -> None:
        """Steps of Adam lower the loss, change every parameter of its own and no bit of the linear."""
        module = self.wrapped(linear, options)
        x = _inputs(linear)
        target = mx.random.normal((ROWS, OUTPUTS), key=mx.random.key(3))

        def loss() -> mx.array:
            error: mx.array = module(x).astype(mx.float32) - target
            return error.square().mean()

        base, own = _copy(linear.parameters()), _copy(module.trainable_parameters())
        first = float(loss())
        optimizer = optimizers.Adam(learning_rate=1e-3)
        step = nn.value_and_grad(module, loss)
        for _ in range(10):
            optimizer.update(module, step()[1])
            mx.eval(module.parameters(), optimizer.state)
        assert float(loss()) < first
        now = dict(tree_flatten(linear.parameters()))
        assert [name for name in base if not mx.array_equal(base[name], now[name])] == []
        now = dict(tree_flatten(module.trainable_parameters()))
        assert [name for name in own if mx.array_equal(own[name], now[name])] == []

    def test_gradient_is_the_slope(self, linear: nn.Module, options: Any) -> None:
        """The gradient with respect to the inputs and each parameter is the slope of the outputs' sum."""
        module = self.trained(linear, options)
        weights = mx.random.normal((ROWS, OUTPUTS), key=mx.random.key(4))
        start = {"x": _inputs(linear).astype(mx.float32)}
        start |= dict(tree_flatten(module.trainable_parameters()))

        def total(values: dict[str, mx.array]) -> mx.array:
            for name, value in values.items():
                if name != "x":
                    _set(module, name, value)
            outputs: mx.array = module(values["x"]).astype(mx.float32)
            return (outputs * weights).sum()

        gradient = mx.grad(total)(start)
        half = 0.5e-2
        for name, value in start.items():
            along = mx.random.normal(value.shape, key=mx.random.key(5))
            along = along / mx.linalg.norm(along)
            ahead = total({**start, name: value + half * along})
            behind = total({**start, name: value - half * along})
            slope, want = float(ahead - behind) / (2 * half), float((gradient[name] * along).sum())
            size = float(mx.linalg.norm(gradient[name]))
            assert size > 0, f"no gradient reaches {name}"
            assert abs(slope - want) <= 0.02 * size, name

    def test_fuses_to_what_it_does(self, linear: nn.Module, options: Any) -> None:
        """One dense linear with the fused weight gives the adapted outputs."""
        module = self.trained(linear, options)
        module.eval()
        weight = self.spec.fuse(module, dense_weight(linear).astype(mx.float32))
        assert weight.dtype == mx.float32
        assert weight.shape == (OUTPUTS, INPUTS)
        x = _inputs(linear)
        fused = x.astype(mx.float32) @ weight.T
        if "bias" in linear:
            fused = fused + linear.bias
        unadapted, adapted = linear(x), module(x)
        assert _apart(adapted, unadapted) > 100 * self.tolerance, (
            "the adapter did nothing that could be fused"
        )
        slack = self.tolerance if x.dtype == mx.float32 else 2e-3 * float(mx.abs(fused).max())
        assert _apart(adapted, fused) <= slack


def _inputs(linear: nn.Module) -> mx.array:
    """Rows in the type that the linear computes in."""
    half = isinstance(linear, nn.Linear) and linear.weight.dtype == mx.float16
    x = mx.random.normal((ROWS, INPUTS), key=mx.random.key(2))
    return x.astype(mx.float16) if half else x


def _apart(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())


def _copy(parameters: Any) -> dict[str, mx.array]:
    return {name: mx.array(array) for name, array in dict(tree_flatten(parameters)).items()}


def _set(module: nn.Module, path: str, value: mx.array) -> None:
    module.load_weights([(path, value)], strict=False)
