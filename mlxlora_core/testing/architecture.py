"""The conformance suite of architectures.

Subclass :class:`ArchitectureSuite` in a test file and run it with pytest::

    class TestMyArchitecture(ArchitectureSuite):
        spec = my_plugin.ARCHITECTURE
        raw = {"dim": 16, "n_layers": 2, ...}
        tensors = {"tok_embeddings.weight": (11, 16), ...}
        sizes = ("dim", "n_layers", ...)

        def reference(self, weights, tokens): ...
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlxlora_core.errors import ModelError
from mlxlora_core.model.linears import linear_shape, linears, parameters
from mlxlora_core.options import plain
from mlxlora_core.specs import Architecture, Cache, LanguageModel


class ArchitectureSuite:
    """What every architecture must do.

    The model is filled with random float32 weights; keep it tiny.

    Attributes:
        spec: the architecture.
        raw: the config of a tiny model of at least two layers, as a checkpoint
            spells it. A window or another limit of sight should be shorter than
            ``tokens``, so that it is tried.
        tensors: name -> shape of every tensor in its checkpoint.
        sizes: keys of ``raw`` that are whole numbers of at least 1.
        tokens: T of the sequences that are tried.
        tolerance: how far two ways to compute the same logits may lie apart.
    """

    spec: Architecture
    raw: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    sizes: tuple[str, ...]
    tokens = 13
    tolerance = 1e-4

    def reference(self, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
        """Logits (B, T, V) by an implementation that is independent of the architecture.

        Args:
            weights: float32, by their names in the model.
            tokens: ids (B, T).
        """
        raise NotImplementedError

    # --- what the tests are made of ---

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the model -> shape, without the tensors that it does not need."""
        renamed = ((self.spec.rename(name), shape) for name, shape in self.tensors.items())
        return {name: shape for name, shape in renamed if name is not None}

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Random weights by their names in the model, the same every time."""
        draw = np.random.default_rng(5)
        found = {}
        for name, shape in sorted(self.shapes.items()):
            noise = draw.standard_normal(shape)
            scaled = 1 + 0.2 * noise if len(shape) == 1 else noise * 1.5 / shape[-1] ** 0.5
            found[name] = scaled.astype(np.float32)
        return found

    def model(self) -> Any:
        """The model of ``raw`` with those weights: a LanguageModel and an ``mlx.nn.Module``."""
        model: Any = self.spec.build(self.spec.config(self.raw, self.shapes))
        model.update(tree_unflatten([(name, mx.array(w)) for name, w in self.weights.items()]))
        model.eval()
        return model

    def ids(self, model: LanguageModel, rows: int = 2) -> mx.array:
        """Random token ids (rows, ``tokens``), the same every time."""
        draw = np.random.default_rng(6)
        return mx.array(draw.integers(0, model.vocab_size, (rows, self.tokens)))

    def same(self, got: mx.array, want: mx.array) -> None:
        """Assert that two results are equal up to ``tolerance``."""
        assert got.shape == want.shape
        far = float(mx.abs(got - want).max())
        assert far <= self.tolerance, f"{far} apart"

    # --- the tests ---

    def test_members(self) -> None:
        """The model says what it is, and its head is where it says."""
        model = self.model()
        assert isinstance(model, nn.Module)
        assert len(model.layers) >= 2
        assert all(isinstance(layer, nn.Module) for layer in model.layers)
        assert len(model.make_cache()) == len(model.layers)
        assert all(cache.offset == 0 for cache in model.make_cache())
        assert model.context_tokens is None or model.context_tokens >= 1
        if model.head_path:
            assert linear_shape(dict(linears(model))[model.head_path])[0] == model.vocab_size
        assert model(self.ids(model)).shape == (2, self.tokens, model.vocab_size)

    def test_every_name_is_accounted_for(self) -> None:
        """The checkpoint's tensors are the model's parameters, in name and shape; no other name changes."""
        model: Any = self.spec.build(self.spec.config(self.raw, self.shapes))
        assert {name: p.shape for name, p in parameters(model).items()} == self.shapes
        assert self.spec.rename("no.such.tensor") == "no.such.tensor"

    def test_every_parameter_counts(self) -> None:
        """Another value of any parameter gives other logits."""
        model = self.model()
        ids = self.ids(model)
        before = model(ids)
        idle = []
        for name, weight in self.weights.items():
            model.update(tree_unflatten([(name, mx.array(weight[::-1] * 1.5))]))
            if float(mx.abs(model(ids) - before).max()) < 1e-3:
                idle.append(name)
            model.update(tree_unflatten([(name, mx.array(weight))]))
        assert idle == []

    def test_agrees_with_the_reference(self) -> None:
        """Logits are those of an independent implementation."""
        model = self.model()
        ids = self.ids(model)
        try:
            want = self.reference(self.weights, np.array(ids))
        except NotImplementedError:
            pytest.skip("the suite gives no reference")
        self.same(model(ids), mx.array(np.asarray(want, np.float32)))

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
        self.same(_in_parts(model, ids, [1] * self.tokens), model(ids))

    @pytest.mark.parametrize("first", [2, 5, 12])
    def test_prefill_in_chunks_is_the_full_forward(self, first: int) -> None:
        """Chunks of any length, then single tokens, have the logits of the whole sequence."""
        model = self.model()
        ids = self.ids(model)
        second = min(4, self.tokens - first)
        rest = self.tokens - first - second
        self.same(_in_parts(model, ids, [first, second] + [1] * rest), model(ids))

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
        stand_ins = {path: _StandIn(linear) for path, linear in linears(model)}
        assert any(path.startswith("layers.") for path in stand_ins)
        model.update_modules(tree_unflatten(list(stand_ins.items())))
        self.same(model(ids), before)
        assert [path for path, stand_in in stand_ins.items() if not stand_in.called] == []

    def test_build_computes_nothing(self) -> None:
        """Parameters that will be loaded anyway are not made first."""
        args = self.spec.config(self.raw, self.shapes)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model: Any = self.spec.build(args)
        rise = mx.get_peak_memory() - before
        assert rise < sum(p.nbytes for p in parameters(model).values()) / 2

    def test_config_is_read_back(self) -> None:
        """What config.json holds gives the same arguments without any shapes."""
        args = self.spec.config(self.raw, self.shapes)
        assert dataclasses.is_dataclass(args)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(args, dataclasses.fields(args)[0].name, None)
        written = json.loads(json.dumps(plain(args)))
        written.setdefault("model_type", self.raw.get("model_type") or self.spec.detect(self.raw))
        assert written["model_type"] in self.spec.model_types
        assert self.spec.config(written, {}) == args
        without_nulls = {key: value for key, value in written.items() if value is not None}
        assert self.spec.config(without_nulls, {}) == args
        assert self.spec.config({**written, "no_such_key": 1}, {}) == args

    def test_impossible_sizes_are_refused(self) -> None:
        """A size that makes no sense is an error that names it, whatever it is."""
        written = plain(self.spec.config(self.raw, self.shapes))
        for key in self.sizes:
            for value in (0, 10**18, 2.5, "7", True, [3], float("nan")):
                with pytest.raises(ModelError, match=key):
                    self.spec.config({**self.raw, key: value}, self.shapes)
            with pytest.raises(ModelError, match=key):
                self.spec.config({**written, key: -1}, {})

    def test_all_faults_are_told_at_once(self) -> None:
        """Every impossible size is named in one error."""
        with pytest.raises(ModelError) as fault:
            self.spec.config({**self.raw, **dict.fromkeys(self.sizes, "x")}, self.shapes)
        assert [key for key in self.sizes if key not in str(fault.value)] == []

    def test_knows_its_own_configs_alone(self) -> None:
        """The config of something else is not taken for its own, and an empty one is an error."""
        for raw in ({}, {"hidden_size": 64, "architectures": ["Other"]}, {"model_type": "no-such-type"}):
            assert self.spec.detect(raw) is None
            with pytest.raises(ModelError):
                self.spec.config(raw, {})
        named = self.raw.get("model_type") or self.spec.detect(self.raw)
        assert named in self.spec.model_types


class _StandIn(nn.Module):
    """A linear's forward and nothing else."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._linear = [linear]  # in a list: no child module, no parameters
        self.called = False

    def __call__(self, x: mx.array) -> mx.array:
        self.called = True
        out: mx.array = self._linear[0](x)
        return out


def _in_parts(model: LanguageModel, ids: mx.array, lengths: list[int]) -> mx.array:
    """Logits of ``ids`` given to a cached model in parts of these lengths."""
    cache: list[Cache] = model.make_cache()
    parts, start = [], 0
    for length in lengths:
        parts.append(model(ids[:, start : start + length], cache=cache))
        start += length
        assert [entry.offset for entry in cache] == [start] * len(cache)
    return mx.concatenate(parts, axis=1)
