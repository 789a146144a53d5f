"""Adapters of other tools on a model: which loader, which linears, in which order, what must be given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hf_folder
import mlx.core as mx
import numpy as np
import pytest
import small_tokenizers

from mlxlora_core.errors import ModelError, PluginError
from mlxlora_core.files import tensor_file
from mlxlora_core.files.lazy_rows import neighbour_rows
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins import Component, Plugin, Registry
from mlxlora_core.specs import AdapterLoader
from mlxlora_core.values import ForeignAdapter, LazyTensor

MakeModel = Callable[..., Path]
TOKENS = mx.array([[1, 5, 7, 9, 30, 17]])
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


@pytest.fixture
def load(model_folder: MakeModel, registry: Registry) -> Callable[..., Model]:
    return lambda **options: loading.load(model_folder(**options), registry)


def tensor(*shape: int, value: Any = None) -> LazyTensor:
    held = mx.random.normal(shape) if value is None else value
    return LazyTensor(shape, "float32", lambda: held)


def pair(rank: int = 2, inputs: int = 32, outputs: int = 32) -> dict[str, LazyTensor]:
    return {"lora_a": tensor(inputs, rank), "lora_b": tensor(rank, outputs)}


def found(linears: Mapping[str, Any], **changed: Any) -> ForeignAdapter:
    good = ForeignAdapter("lora", {"rank": 2, "scale": 3.0}, linears, {"lora_b": 1})
    return dataclasses.replace(good, **changed)


def having(registry: Registry, *given: Any) -> Registry:
    """A registry whose only adapter loaders give these."""
    plugin = Plugin("odd", "odd", "1", "file", "odd")
    loaders = [
        Component(
            "adapter-loader",
            AdapterLoader(
                name=f"odd{number}",
                summary="s",
                detect=lambda path: True,
                open=lambda path, options, value=value: value,
            ),
            plugin,
        )
        for number, value in enumerate(given)
    ]
    others = [component for component in registry.components if component.kind != "adapter-loader"]
    return Registry(registry.plugins, [*others, *loaders])


def put_on(model: Model, registry: Registry, *given: Any, **arguments: Any) -> adapters.Adapted:
    return adapters.load(Path("there"), model, having(registry, *given), **arguments)


# --- places -------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["model.", "", "base_model.model.model.", "language_model.model.", "model.language_model."]
)
def test_paths_are_found_whatever_stands_in_front(
    load: Callable[..., Model], registry: Registry, prefix: str
) -> None:
    linears = {f"{prefix}layers.0.self_attn.q_proj": pair(), f"{prefix}layers.1.mlp.down_proj": pair(2, 64)}
    linears["base_model.model.lm_head"] = pair(outputs=320)
    adapted = put_on(load(), registry, found(linears))
    assert adapted.paths == ("layers.0.attention.wq", "layers.1.feed_forward.w2", "output")
    assert (adapted.config.targets, adapted.config.layers) == (("output", "w2", "wq"), 2)


@pytest.mark.parametrize(
    "path",
    [
        "vision_tower.layers.0.self_attn.q_proj",
        "layers.9.self_attn.q_proj",
        "layers.0.self_attn.qkv_proj",
        "x",
        "",
    ],
)
def test_modules_that_the_model_does_not_have(
    load: Callable[..., Model], registry: Registry, path: str
) -> None:
    model = load()
    with pytest.raises(ModelError, match="which this model does not have"):
        put_on(model, registry, found({Q: pair(), path: pair()}))
    assert adapters.trainable(model.module).keys() == adapters.trainable(load().module).keys()


def test_outputs_are_put_in_order_and_what_has_none_is_not(
    load: Callable[..., Model], registry: Registry
) -> None:
    model, held = load(), pair()
    put_on(model, registry, found({Q: held}))
    got = adapters.adapter_parameters(model.module, ["layers.0.attention.wq"])
    rows = mx.array(neighbour_rows(4, 8))
    assert mx.array_equal(got["layers.0.attention.wq.lora_a"], held["lora_a"].read())
    assert mx.array_equal(got["layers.0.attention.wq.lora_b"], held["lora_b"].read()[:, rows])
    assert not mx.array_equal(rows, mx.arange(32))


def test_options_that_differ_by_module(load: Callable[..., Model], registry: Registry) -> None:
    linears = {
        f"model.layers.{n}.self_attn.{name}": pair(rank, outputs=outputs)
        for n in (0, 1)
        for name, rank, outputs in (("q_proj", 3, 32), ("v_proj", 2 + n, 16))
    }
    overrides: dict[str, dict[str, Any]] = {
        "model.layers.0.self_attn.q_proj": {"rank": 3, "scale": 0.1},
        "model.layers.1.self_attn.q_proj": {"rank": 3, "scale": 0.1},
        V: {"rank": 3},
    }
    adapted = put_on(load(), registry, found(linears, overrides=overrides))
    assert adapted.config.overrides == ("wq: rank=3, scale=0.1", "layers.1.attention.wv: rank=3")
    assert {path: (o.rank, o.scale) for path, o in adapted.options.items()} == {
        "layers.0.attention.wq": (3, 0.1),
        "layers.1.attention.wq": (3, 0.1),
        "layers.0.attention.wv": (2, 3.0),
        "layers.1.attention.wv": (3, 3.0),
    }


def test_an_adapter_of_another_tool_is_kept_as_one_of_this_base(
    load: Callable[..., Model], registry: Registry, tmp_path: Path
) -> None:
    model = load()
    linears = {Q: pair(3), V: pair(outputs=16)}
    adapted = put_on(model, registry, found(linears, overrides={Q: {"rank": 3, "scale": 0.7}}))
    adapters.save(tmp_path / "own.safetensors", model, adapted)
    again = load()
    assert adapters.load(tmp_path / "own.safetensors", again, registry) == dataclasses.replace(
        adapted, notes=()
    )
    assert mx.array_equal(again.language_model(TOKENS), model.language_model(TOKENS))


def test_a_parameter_that_linears_of_several_sizes_share_is_cut_to_each(
    load: Callable[..., Model], registry: Registry
) -> None:
    a, down = tensor(64, 5), "model.layers.0.mlp.down_proj"
    vectors = {
        path: {"vera_a": a, "vera_b": tensor(5, 32), "lambda_d": tensor(5), "lambda_b": tensor(32)}
        for path in (Q, down)
    }
    opened = ForeignAdapter("vera", {"rank": 5}, vectors, {"vera_b": 1, "lambda_b": 0}, inputs={"vera_a": 0})
    model = load()
    adapted = put_on(model, registry, opened)
    got = adapters.adapter_parameters(model.module, adapted.paths)
    assert mx.array_equal(got["layers.0.attention.wq.vera_a"], a.read()[:32])
    assert mx.array_equal(got["layers.0.feed_forward.w2.vera_a"], a.read())


# --- fused linears ------------------------------------------------------------


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a Phi-3: wq, wk, wv are one linear there, and w1, w3."""
    folder = tmp_path_factory.mktemp("phi3")
    shapes = {name: s for name, s in hf_folder.shapes().items() if ".q_proj" not in name}
    shapes = {
        n: s for n, s in shapes.items() if not any(p in n for p in ("k_proj", "v_proj", "gate_", "up_"))
    }
    width, hidden = hf_folder.WIDTH, hf_folder.HIDDEN
    for layer in range(hf_folder.LAYERS):
        shapes[f"model.layers.{layer}.self_attn.qkv_proj.weight"] = (2 * width, width)
        shapes[f"model.layers.{layer}.mlp.gate_up_proj.weight"] = (2 * hidden, width)
    draw = np.random.default_rng(0)
    tensors = {n: mx.array(draw.standard_normal(s).astype(np.float32) * 0.1) for n, s in shapes.items()}
    hf_folder.save(folder / "model.safetensors", tensors)
    config = {**hf_folder.CONFIG, "model_type": "phi3", "max_position_embeddings": 64, "sliding_window": None}
    hf_folder.write_json(folder / "config.json", config)
    small_tokenizers.words().save(str(folder / "tokenizer.json"))
    return folder


def test_a_fused_linear_is_split_into_those_here(phi3: Path, registry: Registry) -> None:
    fused, rank = pair(3, 64, 128), 3
    model = loading.load(phi3, registry)
    opened = found({"model.layers.1.self_attn.qkv_proj": fused}, options={"rank": rank, "scale": 1.5})
    adapted = put_on(model, registry, opened)
    assert adapted.paths == tuple(f"layers.1.attention.{name}" for name in ("wk", "wq", "wv"))
    attention: Any = model.language_model.layers[1].attention
    x = mx.random.normal((5, 64))
    update = 1.5 * (x @ fused["lora_a"].read()) @ fused["lora_b"].read()
    parts = {"wq": (0, 64, 4), "wk": (64, 32, 2), "wv": (96, 32, 0)}
    for name, (start, count, heads) in parts.items():
        want = update[:, start : start + count]
        if heads:
            want = want[:, mx.array(neighbour_rows(heads, 16))]
        got = attention[name](x) - attention[name].linear(x)
        assert mx.allclose(got, want, atol=1e-4), name


def test_a_fused_linear_of_another_size_is_refused(phi3: Path, registry: Registry) -> None:
    with pytest.raises(ModelError, match=r"qkv_proj.lora_b is \(2, 96\), wanted 128 outputs"):
        put_on(
            loading.load(phi3, registry), registry, found({"layers.0.self_attn.qkv_proj": pair(2, 64, 96)})
        )


# --- loaders ------------------------------------------------------------------


def test_the_adapter_is_the_one_that_is_insisted_on(load: Callable[..., Model], registry: Registry) -> None:
    opened = found({Q: pair()})
    assert put_on(load(), registry, opened, name="lora").paths == ("layers.0.attention.wq",)
    with pytest.raises(ModelError, match="holds adapter 'lora:lora', wanted 'dora'"):
        put_on(load(), registry, opened, name="dora")
    with pytest.raises(PluginError, match="no adapter 'olora'"):
        put_on(load(), registry, found({Q: pair()}, adapter="olora"))
    with pytest.raises(ModelError, match="odd:odd0, odd:odd1 can read this adapter"):
        put_on(load(), registry, opened, opened)


def test_what_nobody_knows_is_taken_for_what_the_user_names(
    load: Callable[..., Model], registry: Registry, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    shapes = {"lora_a": (32, 2), "lora_b": (2, 32)}
    held = {f"layers.1.attention.wq.{name}": mx.random.normal(shape) for name, shape in shapes.items()}
    mx.save_safetensors(str(path), held)
    nobody = having(registry)
    with pytest.raises(
        ModelError, match=r"no adapter loader knows this file \(there is none\): it holds layers"
    ):
        adapters.load(path, load(), nobody)
    model = load()
    adapters.load(path, model, nobody, "lora", {"rank": 2, "targets": "wq", "layers": 1})
    got = adapters.trainable(model.module)
    assert all(mx.array_equal(got[name], tensor) for name, tensor in held.items())
    with pytest.raises(ModelError, match="no adapter loader knows this folder"):
        adapters.load(tmp_path, load(), nobody, "lora")
    with pytest.raises(ModelError, match="there is no such file"):
        adapters.load(tmp_path / "absent.npz", load(), nobody)


def test_a_file_that_states_a_fingerprint_is_held_against_it(
    load: Callable[..., Model], registry: Registry, tmp_path: Path
) -> None:
    path = tmp_path / "adapters.safetensors"
    held = {f"layers.1.attention.wq.{n}": mx.ones(s) for n, s in (("lora_a", (32, 2)), ("lora_b", (2, 32)))}
    tensor_file.save(path, held.items(), {}, 2)
    adapters.load(path, load(), registry)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="is damaged: its tensors are not those that were written"):
        adapters.load(path, load(), registry)


def test_an_update_of_an_embedding_alone_where_that_is_the_head_too(
    load: Callable[..., Model], registry: Registry, phi3: Path
) -> None:
    linears = {"model.embed_tokens": {"lora_a": tensor(320, 2), "lora_b": tensor(2, 32)}}
    put_on(load(), registry, found(linears, embedding_alone=True))
    tied = load()
    tied.language_model.head_path = ""
    with pytest.raises(ModelError, match="adapts tok_embeddings and not the output head"):
        put_on(tied, registry, found(linears, embedding_alone=True))
    put_on(tied, registry, found(linears))


def lying() -> LazyTensor:
    return LazyTensor((2, 32), "float32", lambda: mx.zeros((32, 2)))


BREACHES: dict[str, tuple[Any, str]] = {
    "nothing": (None, "open gives NoneType, wanted ForeignAdapter"),
    "no linear": (found({}), "an adapter of no linear"),
    "no tensors": (found({Q: {}}), f"no tensors of {Q}"),
    "an array": (found({Q: {**pair(), "lora_b": mx.zeros((2, 32))}}), "array, wanted LazyTensor"),
    "options that are a list": (found({Q: pair()}, options=[2]), "options of type list, wanted a mapping"),
    "an axis that there is not": (found({Q: pair()}, outputs={"lora_b": 2}), r"with axes \(2, None\)"),
    "a negative axis": (found({Q: pair()}, outputs={"lora_b": -1}), "axis -1 of lora_b"),
    "options of others": (found({Q: pair()}, overrides={V: {"rank": 3}}), f"options of {V}"),
    "a number for a name": (found({Q: pair()}, adapter=3), "int, wanted str"),
    "notes in one text": (found({Q: pair()}, notes="note"), "notes of type str"),
    "another shape than told": (found({Q: {**pair(), "lora_b": lying()}}), r"lora_b that reads \(32, 2\)"),
}


@pytest.mark.parametrize(("given", "says"), BREACHES.values(), ids=BREACHES)
def test_what_a_loader_gives_is_held_against_the_contract(
    load: Callable[..., Model], registry: Registry, given: Any, says: str
) -> None:
    model = load()
    with pytest.raises(PluginError, match=says):
        put_on(model, registry, given)
    assert not any("lora" in name for name in adapters.parameters(model.module))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"options": {"rank": 2, "scale": 0.0}},
            "was made with options that cannot be: .*scale must not be 0",
        ),
        ({"options": {"rank": 2, "alpha": 3}}, "was made with options that cannot be"),
        ({"options": {"rank": 3}}, "of a wrong shape"),
        ({"options": {"rank": 10**9}}, "rank 1000000000 does not fit"),
        ({"overrides": {Q: {"rank": 4}}}, "of a wrong shape"),
        ({"overrides": {Q: {"alpha": 4}}}, "the adapter does not fit this model: .*alpha"),
        ({"layout": "klingon"}, "which this model does not have"),
    ],
)
def test_options_that_do_not_fit_are_told_of_the_file(
    load: Callable[..., Model], registry: Registry, changed: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=says) as fault:
        put_on(load(), registry, found({Q: pair()}, **changed))
    assert str(fault.value).startswith("there: ")


def test_values_that_are_not_finite_leave_the_model_as_it_was(
    load: Callable[..., Model], registry: Registry
) -> None:
    model = load()
    held = {**pair(), "lora_b": tensor(2, 32, value=mx.full((2, 32), mx.inf))}
    with pytest.raises(ModelError, match=r"1 not finite: layers\.0\.attention\.wq\.lora_b"):
        put_on(model, registry, found({Q: held}))

    def gone() -> mx.array:
        raise ModelError("changed while it was read", where="there")

    with pytest.raises(ModelError, match="changed while it was read"):
        put_on(model, registry, found({Q: {**pair(), "lora_b": LazyTensor((2, 32), "float32", gone)}}))
    assert not any("lora" in name for name in adapters.parameters(model.module))
