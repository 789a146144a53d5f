"""The conformance suite of architectures.

Subclass :class:`ArchitectureSuite` in a test file and run it with pytest::

    class TestMyArchitecture(ArchitectureSuite):
        spec = my_plugin.ARCHITECTURE
        raw = {"dim": 16, "n_layers": 2, ...}
        checkpoint = {"tok_embeddings.weight": (11, 16), ...}
        sizes = ("dim", "n_layers", ...)

        def reference(self, weights, tokens): ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlxlora_core.errors import ModelError
from mlxlora_core.machine.device import on_cpu
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import StackedLinear, linear_shape, linears, parameters
from mlxlora_core.model.ops import LARGE
from mlxlora_core.specs import Architecture
from mlxlora_core.testing.arguments import ArgumentTests
from mlxlora_core.testing.forward import OnlyForward, gradients_of, in_parts, loss_of
from mlxlora_core.testing.layouts import LayoutTests
from mlxlora_core.testing.packing import PackingTests
from mlxlora_core.testing.ragged import RaggedTests
from mlxlora_core.values import LazyTensor


class ArchitectureSuite(LayoutTests, ArgumentTests, PackingTests, RaggedTests):
    """What every architecture must do.

    The model is filled with random float32 weights; keep it tiny. Subclass the suite once for each form
    that the family has: tied or not, with biases or without, with grouped heads, with a window. A mixture
    is one form with every expert chosen, and one with some of them that is not ``smooth``.

    Attributes:
        spec: the architecture.
        raw: the config of a tiny model of at least two layers, as a checkpoint
            spells it. A window or another limit of sight should be shorter than
            ``tokens``, so that it is tried.
        checkpoint: name -> shape of every tensor in its checkpoint.
        layout: in which of the architecture's ``layouts`` these two are spelt; nothing for its own.
        unused: names of those that the model has no use for.
        sizes: keys of ``raw`` that are whole numbers of at least 1.
        tokens: T of the sequences that are tried.
        wide: types of weights with which the layers compute in float32, since they would overflow.
        smooth: whether a small change of the weights changes the loss by little. It
            jumps where a mixture chooses other experts, so that no slope is measured.
        tolerance: how far two ways to compute the same logits may lie apart.
    """

    spec: Architecture
    raw: Mapping[str, Any]
    checkpoint: Mapping[str, tuple[int, ...]]
    layout = ""
    unused: frozenset[str] = frozenset()
    sizes: tuple[str, ...]
    tokens = 13
    wide: Sequence[str] = ()
    smooth = True
    tolerance = 1e-4

    def reference(self, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
        """Logits (B, T, V) by an implementation that is independent of the architecture.

        Args:
            weights: float32, by their names in the checkpoint and as they stand there.
            tokens: ids (B, T).
        """
        raise NotImplementedError

    # --- what the tests are made of ---

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Random tensors of the checkpoint, the same every time."""
        draw = np.random.default_rng(5)
        found = {}
        for name, shape in sorted(self.checkpoint.items()):
            noise = draw.standard_normal(shape)
            scaled = 1 + 0.2 * noise if len(shape) == 1 else noise * 1.5 / shape[-1] ** 0.5
            found[name] = scaled.astype(np.float32)
        return found

    def lazy(self, read: list[str] | None = None) -> dict[str, LazyTensor]:
        """The checkpoint as a loader would open it; each name that is read is added to ``read``."""

        def values(name: str, weight: np.ndarray) -> mx.array:
            if read is not None:
                read.append(name)
            return mx.array(weight)

        weights = self.weights.items()
        return {name: LazyTensor(w.shape, "float32", partial(values, name, w)) for name, w in weights}

    def tensors(self) -> dict[str, mx.array]:
        """The model's tensors, made of the checkpoint's."""
        made = self.made(self.lazy(), self.read(self.raw))
        return {name: tensor.read() for name, tensor in made.items()}

    def model(self) -> LanguageModel:
        """The model of ``raw`` with those weights."""
        model = self.spec.build(self.read(self.raw))
        model.update(tree_unflatten(list(self.tensors().items())))
        model.eval()
        return model

    def ids(self, model: LanguageModel, rows: int = 2, tokens: int | None = None) -> mx.array:
        """Random token ids (rows, ``tokens``), the same every time."""
        draw = np.random.default_rng(6)
        return mx.array(draw.integers(0, model.vocab_size, (rows, tokens or self.tokens)))

    def many_ids(self, model: LanguageModel) -> mx.array:
        """Token ids (B, T) of which the hidden states are as large as those of a model in use.

        What core computes with takes other, faster ways from
        :data:`mlxlora_core.model.ops.LARGE` elements on.
        """
        width = model.embed(self.ids(model)).shape[-1]
        tokens = min(model.context_tokens or 150, 150)
        rows = max(2, -(-2 * LARGE // (width * tokens)))
        return self.ids(model, rows, tokens)

    def same(self, got: mx.array, want: mx.array) -> None:
        """Assert that two results are equal up to ``tolerance``."""
        assert got.shape == want.shape
        far = float(mx.abs(got - want).max())
        assert far <= self.tolerance, f"{far} apart"

    # --- the tests ---

    def test_members(self) -> None:
        """The model says what it is, and its head is where it says."""
        model = self.model()
        assert isinstance(model, LanguageModel)
        assert len(model.layers) >= 2
        assert all(isinstance(layer, nn.Module) for layer in model.layers)
        assert len(model.make_cache()) == len(model.layers)
        assert all(cache.offset == 0 for cache in model.make_cache())
        assert model.context_tokens is None or model.context_tokens >= 1
        if model.head_path:
            assert linear_shape(dict(linears(model))[model.head_path])[0] == model.vocab_size
        assert model(self.ids(model)).shape == (2, self.tokens, model.vocab_size)

    def test_tensors_are_the_parameters(self) -> None:
        """What is made of the checkpoint are the model's parameters, in name, shape and type, told unread."""
        read: list[str] = []
        args = self.read(self.raw)
        made = self.made(self.lazy(read), args)
        assert read == [], "tensors() reads; it must leave that to the tensors it gives"
        model = self.spec.build(args)
        assert {n: t.shape for n, t in made.items()} == {n: p.shape for n, p in parameters(model).items()}
        for name, tensor in made.items():
            got = tensor.read()
            assert (got.shape, got.dtype) == (tensor.shape, mx.float32), name
            assert tensor.dtype == "float32", name
            assert mx.array_equal(tensor.read(), got).item(), f"{name} is another one when it is read again"

    def test_no_tensor_is_lost(self) -> None:
        """Every tensor of the checkpoint goes into the model, but for those that the suite calls unused."""
        read: list[str] = []
        for tensor in self.made(self.lazy(read), self.read(self.raw)).values():
            mx.eval(tensor.read())
        assert set(self.checkpoint) - set(read) == self.unused

    def test_unknown_names_pass(self) -> None:
        """A tensor that the architecture does not know is there under its name, so that core can tell it."""
        if self.layout:
            pytest.skip("what no table names is told by core")
        stray = LazyTensor((1,), "float32", lambda: mx.zeros((1,)))
        found = {**self.lazy(), "no.such.tensor": stray}
        assert self.spec.tensors(found, self.read(self.raw)).get("no.such.tensor") is stray

    def test_a_tensor_that_is_missing_is_no_crash(self) -> None:
        """Without any one tensor the rest is made, or a ModelError says what is missing."""
        for name in self.checkpoint:
            found = {other: tensor for other, tensor in self.lazy().items() if other != name}
            try:
                made = self.made(found, self.read(self.raw))
            except ModelError:
                continue
            assert name in self.unused or set(made) != set(parameters(self.model())), name

    def test_every_parameter_counts(self) -> None:
        """Another value of any parameter gives other logits."""
        model = self.model()
        ids = self.ids(model)
        before = model(ids)
        idle = []
        for name, weight in self.tensors().items():
            model.update(tree_unflatten([(name, weight[::-1] * 1.5)]))
            if float(mx.abs(model(ids) - before).max()) < 1e-3:
                idle.append(name)
            model.update(tree_unflatten([(name, weight)]))
        assert idle == []

    @pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
    def test_agrees_with_the_reference(self, large: bool) -> None:
        """Logits are those of an independent implementation."""
        model = self.model()
        ids = self.many_ids(model) if large else self.ids(model)
        try:
            want = self.reference(self.weights, np.array(ids))
        except NotImplementedError:
            pytest.skip("the suite gives no reference")
        self.same(model(ids), mx.array(np.asarray(want, np.float32)))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_stays(self, dtype: str) -> None:
        """With half-precision weights the layers compute in their type, near what float32 gives."""
        model = self.model()
        ids = self.ids(model)
        if on_cpu() and any(isinstance(linear, StackedLinear) for _, linear in linears(model)):
            pytest.skip("on a CPU, MLX multiplies stacks of linears in float32 alone")
        want = model(ids)
        model.set_dtype(getattr(mx, dtype))
        hidden = model.run(model.embed(ids))
        assert hidden.dtype == (mx.float32 if dtype in self.wide else getattr(mx, dtype))
        far = float(mx.abs(model(ids).astype(mx.float32) - want).max() / mx.abs(want).max())
        assert not self.smooth or far <= 0.25, f"{far} apart"

    # --- at the sizes of a model in use: other ways of computing are taken there ---

    def test_large_logits_and_gradients_are_finite(self) -> None:
        """No logit and no gradient is infinite or NaN, whatever the number of rows and tokens."""
        model = self.model()
        whole = self.many_ids(model)
        for ids in (whole, whole[:1], whole[:, : whole.shape[1] // 2]):
            assert mx.isfinite(model(ids)).all().item(), f"logits of {ids.shape}"
            for name, gradient in gradients_of(model, ids).items():
                assert mx.isfinite(gradient).all().item(), f"gradient of {name} for {ids.shape}"

    def test_large_gradient_is_the_slope(self) -> None:
        """Along a random direction the loss changes as the gradient says."""
        if not self.smooth:
            pytest.skip("the suite says that the loss jumps")
        model = self.model()
        ids = self.many_ids(model)
        weights, gradients = parameters(model), gradients_of(model, ids)
        draw = np.random.default_rng(8)
        way = {n: mx.array(draw.standard_normal(w.shape).astype(np.float32)) for n, w in weights.items()}
        slope = sum(float((gradients[name] * way[name]).sum()) for name in weights)
        step = 1e-3
        ends = []
        for sign in (1, -1):
            moved = [(name, w + sign * step * way[name]) for name, w in weights.items()]
            model.update(tree_unflatten(moved))
            ends.append(float(loss_of(model, ids)))
        measured = (ends[0] - ends[1]) / (2 * step)
        size = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
        assert abs(measured - slope) <= 0.05 * size, f"the slope is {measured}, not {slope}"

    def test_large_is_causal(self) -> None:
        """Other tokens from some position on change no logit before it."""
        model = self.model()
        ids = self.many_ids(model)
        length = ids.shape[1]
        before = model(ids)
        for cut in (1, length // 3, length - 1):
            other = mx.concatenate([ids[:, :cut], (ids[:, cut:] + 1) % model.vocab_size], axis=1)
            change = mx.abs(before - model(other))
            assert float(change[:, :cut].max()) <= 1e-5
            assert float(change[:, cut:].max()) > 1e-3

    def test_large_rows_are_independent(self) -> None:
        """A row of a large batch has the logits that it has alone."""
        model = self.model()
        ids = self.many_ids(model)
        self.same(mx.concatenate([model(ids[:1]), model(ids[1:])]), model(ids))

    def test_large_decoding_is_the_full_forward(self) -> None:
        """Prefill in large chunks, then tokens one by one, have the logits of the whole sequence."""
        model = self.model()
        ids = self.many_ids(model)
        length = ids.shape[1]
        first = length // 2
        second = length - first - 5
        for lengths in ([length - 5], [first, second]):
            self.same(in_parts(model, ids, [*lengths, 1, 1, 1, 1, 1]), model(ids))

    # --- the model's parts ---

    def test_is_causal(self) -> None:
        """Other tokens from some position on change the logits from there on, and none before."""
        model = self.model()
        ids = self.ids(model)
        for cut in (1, self.tokens // 2, self.tokens - 1):
            other = mx.concatenate([ids[:, :cut], (ids[:, cut:] + 1) % model.vocab_size], axis=1)
            change = mx.abs(model(ids) - model(other))
            assert float(change[:, :cut].max()) <= 1e-6
            assert float(change[:, cut:].max()) > 1e-3

    def test_rows_of_a_batch_are_independent(self) -> None:
        """A row has the logits that it has alone."""
        model = self.model()
        ids = self.ids(model)
        self.same(mx.concatenate([model(ids[:1]), model(ids[1:])]), model(ids))

    def test_decoding_with_the_cache_is_the_full_forward(self) -> None:
        """Token by token, every row of a batch has the logits of the whole sequence."""
        model = self.model()
        ids = self.ids(model)
        self.same(in_parts(model, ids, [1] * self.tokens), model(ids))

    @pytest.mark.parametrize("first", [2, 5, 12])
    def test_prefill_in_chunks_is_the_full_forward(self, first: int) -> None:
        """Chunks of any length, then single tokens, have the logits of the whole sequence."""
        model = self.model()
        ids = self.ids(model)
        second = min(4, self.tokens - first)
        rest = self.tokens - first - second
        self.same(in_parts(model, ids, [first, second] + [1] * rest), model(ids))

    def test_embed_run_and_head_compose(self) -> None:
        """The three calls are the whole, and the layers can be run in two goes, cached or not."""
        model = self.model()
        ids = self.ids(model)
        whole, hidden = model(ids), model.embed(ids)
        self.same(model.head(model.run(hidden)), whole)
        for cut in range(len(model.layers) + 1):
            self.same(model.head(model.run(model.run(hidden, 0, cut), cut)), whole)
            cache = model.make_cache()
            parts = []
            for part in (hidden[:, :4], hidden[:, 4:]):
                low = model.run(part, last=cut, cache=cache)
                parts.append(model.run(low, first=cut, cache=cache))
            self.same(model.head(mx.concatenate(parts, axis=1)), whole)

    def test_head_takes_chosen_positions(self) -> None:
        """Hidden states (N, D) of some positions have their logits (N, V)."""
        model = self.model()
        ids = self.ids(model)
        hidden = model.run(model.embed(ids))
        self.same(model.head(hidden[:, -1]), model(ids)[:, -1])

    def test_linears_can_be_replaced(self) -> None:
        """Every linear is used by calling it: a module that only has a forward can stand in its place."""
        model = self.model()
        ids = self.ids(model)
        before = model(ids)
        stand_ins = {path: OnlyForward(linear) for path, linear in linears(model)}
        assert any(path.startswith("layers.") for path in stand_ins)
        model.update_modules(tree_unflatten(list(stand_ins.items())))
        self.same(model(ids), before)
        assert [path for path, stand_in in stand_ins.items() if not stand_in.called] == []

    def test_build_computes_nothing(self) -> None:
        """Parameters that will be loaded anyway are not made first."""
        args = self.read(self.raw)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model = self.spec.build(args)
        rise = mx.get_peak_memory() - before
        assert rise < sum(p.nbytes for p in parameters(model).values()) / 2
