"""Where an adapter goes, by the names of any library, and with which options (places.py, sections.py)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora_core.errors import ModelError, UsageError
from mlxlora_core.files import tensor_file
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.adapter_targets import matches
from mlxlora_core.model.loading import Model
from mlxlora_core.options import plain
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import AdapterConfig, configure

MakeModel = Callable[..., Path]
TOKENS = mx.array([[1, 5, 7, 9, 300, 17]])


@pytest.fixture
def model(model_folder: MakeModel, registry: Registry) -> Model:
    return loading.load(model_folder(), registry)


@pytest.fixture
def tied(model_folder: MakeModel, registry: Registry, tmp_path: Path) -> Model:
    folder = Path(shutil.copytree(model_folder(), tmp_path / "tied"))
    tensors, _ = tensor_file.load(folder / "model.safetensors")
    mx.eval(tensors)
    del tensors["output.weight"]
    (folder / "model.safetensors").unlink()
    tensor_file.save(folder / "model.safetensors", tensors.items(), {}, len(tensors))
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return loading.load(folder, registry)


def attach(model: Model, registry: Registry, name: str = "lora", **values: Any) -> adapters.Adapted:
    values = {"rank": 4, **values} if name != "ia3" else values
    return adapters.attach(model, *configure(registry.find("adapter", name), values), 0)


def layers(*names: str) -> list[str]:
    return sorted(f"layers.{number}.{name}" for number in range(2) for name in names)


# --- targets ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (("q_proj", "attn_v"), layers("attention.wq", "attention.wv")),
        (("self_attn.q_proj",), layers("attention.wq")),
        (("model.layers.1.mlp.down_proj",), ["layers.1.feed_forward.w2"]),
        (("blk.0.ffn_gate",), ["layers.0.feed_forward.w1"]),
        (("layers.0.*.k_proj", "layers.1.*.up_proj"), ["layers.0.attention.wk", "layers.1.feed_forward.w3"]),
        (("attention.w*",), layers("attention.wq", "attention.wk", "attention.wv", "attention.wo")),
        (("w1", "embed_tokens"), [*layers("feed_forward.w1"), "tok_embeddings"]),
        (("token_embd",), ["tok_embeddings"]),
        (("lm_head",), ["output"]),
        (("output", "wq"), [*layers("attention.wq"), "output"]),
    ],
)
def test_targets_go_by_the_names_of_any_library(
    model: Model, registry: Registry, targets: tuple[str, ...], paths: list[str]
) -> None:
    assert list(attach(model, registry, targets=targets).paths) == paths


def test_layers_do_not_bound_embedding_and_head(model: Model, registry: Registry) -> None:
    adapted = attach(model, registry, targets=("wq", "tok_embeddings", "output"), layers=1)
    assert list(adapted.paths) == ["layers.1.attention.wq", "output", "tok_embeddings"]


def test_the_head_of_a_tied_model_is_its_embedding(tied: Model, registry: Registry) -> None:
    with pytest.raises(UsageError) as caught:
        attach(tied, registry, targets=("lm_head",))
    assert "the output head of this model is its embedding" in str(caught.value)
    assert "name tok_embeddings, which is then adapted as both" in str(caught.value)
    before = tied.language_model(TOKENS)
    attach(tied, registry, targets=("embed_tokens",))
    assert mx.allclose(tied.language_model(TOKENS), before, atol=1e-5)
    module: Any = tied.module
    shape = module.tok_embeddings.lora_a.shape
    module.tok_embeddings.lora_a = mx.random.normal(shape) * 0.1
    dense = module.tok_embeddings.fuse(module.tok_embeddings.linear.weight)
    got = tied.language_model(TOKENS)
    assert mx.abs(got - before).max() > 1e-2
    module.tok_embeddings.linear.weight = dense
    module.tok_embeddings.lora_a = mx.zeros(shape)
    assert mx.allclose(tied.language_model(TOKENS), got, atol=1e-4)


@pytest.mark.parametrize("name", ["dora", "pissa", "ia3", "vera"])
def test_an_embedding_that_is_named_and_cannot_be_adapted_is_refused(
    model: Model, registry: Registry, name: str
) -> None:
    with pytest.raises(UsageError, match=f"'{name}' does not go on embeddings, which target 'embed_tokens'"):
        attach(model, registry, name, targets=("embed_tokens", "wq"))
    assert adapters.trainable(model.module) == {}
    found = attach(model, registry, name, targets=("*",), layers=1).paths  # nobody names it here
    assert len(found) == 8 and "tok_embeddings" not in found


def test_an_adapter_may_know_where_it_goes(model: Model, registry: Registry) -> None:
    adapted = attach(model, registry, "ia3")
    assert list(adapted.paths) == layers("attention.wk", "attention.wv", "feed_forward.w2")
    assert adapted.config.targets == ("k_proj", "v_proj", "down_proj")
    module: Any = model.module.layers[0]
    assert module.feed_forward.w2.ia3_l.shape == (module.feed_forward.w2.linear.weight.shape[1],)
    assert module.attention.wk.ia3_l.shape == (module.attention.wk.linear.weight.shape[0],)


def test_patterns_are_whole_names_or_their_ends() -> None:
    names = ["layers.10.attention.wq", "model.layers.10.self_attn.q_proj"]
    for target in ("wq", "attention.wq", "layers.10.attention.wq", "q_*", "layers.1*.wq", "*"):
        assert matches(target, names), target
    for target in ("q", "0.attention", "layers.1.*", "attention", "w.", "lm_head", ""):
        assert not matches(target, names), target


# --- overrides ----------------------------------------------------------------


def test_overrides_hold_at_the_paths_that_they_match(
    model: Model, registry: Registry, tmp_path: Path
) -> None:
    overrides = ("q_proj: rank=2, scale=0.5", "layers.1.attention.wq: rank=3", "wv: rank=4")
    adapted = attach(model, registry, overrides=overrides)
    module: Any = model.module
    found = {path: (o.rank, o.scale) for path, o in adapted.options.items()}
    assert found == {
        "layers.0.attention.wq": (2, 0.5),
        "layers.0.attention.wv": (4, 2.0),
        "layers.1.attention.wq": (3, 0.5),
        "layers.1.attention.wv": (4, 2.0),
    }
    for path, options in adapted.options.items():
        wrapped = dict(module.named_modules())[path]
        assert (wrapped.lora_a.shape[1], wrapped.scale) == (options.rank, options.scale)
    adapters.save(tmp_path / "a.safetensors", model, adapted)
    again = loading.load(model.folder, registry)
    loaded = adapters.load(tmp_path / "a.safetensors", again, registry)
    assert loaded.options == adapted.options and loaded.config == adapted.config
    want = adapters.adapter_parameters(model.module, adapted.paths)
    got = adapters.adapter_parameters(again.module, loaded.paths)
    assert want.keys() == got.keys() and all(mx.array_equal(want[name], got[name]) for name in want)


def test_a_list_on_the_command_line_is_cut_at_its_commas_and_joined_again(registry: Registry) -> None:
    lora = registry.find("adapter", "lora")
    text = "wq: rank=4, scale=3, layers.*.wv: rank=2"
    _, config = configure(lora, {"overrides": text})
    assert config.overrides == ("wq: rank=4, scale=3", "layers.*.wv: rank=2")
    assert configure(lora, {"overrides": plain(config)["overrides"]})[1] == config
    assert configure(lora, {"overrides": '["wq: rank=4, scale=3","layers.*.wv:rank=2"]'})[1] == config


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("wq: rnk=4", r"adapter 'lora' at 'wq' has no option 'rnk' \(did you mean 'rank'"),
        ("wq: rank=0", "at 'wq' option 'rank': must be at least 1, got 0"),
        ("wq", "overrides must be 'PATTERN: KEY=VALUE, KEY=VALUE', got 'wq'"),
        ("wq: rank", "got 'wq: rank'"),
        (": rank=2", "got ': rank=2'"),
    ],
)
def test_an_override_that_cannot_be_is_refused_before_anything_is_loaded(
    registry: Registry, overrides: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        configure(registry.find("adapter", "lora"), {"overrides": overrides})


def test_an_override_that_matches_nothing_is_refused(model: Model, registry: Registry) -> None:
    with pytest.raises(UsageError) as caught:
        attach(model, registry, overrides=("k_proj: rank=2",))
    assert "override 'k_proj: rank=2' matches nothing that is adapted" in str(caught.value)
    assert "did you mean 'v_proj'? adapted are wq, wv" in str(caught.value)
    assert adapters.trainable(model.module) == {}


# --- frozen and shared parameters ----------------------------------------------


def test_what_is_frozen_is_kept_in_the_file_and_what_is_shared_once(
    model: Model, registry: Registry, tmp_path: Path
) -> None:
    adapted = attach(model, registry, "vera", targets=("wq", "wo", "wv"))
    module: Any = model.module
    first, second = (module.layers[number].attention for number in range(2))
    assert first.wq.vera_a is second.wq.vera_a is first.wo.vera_a is first.wv.vera_a
    assert first.wq.vera_b is first.wo.vera_b and first.wq.vera_b is not first.wv.vera_b
    for block in (first, second):  # as those of another tool would be: others than are drawn here
        block.wq.vera_a = block.wv.vera_a = block.wo.vera_a = first.wq.vera_a + (block is first)
    path = tmp_path / "a.safetensors"
    adapters.save(path, model, adapted)
    held, metadata = tensor_file.load(path)
    shared = json.loads(metadata["mlxlora"])["shared"]
    own = adapters.adapter_parameters(model.module, adapted.paths)
    assert held.keys() | shared.keys() == own.keys() and not held.keys() & shared.keys()
    assert sum(name.endswith("vera_a") for name in held) == 2
    assert sum(name.endswith("vera_b") for name in held) == 2
    again = loading.load(model.folder, registry)
    loaded = adapters.load(path, again, registry)
    got = adapters.adapter_parameters(again.module, loaded.paths)
    assert all(mx.array_equal(own[name], got[name]) for name in own)
    assert len({id(tensor) for tensor in got.values()}) == len(held)
    assert set(adapters.trainable(again.module)) == {
        f"{at}.lambda_{letter}" for at in adapted.paths for letter in "bd"
    }
    other = {name: tensor + 1 for name, tensor in own.items()}
    model.module.load_weights(list(other.items()), strict=False)
    adapters.fill(path, model, adapted)
    assert all(
        mx.array_equal(own[name], tensor)
        for name, tensor in adapters.adapter_parameters(model.module, adapted.paths).items()
    )


@pytest.mark.parametrize(
    "shared", [{"layers.0.attention.wq.lora_a": "there"}, {"there": "nowhere"}], ids=["held itself", "absent"]
)
def test_a_file_that_shares_what_it_does_not_hold_is_refused(
    model: Model, registry: Registry, tmp_path: Path, shared: dict[str, str]
) -> None:
    adapted = attach(model, registry)
    path = tmp_path / "a.safetensors"
    adapters.save(path, model, adapted)
    tensors, metadata = tensor_file.load(path)
    mx.eval(tensors)
    record = json.loads(metadata["mlxlora"]) | {"shared": shared}
    path.unlink()
    tensor_file.save(path, tensors.items(), {"mlxlora": json.dumps(record)}, len(tensors))
    with pytest.raises(ModelError, match="shares tensors that it does not hold, or holds itself"):
        adapters.load(path, loading.load(model.folder, registry), registry)


def test_the_default_config_has_no_overrides() -> None:
    assert AdapterConfig() == AdapterConfig((), 16, ())
