"""The conformance suite of adapters.

Subclass :class:`AdapterSuite` in a test file and run it with pytest::

    class TestMyAdapter(AdapterSuite):
        spec = my_plugin.ADAPTER
        option_sets = ({}, {"rank": 2})
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxlora_core.errors import UsageError
from mlxlora_core.model.adapters import adapter_parameters, trainable
from mlxlora_core.model.linears import (
    StackedLinear,
    dense_weight,
    linear_shape,
    weight_shape,
)
from mlxlora_core.options import parse, plain
from mlxlora_core.specs import Adapter
from mlxlora_core.testing.wrapped import EMBEDDINGS, INPUTS, LINEARS, OUTPUTS, WORDS, dense
from mlxlora_core.values import Place

ROWS = 10
ODD_SHAPES = ((1, 64), (64, 1), (33, 7), (129, 65))


class AdapterSuite:
    """What every adapter must do.

    Attributes:
        spec: the adapter.
        option_sets: option values to try; they must not drop anything at random.
        tolerance: how far the fused linear may be from the adapted one.
        frozen: parameters of its own that do not train.
        bent: parameters whose gradient leaves something out on purpose.
        embeds: whether it goes on embeddings.
    """

    spec: Adapter
    option_sets: Sequence[Mapping[str, Any]] = ({},)
    tolerance = 1e-4
    frozen: Collection[str] = ()
    bent: Collection[str] = ()
    embeds = False

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try every linear with every set of options."""
        if "options" in metafunc.fixturenames:
            sets = [parse(self.spec.options, values, owner=self.spec.name) for values in self.option_sets]
            metafunc.parametrize("options", sets, ids=[str(dict(values)) for values in self.option_sets])
        if "linear" in metafunc.fixturenames:
            metafunc.parametrize("kind", LINEARS)
        if "embedding" in metafunc.fixturenames:
            metafunc.parametrize("form", EMBEDDINGS)

    @pytest.fixture
    def linear(self, kind: str) -> nn.Module:
        """A linear with weights that are the same every time."""
        mx.random.seed(0)
        return LINEARS[kind]()

    @pytest.fixture
    def embedding(self, form: str) -> nn.Module:
        """An embedding with weights that are the same every time."""
        mx.random.seed(0)
        return EMBEDDINGS[form]()

    # --- what the tests are made of ---

    def wrapped(self, linear: nn.Module, options: Any) -> nn.Module:
        """An adapter at its start, the same every time."""
        mx.random.seed(1)
        place = Place("layers.3.attention.wq", 3, linear_shape(linear))
        module = self.spec.wrap(linear, place, options)
        assert module is not None, "the adapter left alone a linear that it must wrap"
        return self._begun(module)

    def _begun(self, module: nn.Module) -> nn.Module:
        if self.spec.initialise is not None:
            self.spec.initialise(module)
        return module

    def trained(self, linear: nn.Module, options: Any) -> nn.Module:
        """An adapter whose parameters have left their start."""
        return _moved(self.wrapped(linear, options))

    def wrapped_embedding(self, embedding: nn.Module, options: Any) -> nn.Module:
        """An adapter on an embedding at its start, the same every time; the test ends where it has none."""
        mx.random.seed(1)
        shape = weight_shape(embedding)
        module = self.spec.wrap(embedding, Place("tok_embeddings", None, shape, "embedding"), options)
        if not self.embeds:
            assert module is None, "it wraps embeddings, which its suite does not say (embeds)"
            pytest.skip("this adapter does not go on embeddings")
        assert module is not None, "the adapter left alone an embedding that it must wrap"
        return self._begun(module)

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
            self._begun(module)
            x = mx.random.normal((ROWS, inputs), key=mx.random.key(2))
            assert _apart(module(x), linear(x)) <= 1e-6
            assert self.spec.fuse(module, linear.weight).shape == shape

    def test_a_stack_of_linears_is_wrapped_or_left_alone(self, options: Any) -> None:
        """One that it cannot wrap is no error: None leaves it as it is."""
        stack = StackedLinear(3, INPUTS, OUTPUTS)
        module = self.spec.wrap(stack, Place("layers.0.experts", 0, linear_shape(stack)), options)
        if module is not None:
            self._begun(module)
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

    def test_the_same_seed_gives_the_same_start(self, options: Any) -> None:
        """What is drawn at random is drawn by MLX's seed, which mlxlora sets."""
        linear = dense()
        one, two = (adapter_parameters(self.wrapped(linear, options)) for _ in range(2))
        assert [name for name in one if not mx.array_equal(one[name], two[name])] == []

    def test_option_sets_differ(self) -> None:
        """No two sets of options give the same adapter: each option does something."""
        seen: dict[str, Any] = {}
        for values in self.option_sets:
            does = self._does(parse(self.spec.options, values, owner=self.spec.name))
            same = next((other for other, told in seen.items() if told == does), None)
            assert same is None, f"{dict(values)} does what {same} does"
            seen[str(dict(values))] = does

    def _does(self, options: Any) -> Any:
        """All that can be told of an adapter with some options."""
        mx.random.seed(0)
        module = self.trained(dense(), options)
        x = mx.random.normal((ROWS, INPUTS), key=mx.random.key(2))
        told = [
            module(x),
            self.spec.fuse(module, dense_weight(module.linear)),
            *adapter_parameters(module).values(),
        ]
        rates = self.spec.learning_rates(options) if self.spec.learning_rates is not None else None
        return [tensor.tolist() for tensor in told], rates

    def test_what_it_is_given_is_left_as_it_was(self, linear: nn.Module, options: Any) -> None:
        """Neither the inputs nor the weight that is fused changes: both are used again."""
        module = self.trained(linear, options)
        x, weight = _inputs(linear), dense_weight(linear).astype(mx.float32)
        before = mx.array(x), mx.array(weight)
        mx.eval(before, module(x), self.spec.fuse(module, weight))
        assert mx.array_equal(x, before[0]), "the inputs have changed"
        assert mx.array_equal(weight, before[1]), "the weight has changed"

    def test_keeps_the_linear_frozen(self, linear: nn.Module, options: Any) -> None:
        """The linear is the child ``linear``, frozen; everything else trains, or is said to be frozen."""
        module = self.wrapped(linear, options)
        assert module.linear is linear
        added = adapter_parameters(module)
        assert set(trainable(module)) == added.keys() - set(self.frozen) != set()
        assert added.keys() >= set(self.frozen)
        assert all(mx.issubdtype(tensor.dtype, mx.floating) for tensor in added.values())

    def test_trains_nothing_but_itself(self, linear: nn.Module, options: Any) -> None:
        """Steps of Adam lower the loss, change all that trains and no bit of the rest."""
        module = self.wrapped(linear, options)
        x = _inputs(linear)
        target = mx.random.normal((ROWS, OUTPUTS), key=mx.random.key(3))

        def loss() -> mx.array:
            error: mx.array = module(x).astype(mx.float32) - target
            return error.square().mean()

        base, trained = _copy(linear.parameters()), _copy(module.trainable_parameters())
        frozen = {name: mx.array(adapter_parameters(module)[name]) for name in self.frozen}
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
        assert [name for name in trained if mx.array_equal(trained[name], now[name])] == []
        now = adapter_parameters(module)
        assert [name for name in frozen if not mx.array_equal(frozen[name], now[name])] == []

    def test_gradient_is_the_slope(self, linear: nn.Module, options: Any) -> None:
        """The gradient with respect to the inputs and each parameter is the slope of the outputs' sum.

        Not that of a parameter in ``bent``, which must have one all the same.
        """
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
            assert name in self.bent or abs(slope - want) <= 0.02 * size, name

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
            fused = fused + self._fused_bias(module, linear.bias)
        unadapted, adapted = linear(x), module(x)
        assert _apart(adapted, unadapted) > 100 * self.tolerance, (
            "the adapter did nothing that could be fused"
        )
        assert _apart(adapted, fused) <= self._slack(fused, x)

    def _fused_bias(self, module: nn.Module, bias: mx.array) -> mx.array:
        if self.spec.fuse_bias is None:
            return bias
        fused = self.spec.fuse_bias(module, bias.astype(mx.float32))
        assert fused.shape == bias.shape
        return fused

    def test_low_rank_is_what_it_adds(self, linear: nn.Module, options: Any) -> None:
        """The outputs get what the update of low rank gives, and nothing else."""
        if self.spec.low_rank is None:
            pytest.skip("this adapter is no low-rank update")
        module = self.trained(linear, options)
        module.eval()
        update = self.spec.low_rank(module)
        assert update.a.shape == (INPUTS, update.b.shape[0])
        assert update.b.shape == (update.a.shape[1], OUTPUTS)
        x = _inputs(linear)
        want = linear(x) + update.scale * (x @ update.a) @ update.b
        assert _apart(module(x), want) <= self._slack(want, x)

    def test_learning_rates_are_of_its_parameters(self, options: Any) -> None:
        """Each name is that of a parameter that trains, each factor above 0."""
        if self.spec.learning_rates is None:
            pytest.skip("this adapter has one learning rate")
        factors = self.spec.learning_rates(options)
        assert factors.keys() <= trainable(self.wrapped(dense(), options)).keys()
        assert all(math.isfinite(factor) and factor > 0 for factor in factors.values())

    def test_embeddings_start_as_they_are(self, embedding: nn.Module, options: Any) -> None:
        """At the start it gives the embeddings, and as the output head the logits, in the same type."""
        module = self.wrapped_embedding(embedding, options)
        assert module.linear is embedding
        assert set(trainable(module)) == adapter_parameters(module).keys() - set(self.frozen) != set()
        tokens, hidden = _tokens(), _hidden(embedding)
        for got, want in (
            (module(tokens), embedding(tokens)),
            (module.as_linear(hidden), embedding.as_linear(hidden)),
        ):
            assert got.dtype == want.dtype
            assert _apart(got, want) <= 1e-6

    def test_embeddings_fuse_to_what_they_do(self, embedding: nn.Module, options: Any) -> None:
        """A dense embedding with the fused weight gives the same embeddings and logits."""
        module = _moved(self.wrapped_embedding(embedding, options))
        module.eval()
        weight = self.spec.fuse(module, dense_weight(embedding).astype(mx.float32))
        assert (weight.shape, weight.dtype) == ((WORDS, INPUTS), mx.float32)
        tokens, hidden = _tokens(), _hidden(embedding)
        rows, logits = weight[tokens], hidden.astype(mx.float32) @ weight.T
        assert _apart(module(tokens), embedding(tokens)) > 100 * self.tolerance
        assert _apart(module(tokens), rows) <= self._slack(rows, hidden)
        assert _apart(module.as_linear(hidden), logits) <= self._slack(logits, hidden)
        if self.spec.low_rank is not None:
            update = self.spec.low_rank(module)
            want = embedding(tokens) + update.scale * update.a[tokens] @ update.b
            assert _apart(module(tokens), want) <= self._slack(want, hidden)

    def _slack(self, want: mx.array, x: mx.array) -> float:
        """How far outputs may be from what they ought to be, with inputs in a type."""
        return self.tolerance if x.dtype == mx.float32 else 2e-3 * float(mx.abs(want).max())


def _inputs(linear: nn.Module) -> mx.array:
    """Rows in the type that the linear computes in."""
    half = isinstance(linear, nn.Linear) and linear.weight.dtype == mx.float16
    x = mx.random.normal((ROWS, INPUTS), key=mx.random.key(2))
    return x.astype(mx.float16) if half else x


def _tokens() -> mx.array:
    return mx.array([[3, 0, 49], [3, 7, 1]])


def _hidden(embedding: nn.Module) -> mx.array:
    """Hidden states in the type that the embedding gives."""
    return mx.random.normal((ROWS, INPUTS), key=mx.random.key(6)).astype(embedding(mx.array([0])).dtype)


def _moved(module: nn.Module) -> nn.Module:
    """The module after all that trains has left its start."""
    module.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), module.trainable_parameters()))
    return module


def _apart(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())


def _copy(parameters: Any) -> dict[str, mx.array]:
    return {name: mx.array(array) for name, array in dict(tree_flatten(parameters)).items()}


def _set(module: nn.Module, path: str, value: mx.array) -> None:
    module.load_weights([(path, value)], strict=False)
