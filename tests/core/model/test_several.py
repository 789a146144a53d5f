from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.errors import ModelError, UsageError
from mlxlora_core.files import tensor_file
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.linears import parameters
from mlxlora_core.model.loading import Model
from mlxlora_core.model.several import AdapterSet
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import configure

MakeModel = Callable[..., Path]
TOKENS = mx.array(
    [[1, 5, 7, 9, 300, 17], [1, 8, 8, 2, 41, 3], [1, 30, 31, 32, 33, 34], [1, 5, 7, 9, 300, 17]]
)
#: name -> (kind, options): of several ranks, on several linears, one that is no low-rank update
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("lora", {"rank": 2}),
    "large": ("lora", {"rank": 7, "scale": 0.5, "targets": ("wq", "wo", "w2")}),
    "top": ("lora", {"rank": 3, "layers": 1}),
    "turned": ("dora", {"rank": 2, "targets": ("wq", "w1")}),
    "words": ("lora", {"rank": 2, "targets": ("tok_embeddings", "wq")}),
    "scaled": ("ia3", {}),
}


@pytest.fixture
def make_adapter(registry: Registry, tmp_path: Path) -> Callable[[Path, str], Path]:
    """A function that writes one of the adapters with random values for a base."""

    def make(base: Path, name: str) -> Path:
        kind, options = ADAPTERS[name]
        model = loading.load(base, registry)
        adapted = adapters.attach(model, *configure(registry.find("adapter", kind), options), 0)
        key = mx.random.key(len(name))
        values = {
            n: t + 0.1 * mx.random.normal(t.shape, key=key)
            for n, t in adapters.trainable(model.module).items()
        }
        model.module.load_weights(list(values.items()), strict=False)
        path = tmp_path / f"{name}.safetensors"
        adapters.save(path, model, adapted)
        return path

    return make


@pytest.fixture
def files(model_folder: MakeModel, make_adapter: Callable[[Path, str], Path]) -> tuple[Path, dict[str, Path]]:
    """A base, and a file of each adapter."""
    base = model_folder()
    return base, {name: make_adapter(base, name) for name in ADAPTERS}


def loaded(base: Path, paths: dict[str, Path], registry: Registry) -> tuple[Model, AdapterSet]:
    model = loading.load(base, registry)
    several = AdapterSet(model)
    for name, path in paths.items():
        several.load(name, AdapterFile(path), registry)
    return model, several


def alone(base: Path, path: Path | None, registry: Registry) -> mx.array:
    model = loading.load(base, registry)
    if path is not None:
        adapters.load(path, model, registry)
    return model.language_model(TOKENS)


def near(got: mx.array, want: mx.array) -> bool:
    return float(mx.abs(got - want).max()) <= 1e-5 * max(1.0, float(mx.abs(want).max()))


def test_each_is_what_it_is_alone_and_the_base_stays_what_it_was(
    files: tuple[Path, dict[str, Path]], registry: Registry
) -> None:
    base, paths = files
    model, several = loaded(base, paths, registry)
    assert mx.array_equal(model.language_model(TOKENS), alone(base, None, registry))
    for name in (*paths, None, *paths):  # switched to and fro
        several.select(name)
        want = alone(base, paths[name] if name else None, registry)
        assert mx.array_equal(model.language_model(TOKENS), want), name


@pytest.mark.parametrize("bits", [None, 4])
def test_rows_of_one_batch_are_what_each_is_alone(
    model_folder: MakeModel,
    make_adapter: Callable[[Path, str], Path],
    registry: Registry,
    bits: int | None,
) -> None:
    base = model_folder(bits=bits)
    paths = {name: make_adapter(base, name) for name in ADAPTERS}
    model, several = loaded(base, paths, registry)
    for rows in (
        ["small", "large", None, "top"],
        ["large"] * 4,
        [None] * 4,
        ["top", "top", "large", "small"],
        ["turned", "small", "scaled", "turned"],
        ["words", None, "turned", "words"],
    ):
        several.select(rows)
        got = model.language_model(TOKENS)
        for row, name in enumerate(rows):
            want = alone(base, paths[name] if name else None, registry)[row]
            assert near(got[row], want), (rows, row)


def test_a_mixture_adds_the_shares_of_the_changes(
    files: tuple[Path, dict[str, Path]], registry: Registry
) -> None:
    base, paths = files
    model, several = loaded(base, paths, registry)
    shares = {"small": 0.75, "large": -0.5, "top": 1.0}
    several.select(shares)
    held = {
        name: np.array(tensor) for name, tensor in parameters(loading.load(base, registry).module).items()
    }
    scales = {"small": 2.0, "large": 0.5, "top": 2.0}
    for name in shares:  # by numpy, on the weights
        found = {n: np.array(t) for n, t in tensor_file.load(paths[name])[0].items()}
        for place in {n.rpartition(".")[0] for n in found}:
            update = found[f"{place}.lora_a"] @ found[f"{place}.lora_b"]
            held[f"{place}.weight"] = held[f"{place}.weight"] + shares[name] * scales[name] * update.T
    dense = loading.load(base, registry)
    dense.module.load_weights([(n, mx.array(a)) for n, a in held.items()])
    want = dense.language_model(TOKENS)
    assert near(model.language_model(TOKENS), want)
    place = "layers.1.attention.wq"
    before = parameters(several.linear(place))["weight"].astype(mx.float32)
    assert near(several.fused_weight(place, before), parameters(dense.module)[f"{place}.weight"])


def test_generation_goes_on_with_a_cache_under_rows(
    files: tuple[Path, dict[str, Path]], registry: Registry
) -> None:
    base, paths = files
    model, several = loaded(base, paths, registry)
    several.select(["small", "large", "top", None])
    whole = model.language_model(TOKENS)
    cache = model.language_model.make_cache()
    parts = [
        model.language_model.run(model.language_model.embed(TOKENS[:, i : i + 1]), cache=cache)
        for i in range(6)
    ]
    assert near(model.language_model.head(mx.concatenate(parts, axis=1)), whole)
    assert near(model.language_model.head(parts[-1][:, -1]), whole[:, -1])  # (B, D), as generation asks for


def test_what_cannot_be_selected_is_told(files: tuple[Path, dict[str, Path]], registry: Registry) -> None:
    base, paths = files
    model, several = loaded(base, paths, registry)
    with pytest.raises(UsageError, match=r"no adapter 'smal' .*'small'"):
        several.select("smal")
    with pytest.raises(UsageError, match="no adapter 'none'"):
        several.select(["small", "none"])
    with pytest.raises(UsageError, match="share of small is nan"):
        several.select({"small": float("nan")})
    with pytest.raises(UsageError, match="share of small is 10000"):
        several.select({"small": 10**400})
    with pytest.raises(UsageError, match="'small' is taken"):
        several.load("small", AdapterFile(paths["top"]), registry)
    several.select(["small", "top"])
    with pytest.raises(UsageError, match="selected for 2 rows, this batch has 4"):
        model.language_model(TOKENS)


def test_one_that_does_not_load_leaves_the_others(
    files: tuple[Path, dict[str, Path]], model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    base, paths = files
    model, several = loaded(base, {"small": paths["small"]}, registry)
    several.select("small")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(paths["top"].read_bytes()[:-8])
    with pytest.raises(ModelError):
        several.load("broken", AdapterFile(broken), registry)
    assert mx.array_equal(model.language_model(TOKENS), alone(base, paths["small"], registry))
    assert list(several.adapted) == ["small"]


def test_a_mixture_with_others_is_what_its_weights_are_fused_to(
    files: tuple[Path, dict[str, Path]], registry: Registry
) -> None:
    base, paths = files
    model, several = loaded(base, paths, registry)
    shares = {"small": 0.5, "turned": 0.25, "words": -1.0}
    several.select(shares)
    dense = loading.load(base, registry)
    for place in several.paths():
        weight = parameters(several.linear(place))["weight"].astype(mx.float32)
        dense.module.load_weights([(f"{place}.weight", several.fused_weight(place, weight))], strict=False)
    assert near(model.language_model(TOKENS), dense.language_model(TOKENS))


def test_a_share_of_a_bias_in_half_precision_is_rounded_once(
    files: tuple[Path, dict[str, Path]], registry: Registry
) -> None:
    base, paths = files
    _, several = loaded(base, {"scaled": paths["scaled"]}, registry)
    several.select({"scaled": 0.3})
    place = "layers.1.attention.wk"
    outputs = several.linear(place).weight.shape[0]
    half = mx.random.normal((64, outputs), key=mx.random.key(3)).astype(mx.float16)  # many biases at once
    factors = np.array(tensor_file.load(paths["scaled"])[0][f"{place}.ia3_l"], np.float64).reshape(-1)
    exact = np.array(half, np.float64) * (1 + 0.3 * (factors - 1))
    got = several.fused_bias(place, half)
    assert got.dtype == mx.float16
    assert np.array_equal(np.array(got), exact.astype(np.float16))
