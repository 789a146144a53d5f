from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxlora_core.errors import DivergedError, MlxloraError, ModelError, PluginError, UsageError
from mlxlora_core.files import tensor_file
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.linears import linear_shape, linears, parameters
from mlxlora_core.model.loading import Model
from mlxlora_core.options import NoOptions
from mlxlora_core.plugins import Choice, Component, Plugin, Registry
from mlxlora_core.plugins.sections import AdapterConfig, configure
from mlxlora_core.specs import Adapter
from mlxlora_core.training.examples import Example
from mlxlora_core.training.loop import train
from mlxlora_core.training.settings import TrainConfig
from mlxlora_core.values import Place

MakeModel = Callable[..., Path]
TOKENS = mx.array([[1, 5, 7, 9, 300, 17]])


@pytest.fixture
def load(model_folder: MakeModel, registry: Registry) -> Callable[..., Model]:
    def make(**options: Any) -> Model:
        return loading.load(model_folder(**options), registry)

    return make


def adapt(model: Model, registry: Registry, seed: int = 0, trained: bool = True, **options: Any) -> Any:
    """Put an adapter on and, unless told otherwise, make it do something."""
    lora = registry.find("adapter", "lora")
    adapted = adapters.attach(model, *configure(lora, {"rank": 4, **options}), seed)
    if trained:
        shapes = {name: t.shape for name, t in adapters.trainable(model.module).items()}
        fill(model, {name: mx.random.normal(shape) * 0.1 for name, shape in shapes.items()})
    return adapted


def fill(model: Model, tensors: dict[str, mx.array]) -> None:
    model.module.load_weights(list(tensors.items()), strict=False)


def refused(
    path: Path, model: Model, registry: Registry, error: type[MlxloraError] = ModelError, **arguments: Any
) -> str:
    """The message with which a file is refused, which leaves the model as it was."""
    before = model.language_model(TOKENS)
    with pytest.raises(error) as caught:
        adapters.load(path, model, registry, **arguments)
    assert adapters.trainable(model.module) == {}
    assert {type(linear).__name__ for _, linear in linears(model.module)} <= {
        "Linear",
        "QuantizedLinear",
    }
    assert not any("lora" in name for name in parameters(model.module))
    assert mx.array_equal(model.language_model(TOKENS), before)
    return str(caught.value)


# --- putting an adapter on ----------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
def test_only_the_adapter_s_parameters_train_and_the_start_is_the_base(
    load: Callable[..., Model], registry: Registry, bits: int | None
) -> None:
    model = load(bits=bits)
    before = model.language_model(TOKENS)
    adapted = adapt(model, registry, trained=False)
    assert adapted.paths == tuple(f"layers.{i}.attention.{name}" for i in range(2) for name in ("wq", "wv"))
    assert set(adapters.trainable(model.module)) == {
        f"{path}.lora_{letter}" for path in adapted.paths for letter in "ab"
    }
    assert mx.array_equal(model.language_model(TOKENS), before)


@pytest.mark.parametrize("bits", [None, 4])
def test_training_leaves_the_base_the_same_bit_for_bit(
    load: Callable[..., Model], registry: Registry, bits: int | None
) -> None:
    model = load(bits=bits)
    before = {name: np.array(tensor) for name, tensor in parameters(model.module).items()}
    adapt(model, registry, trained=False)
    config = TrainConfig(iters=5, batch_size=2, learning_rate=0.1, optimizer="adamw", weight_decay=0.5)
    list(train(model.language_model, examples(), examples(), config, 0))
    after = {name.replace(".linear.", "."): t for name, t in parameters(model.module).items()}
    for name, tensor in before.items():
        assert np.array_equal(np.array(after[name]), tensor), name
    trained = adapters.trainable(model.module)
    assert all(mx.abs(tensor).max() > 0.1 for name, tensor in trained.items() if name.endswith("lora_b"))


def examples() -> tuple[Example, ...]:
    draw = np.random.default_rng(0)
    return tuple(
        Example(draw.integers(3, 320, length).astype(np.uint32), np.arange(length) > 0)
        for length in (9, 4, 17, 12)
    )


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({"layers": 1}, ["layers.1.attention.wq", "layers.1.attention.wv"]),
        ({"layers": 99, "targets": ("wo",)}, ["layers.0.attention.wo", "layers.1.attention.wo"]),
        ({"layers": -1, "targets": ("attention.wk",)}, ["layers.0.attention.wk", "layers.1.attention.wk"]),
        ({"targets": ("layers.0.feed_forward.w2",)}, ["layers.0.feed_forward.w2"]),
    ],
)
def test_targets_and_layers_choose_the_linears(
    load: Callable[..., Model], registry: Registry, options: dict[str, Any], paths: list[str]
) -> None:
    assert list(adapt(load(), registry, **options).paths) == paths


def test_all_linear_is_every_one_in_a_layer_and_not_the_head(
    load: Callable[..., Model], registry: Registry
) -> None:
    paths = adapt(load(), registry, targets=("all-linear",)).paths
    assert len(paths) == 14 and "output" not in paths


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"targets": ("w4",)},
            r"'w4' matches no linear .*there is output, tok_embeddings, w1, w2, w3, wk, wo, wq, wv, or all",
        ),
        ({"targets": ("wq", "w_v")}, "'w_v' matches no linear.*did you mean 'wv'"),
        ({"targets": ("layers.0.attention.wq",), "layers": 1}, "matches no linear in the top 1 layers"),
        ({"rank": 33}, "rank 33"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_the_model_left_alone(
    load: Callable[..., Model], registry: Registry, options: dict[str, Any], says: str
) -> None:
    model = load()
    with pytest.raises(UsageError, match=says):
        adapt(model, registry, **options)
    assert adapters.trainable(model.module) == {}
    assert not any("lora" in name for name in parameters(model.module))


def test_the_count_is_of_weights_and_not_of_packed_words(
    load: Callable[..., Model], registry: Registry
) -> None:
    dense, packed = load(), load(bits=4)
    total = sum(tensor.size for tensor in parameters(dense.module).values())
    assert adapters.count(dense) == {"parameters": total, "trainable_parameters": 0}
    assert adapters.count(packed) == {"parameters": total, "trainable_parameters": 0}
    for model in (dense, packed):
        adapt(model, registry)
        # wq (32, 32) and wv (16, 32) of two layers, rank 4.
        trained = 2 * 4 * (32 + 32 + 32 + 16)
        assert adapters.count(model) == {
            "parameters": total + trained,
            "trainable_parameters": trained,
        }


# --- files --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapters.npz"])
@pytest.mark.parametrize("bits", [None, 8])
def test_an_adapter_comes_back_bit_for_bit(
    load: Callable[..., Model], registry: Registry, tmp_path: Path, bits: int | None, name: str
) -> None:
    model = load(bits=bits)
    options = {"rank": 3, "scale": 1.5, "layers": 1, "targets": ("wo", "w1")}
    adapted = adapt(model, registry, **options)
    want = model.language_model(TOKENS)
    adapters.save(tmp_path / name, model, adapted)
    again = load(bits=bits)
    base = again.language_model(TOKENS)
    assert adapters.load(tmp_path / name, again, registry) == adapted
    assert mx.array_equal(again.language_model(TOKENS), want)
    assert not mx.allclose(base, want, atol=1e-3)
    trained, loaded = adapters.trainable(model.module), adapters.trainable(again.module)
    assert trained.keys() == loaded.keys()
    assert all(mx.array_equal(trained[key], loaded[key]) for key in trained)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_says_what_it_holds(load: Callable[..., Model], registry: Registry, tmp_path: Path) -> None:
    model = load()
    adapted = adapt(model, registry)
    adapters.save(tmp_path / "a.safetensors", model, adapted)
    metadata = tensor_file.load(tmp_path / "a.safetensors")[1]
    record = json.loads(metadata["mlxlora"])
    assert (record["adapter"], record["base"]) == ("lora:lora", model.fingerprint)
    assert record["options"] == {"rank": 4, "scale": 2.0, "dropout": 0.0}
    assert record["config"] == {"targets": ["wq", "wv"], "layers": 16, "overrides": []}
    assert record["paths"] == list(adapted.paths)
    assert record["versions"].keys() == {"mlxlora"}


def test_the_same_seed_gives_the_same_file_bit_for_bit_and_another_seed_another(
    load: Callable[..., Model], registry: Registry, tmp_path: Path
) -> None:
    config = TrainConfig(iters=4, batch_size=2, learning_rate=0.01)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = load()
        mx.random.seed(ord(name))
        adapted = adapt(model, registry, seed=seed, trained=False, dropout=0.1)
        list(train(model.language_model, examples(), (), config, seed))
        adapters.save(tmp_path / f"{name}.safetensors", model, adapted)
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_saved_over_good_weights(
    load: Callable[..., Model], registry: Registry, tmp_path: Path, value: float
) -> None:
    path = tmp_path / "a.safetensors"
    model = load()
    adapted = adapt(model, registry)
    adapters.save(path, model, adapted)
    good = path.read_bytes()
    name = "layers.1.attention.wv.lora_b"
    fill(model, {name: mx.full(adapters.trainable(model.module)[name].shape, value)})
    with pytest.raises(DivergedError, match=rf"not finite and was not saved: {name}"):
        adapters.save(path, model, adapted)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# --- what is refused ----------------------------------------------------------


@pytest.fixture
def saved(load: Callable[..., Model], registry: Registry, tmp_path: Path) -> Path:
    """An adapter file of rank 4 for the unquantized base."""
    model = load()
    path = tmp_path / "a.safetensors"
    adapters.save(path, model, adapt(model, registry))
    return path


def rewrite(path: Path, change: Callable[[dict[str, mx.array], dict[str, Any]], Any]) -> Path:
    """Change tensors and record of an adapter file, which then says nothing of its fingerprint."""
    tensors, metadata = tensor_file.load(path)
    mx.eval(tensors)
    record = json.loads(metadata["mlxlora"])
    change(tensors, record)
    mx.save_safetensors(str(path), tensors, {"mlxlora": json.dumps(record)})
    return path


@pytest.mark.parametrize("options", [{"seed": 1}, {"bits": 4}, {"bits": 8}, {"dtype": "float16"}])
def test_an_adapter_of_another_base_is_refused(
    load: Callable[..., Model], registry: Registry, saved: Path, options: dict[str, Any]
) -> None:
    message = refused(saved, load(**options), registry)
    assert "made for another base" in message and str(saved) in message


def test_an_adapter_of_the_same_base_in_another_format_is_taken(
    load: Callable[..., Model], registry: Registry, saved: Path
) -> None:
    adapters.load(saved, load(file_format="npz"), registry)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"name": "lora", "values": {"rank": "8"}}, "rank is 4, wanted 8"),
        ({"values": {"rank": 8, "scale": 1.0}}, "rank is 4, wanted 8, scale is 2.0, wanted 1.0"),
        ({"name": "lora", "values": {"layers": 1}}, "layers is 16, wanted 1"),
        ({"values": {"targets": "wq"}}, "targets is"),
    ],
)
def test_other_options_than_those_asked_for_are_refused(
    load: Callable[..., Model], registry: Registry, saved: Path, wanted: Any, says: str
) -> None:
    assert says in refused(saved, load(), registry, **wanted)


def test_what_is_asked_for_and_held_is_taken_and_the_rest_is_as_in_the_file(
    load: Callable[..., Model], registry: Registry, saved: Path
) -> None:
    # The file's rank is not the default: naming the adapter must not bring the default back.
    for name, values in (("lora", {}), (None, {"rank": "4"}), ("lora:lora", {"targets": "wq,wv"})):
        adapted = adapters.load(saved, load(), registry, name, values)
        assert adapted.choice.options.rank == 4


def test_another_kind_of_adapter_is_refused(
    load: Callable[..., Model], registry: Registry, saved: Path
) -> None:
    lora = registry.find("adapter", "lora")
    spec = type(lora.spec)(**{**vars(lora.spec), "name": "other"})
    more = Registry(registry.plugins, [*registry.components, type(lora)("adapter", spec, lora.plugin)])
    assert "holds adapter 'lora:lora', wanted 'other'" in refused(saved, load(), more, name="other")
    rewrite(saved, lambda tensors, record: record.update(adapter="lora:other"))
    message = refused(saved, load(), more, name="lora")
    assert "holds adapter 'lora:other', wanted 'lora'" in message
    assert "no adapter 'lora:other'" in refused(saved, load(), registry, PluginError)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, r: t.clear(), "8 missing: layers.0.attention.wq.lora_a"),
        (lambda t, r: t.pop("layers.0.attention.wq.lora_a"), "1 missing: layers.0.attention.wq.lora_a"),
        (lambda t, r: t.update(m=mx.ones(1)), "1 unknown: m"),
        (lambda t, r: r["options"].update(rank=8), "8 of a wrong shape"),
        (lambda t, r: r.update(paths=r["paths"][2:]), "4 unknown: layers.0.attention.wq.lora_a"),
        (lambda t, r: r["paths"].append("layers.0.attention.wo"), "2 missing"),
        (lambda t, r: r["paths"].append("layers.7.attention.wo"), "adapts layers.7.attention.wo, which this"),
        (lambda t, r: r["paths"].append(["wq"]), "is not what mlxlora writes"),
        (lambda t, r: r["config"].update(layers=0), "options that cannot be: adapter 'lora': layers must be"),
        (lambda t, r: t.update({k: v.astype(mx.int32) for k, v in t.items()}), "8 of a wrong type"),
        (lambda t, r: t.update({k: v * float("nan") for k, v in t.items()}), "8 not finite"),
        (lambda t, r: r["options"].update(rank=0), "options that cannot be: adapter 'lora' option 'rank'"),
        (lambda t, r: r["options"].update(alpha=1), "no option 'alpha'"),
        (lambda t, r: r.update(options=[1]), "is not what mlxlora writes"),
        (lambda t, r: r.update(base=1), "is not what mlxlora writes"),
        (lambda t, r: r.pop("adapter"), "is not what mlxlora writes"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_whole(
    load: Callable[..., Model], registry: Registry, saved: Path, change: Any, says: str
) -> None:
    if says.startswith("8 missing"):
        # An empty file of tensors cannot be written by MLX.
        metadata = tensor_file.load(saved)[1]
        del metadata[tensor_file.FINGERPRINT]
        tensor_file.save(saved, (), metadata, most=0)
    else:
        rewrite(saved, change)
    assert says in refused(saved, load(), registry)


def test_a_flipped_bit_is_found(load: Callable[..., Model], registry: Registry, saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    assert "is damaged: its tensors are not those that were written" in refused(saved, load(), registry)


# --- files of before ----------------------------------------------------------


def test_a_file_with_targets_and_layers_among_the_options_loads(
    load: Callable[..., Model], registry: Registry, saved: Path
) -> None:
    """As files were written when adapters declared them; the fingerprint is that of such a file."""
    tensors, metadata = tensor_file.load(saved)
    mx.eval(tensors)
    record = json.loads(metadata["mlxlora"])
    old = {
        "adapter": "lora:lora",
        "base": record["base"],
        "options": {"targets": ["wq", "wv"], "layers": 16, "rank": 4, "scale": 2.0, "dropout": 0.0},
        "paths": record["paths"],
        "versions": {"mlxlora": "0.1.0"},
    }
    tensor_file.save(saved, sorted(tensors.items()), {"mlxlora": json.dumps(old)}, len(tensors))
    model = load()
    adapted = adapters.load(saved, model, registry, "lora", {"layers": 16, "rank": 4})
    assert list(adapted.paths) == record["paths"]
    assert adapted.config == AdapterConfig(("wq", "wv"), 16)
    got = adapters.trainable(model.module)
    assert all(mx.array_equal(got[name], tensor) for name, tensor in tensors.items())
    assert "layers is 16, wanted 1" in refused(saved, load(), registry, values={"layers": 1})


def test_a_file_wraps_exactly_what_it_records(
    load: Callable[..., Model], registry: Registry, saved: Path
) -> None:
    """Whatever the targets would choose in this model."""
    rewrite(saved, lambda tensors, record: record["config"].update(targets=["w9"], layers=1))
    assert len(adapters.load(saved, load(), registry).paths) == 4


# --- what an adapter must not do ----------------------------------------------


class Shift(nn.Module):
    """Adds a vector; what it does wrong is up to the test."""

    def __init__(self, linear: nn.Module, name: str = "linear") -> None:
        super().__init__()
        self[name] = linear
        self.shift = mx.zeros((linear_shape(linear)[0],))

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + self.shift


def thawed(linear: nn.Module) -> nn.Module:
    shift = Shift(linear)
    shift.unfreeze()
    return shift


def whole(linear: nn.Module) -> nn.Module:
    shift = Shift(linear)
    shift.shift = mx.zeros((4,), mx.int32)
    return shift


def still(linear: nn.Module) -> nn.Module:
    shift = Shift(linear)
    shift.freeze()
    return shift


def broken(wrap: Callable[..., Any], fuse: Callable[..., Any] = lambda module, weight: weight) -> Choice:
    spec = Adapter(name="odd", summary="s", wrap=lambda linear, place, options: wrap(linear), fuse=fuse)
    return Choice(Component("adapter", spec, Plugin("odd", "odd", "1", "file", "odd")), NoOptions())


@pytest.mark.parametrize(
    ("wrap", "got", "want"),
    [
        (
            lambda linear: None,
            "None for layers.0.attention.wq, layers.0",
            "a module that trains for at least",
        ),
        (lambda linear: 3, "int", "Module"),
        (lambda linear: linear, "a Linear without the linear", "keeps it as its child 'linear'"),
        (lambda linear: Shift(linear, "base"), "a Shift without the linear", "its child 'linear'"),
        (lambda linear: Shift(nn.Linear(4, 4)), "a Shift without the linear", "its child 'linear'"),
        (thawed, "a module in which linear.weight trains", "the linear frozen"),
        (whole, "shift of type mlx.core.int32 to train", "a floating one"),
        (still, "modules without a parameter that trains", "a module that trains for at least one linear"),
    ],
)
def test_what_wrap_gives_is_checked_before_the_model_is_touched(
    load: Callable[..., Model], wrap: Callable[..., Any], got: str, want: str
) -> None:
    model = load()
    with pytest.raises(PluginError) as caught:
        adapters.attach(model, broken(wrap), AdapterConfig(), 0)
    message = str(caught.value)
    assert message.startswith(f"adapter odd:odd: wrap gives {got}") and want in message
    assert not any("shift" in name for name in parameters(model.module))


def test_a_linear_that_is_not_the_adapter_s_stays_as_it_is(load: Callable[..., Model]) -> None:
    model = load()
    places = []

    def wrap(linear: nn.Module, place: Place, options: Any) -> nn.Module | None:
        places.append(place)
        return Shift(linear) if place.layer == 1 and place.shape == (16, 32) else None

    spec = Adapter(name="some", summary="s", wrap=wrap, fuse=lambda module, weight: weight)
    choice = Choice(Component("adapter", spec, Plugin("some", "some", "1", "file", "some")), NoOptions())
    adapted = adapters.attach(model, choice, AdapterConfig(), 0)
    assert adapted.paths == ("layers.1.attention.wv",)
    assert places == [
        Place(f"layers.{layer}.attention.{name}", layer, shape)
        for layer in range(2)
        for name, shape in (("wq", (32, 32)), ("wv", (16, 32)))
    ]


def test_layers_are_found_wherever_the_model_keeps_them(load: Callable[..., Model]) -> None:
    model = load()

    class Inner(nn.Module):
        def __init__(self, layers: list[nn.Module]) -> None:
            super().__init__()
            self.blocks = layers

    class Other(nn.Module):
        def __init__(self, layers: list[nn.Module]) -> None:
            super().__init__()
            self.inner = Inner(layers)

        @property
        def layers(self) -> list[nn.Module]:
            return self.inner.blocks

    moved: Any = Other(model.language_model.layers)
    model = dataclasses.replace(model, language_model=moved)
    adapted = adapters.attach(model, broken(Shift), AdapterConfig(layers=1), 0)
    assert adapted.paths == ("inner.blocks.1.attention.wq", "inner.blocks.1.attention.wv")


def test_default_targets_are_those_of_the_architecture_or_all(
    load: Callable[..., Model], registry: Registry
) -> None:
    model = load()
    assert adapters.attach(model, broken(Shift), AdapterConfig(), 0).config.targets == ("wq", "wv")
    architecture = model.architecture
    spec = dataclasses.replace(architecture.spec, default_targets=())
    model = dataclasses.replace(load(), architecture=dataclasses.replace(architecture, spec=spec))
    adapted = adapters.attach(model, broken(Shift), AdapterConfig(), 0)
    assert adapted.config.targets == ("all-linear",)
    assert len(adapted.paths) == 14


# --- files of other tools -----------------------------------------------------


def foreign(path: Path, rank: int = 8, layers: int = 2) -> dict[str, mx.array]:
    """What mlx-examples/lora writes: a plain mx.savez of float32 tensors, and no word about them."""
    tensors = {}
    for layer in range(2 - layers, 2):
        for name, outputs in (("wq", 32), ("wv", 16)):
            place = f"layers.{layer}.attention.{name}"
            tensors[f"{place}.lora_a"] = mx.random.normal((32, rank)) * 0.1
            tensors[f"{place}.lora_b"] = mx.random.normal((rank, outputs)) * 0.1
    mx.savez(str(path), **tensors)
    return tensors


def test_a_file_that_says_nothing_is_the_default_adapter_with_the_options_given(
    load: Callable[..., Model], registry: Registry, tmp_path: Path
) -> None:
    path = tmp_path / "adapters.npz"
    tensors = foreign(path)
    model = load()
    adapted = adapters.load(path, model, registry)
    assert adapted.choice.options.rank == 8
    got = adapters.trainable(model.module)
    assert all(mx.array_equal(got[name], tensor) for name, tensor in tensors.items())
    x = mx.random.normal((3, 32))
    wq: Any = model.language_model.layers[0].attention.wq
    a, b = (tensors[f"layers.0.attention.wq.lora_{letter}"] for letter in "ab")
    assert mx.allclose(wq(x), wq.linear(x) + 2.0 * (x @ a) @ b, atol=1e-6)
    assert [note.replace(str(path), "FILE") for note in adapted.notes] == [
        "FILE was read as lora by mlx-lm: rank 8 and 4 linears; which model it was made for cannot be "
        "checked, only that its shapes fit",
        "FILE does not say its scale: 2.0 is assumed (say another with --set adapter.scale=VALUE)",
    ]


@pytest.mark.parametrize("rank", [1, 4, 8, 16])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_rank_and_places_are_read_off_the_tensors(
    load: Callable[..., Model], registry: Registry, tmp_path: Path, rank: int, layers: int, ending: str
) -> None:
    path = tmp_path / f"adapters.{ending}"
    tensors = foreign(tmp_path / "made.npz", rank, layers)
    if ending == "npz":
        mx.savez(str(path), **tensors)
    else:
        mx.save_safetensors(str(path), tensors)
    model = load()
    adapted = adapters.load(path, model, registry)
    assert (adapted.choice.options.rank, adapted.config.layers) == (rank, layers)
    assert adapted.config.targets == ("wq", "wv")
    got = adapters.trainable(model.module)
    assert got.keys() == tensors.keys() and all(mx.array_equal(got[name], t) for name, t in tensors.items())
    # Kept from here on as an adapter of this base, with all that was read and assumed.
    adapters.save(tmp_path / "own.safetensors", model, adapted)
    again = adapters.load(tmp_path / "own.safetensors", load(), registry)
    assert again == dataclasses.replace(adapted, notes=())


def test_any_linears_may_be_adapted_by_a_foreign_file(
    load: Callable[..., Model], registry: Registry, tmp_path: Path
) -> None:
    shapes = {"layers.0.attention.wk": (32, 16), "layers.1.feed_forward.w2": (64, 32)}
    tensors = {f"{at}.lora_a": mx.ones((shape[0], 2)) for at, shape in shapes.items()}
    tensors |= {f"{at}.lora_b": mx.ones((2, shape[1])) for at, shape in shapes.items()}
    mx.savez(str(tmp_path / "a.npz"), **tensors)
    adapted = adapters.load(tmp_path / "a.npz", load(), registry)
    assert adapted.paths == tuple(shapes)
    assert (adapted.config.targets, adapted.config.layers) == (("w2", "wk"), 2)


def test_what_is_stated_of_a_foreign_file_is_taken_and_must_not_differ(
    load: Callable[..., Model], registry: Registry, tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    foreign(path, rank=4, layers=1)
    adapted = adapters.load(path, load(), registry, values={"scale": "20", "rank": "4", "layers": 1})
    assert (adapted.choice.options.scale, len(adapted.notes)) == (20.0, 1)
    adapters.load(path, load(), registry, values={"targets": "wq,wv", "layers": 1})
    for values, says in (
        ({"rank": 8}, "rank is 4, wanted 8"),
        ({"layers": 2}, "are not the targets and layers that are asked for"),
        ({"targets": "wq", "layers": 1}, "are not the targets and layers that are asked for"),
    ):
        assert says in refused(path, load(), registry, values=values)


# A Llama's linear here -> its path in Hugging Face's libraries and in mlx-lm.
THEIR_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def in_their_order(b: np.ndarray, heads: int) -> np.ndarray:
    """The outputs of queries or keys, axis 1, as the conversion to Hugging Face's layout permutes them."""
    rank, outputs = b.shape
    pairs = b.reshape(rank, heads, outputs // heads // 2, 2)
    return pairs.transpose(0, 1, 3, 2).reshape(rank, outputs)


@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model."])
def test_a_file_of_mlx_lm_does_here_what_it_does_there(
    load: Callable[..., Model], registry: Registry, tmp_path: Path, prefix: str
) -> None:
    ours = load()
    adapted = adapt(ours, registry, targets="all-linear", layers=-1, scale=20.0)
    theirs = {}
    for name, tensor in adapters.trainable(ours.module).items():
        parts = re.fullmatch(r"layers\.(\d)\.(.+)\.(lora_[ab])", name)
        assert parts is not None, name
        layer, place, part = parts.groups()
        value = np.array(tensor)
        if part == "lora_b" and place in ("attention.wq", "attention.wk"):
            value = in_their_order(value, 4 if place == "attention.wq" else 2)
        theirs[f"{prefix}layers.{layer}.{THEIR_NAMES[place]}.{part}"] = mx.array(value)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), theirs)
    config = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 4, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = load()
    got = adapters.load(tmp_path / "adapters.safetensors", model, registry)
    want = adapters.trainable(ours.module)
    assert all(mx.array_equal(t, want[name]) for name, t in adapters.trainable(model.module).items())
    assert mx.allclose(model.language_model(TOKENS), ours.language_model(TOKENS), atol=1e-5)
    assert (got.choice.options.scale, sorted(got.paths)) == (20.0, sorted(adapted.paths))
    assert [note for note in got.notes if "scale" in note] == [got.notes[0]] and "scale 20.0" in got.notes[0]
    (tmp_path / "adapter_config.json").unlink()
    assert (
        "its scale: 2.0 is assumed"
        in adapters.load(tmp_path / "adapters.safetensors", load(), registry).notes[1]
    )


def both(path: str, a: tuple[int, ...] = (32, 4), b: tuple[int, ...] = (4, 32)) -> dict[str, mx.array]:
    return {f"{path}.lora_a": mx.ones(a), f"{path}.lora_b": mx.ones(b)}


WQ, DEEP = "layers.0.attention.wq", "layers.1.attention.wq"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (both(WQ) | both(DEEP) | {f"{WQ}.m": mx.ones((32,))}, f"lacks {DEEP}.m"),
        ({f"{WQ}.lora_a": mx.ones((32, 4))}, f"lacks {WQ}.lora_b"),
        (both(WQ) | {f"{DEEP}.lora_b": mx.ones((4, 32))}, f"lacks {DEEP}.lora_a"),
        (both(WQ, (32, 4), (8, 32)), "no product (inputs, R) times (R, outputs)"),
        (both(WQ, (4, 32), (32, 4)) | both(DEEP), "has updates of several ranks: 4, 32"),
        (both(WQ, (32, 4, 1)), "no product"),
        (both(WQ, (32, 0), (0, 32)), "no product"),
        (both(WQ, (16, 4)), "of a wrong shape"),
        (both(WQ, (32, 64), (64, 32)), "rank 64 does not fit a linear"),
        (both("layers.7.attention.wq"), "adapts layers.7.attention.wq, which this model does not have"),
        (both("model.layers.7.self_attn.q_proj"), "adapts model.layers.7.self_attn.q_proj, which"),
        (both("model.layers.0.self_attn.q_proj", (16, 4)), "of a wrong shape"),
        (both(WQ) | both("model.layers.0.self_attn.q_proj"), f"adapts {WQ} under two names"),
        (both("output"), "1 of a wrong shape"),
        (both("model.vision_tower.layers.0.self_attn.q_proj"), "which this model does not have"),
        (
            {WQ + ".weight": mx.ones((32, 32))},
            "mlx-lm, peft): it holds layers.0.attention.wq.weight",
        ),
        (both(WQ) | {"norm.weight": mx.ones((32,))}, "holds norm.weight beside the updates"),
        ({}, "holds no"),
    ],
)
def test_a_foreign_file_that_does_not_fit_is_one_line(
    load: Callable[..., Model], registry: Registry, tmp_path: Path, tensors: dict[str, mx.array], says: str
) -> None:
    path = tmp_path / "adapters.safetensors"
    mx.save_safetensors(str(path), tensors)
    message = refused(path, load(), registry)
    assert says in message and str(path) in message and len(message) < 2000


def test_another_base_is_allowed_when_asked_for_and_told(
    load: Callable[..., Model], registry: Registry, saved: Path
) -> None:
    """What was trained on a quantized base goes on the dense one, and the other way round."""
    tensors, _ = tensor_file.load(saved)
    for options in ({"bits": 4}, {"bits": 8}, {"dtype": "float16"}, {"seed": 1}):
        model = load(**options)
        adapted = adapters.load(saved, model, registry, any_base=True)
        assert len(adapted.notes) == 1 and "made for another base" in adapted.notes[0]
        got = adapters.trainable(model.module)
        assert all(mx.array_equal(got[name], tensor) for name, tensor in tensors.items())
    assert adapters.load(saved, load(), registry, any_base=True).notes == ()


def test_half_precision_tensors_train_in_the_adapter_s_own_type(
    load: Callable[..., Model], registry: Registry, tmp_path: Path
) -> None:
    tensors = {name: t.astype(mx.float16) for name, t in foreign(tmp_path / "a.npz").items()}
    mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors)
    model = load()
    adapters.load(tmp_path / "a.safetensors", model, registry)
    assert {t.dtype for t in adapters.trainable(model.module).values()} == {mx.float32}


def test_an_absent_or_damaged_file_is_refused(
    load: Callable[..., Model], registry: Registry, saved: Path, tmp_path: Path
) -> None:
    model = load()
    assert "no such file" in refused(tmp_path / "b.npz", model, registry)
    assert "got '.pth'" in refused(tmp_path / "b.pth", model, registry)
    shutil.copy(saved, tmp_path / "b.npz")
    assert "is truncated or damaged" in refused(tmp_path / "b.npz", model, registry)
    saved.write_bytes(saved.read_bytes()[:-1])
    assert "bytes, its header needs" in refused(saved, model, registry)
