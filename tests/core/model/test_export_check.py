"""The check of an export by itself: what is right passes in numbers, and no planted fault does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import small_models

from mlxlora_core.errors import ModelError
from mlxlora_core.files import lazy_tensors, save_tensors
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.events import result_of
from mlxlora_core.model.export import ExportReport, export
from mlxlora_core.model.export_check import ExportCheck
from mlxlora_core.plugins import Choice, Component, Plugin, Registry
from mlxlora_core.plugins.sections import configure
from mlxlora_core.specs import Exporter, NoOptions
from mlxlora_core.values import ExportSource, LazyTensor

HF = small_models.REGISTRY.find("exporter", "hf")
MLX_LM = small_models.REGISTRY.find("exporter", "mlx-lm")
GGUF = small_models.REGISTRY.find("exporter", "gguf")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that gives a folder of a family, made once."""
    made: dict[tuple[str, str], Path] = {}

    def folder(family: str, dtype: str = "float32") -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = small_models.write(
                tmp_path_factory.mktemp("hf") / family.replace(" ", "-"), family, dtype
            )
        return made[family, dtype]

    return folder


def adapter_of(base: Path, registry: Registry, path: Path, name: str = "lora") -> AdapterFile:
    """An adapter, of all linears if it goes on all, that changes what the model computes."""
    model = loading.load(base, registry)
    options = {} if name == "ia3" else {"rank": 2, "targets": ("all-linear",)}
    choice, config = configure(registry.find("adapter", name), options)
    adapted = adapters.attach(model, choice, config, seed=1)
    held = adapters.trainable(model.module)
    model.module.load_weights(
        [
            (n, (t if name != "lora" else 0) + mx.random.normal(t.shape, key=mx.random.key(i)) * 0.1)
            for i, (n, t) in enumerate(held.items())
        ],
        strict=False,
    )
    adapters.save(path, model, adapted)
    return AdapterFile(path)


def by(component: Component, then: Callable[[Path], Any], before: Any = None, **options: Any) -> Choice:
    """An exporter that spoils what it has written, or what it is given."""
    real = component.spec.export

    def spoilt(source: ExportSource, target: Path, options: Any) -> None:
        real(before(source) if before else source, target, options)
        then(target)

    spec = replace(component.spec, export=spoilt)
    plugin = Plugin("odd", "odd", "1", "installed", "odd")
    return Choice(Component("exporter", spec, plugin), spec.options(**options))


def checked(
    base: Path, target: Path, choice: Choice, registry: Registry, fused: AdapterFile | None = None
) -> ExportCheck:
    report: ExportReport = result_of(export(base, target, choice, registry, fused=fused))
    assert report.check is not None
    return report.check


def plainly(component: Component, **options: Any) -> Choice:
    return Choice(component, component.spec.options(**options))


# --- what is right ------------------------------------------------------------


@pytest.mark.parametrize("family", small_models.FAMILIES)
@pytest.mark.parametrize("component", [HF, MLX_LM], ids=lambda component: component.spec.name)
def test_each_family_comes_out_to_the_bit(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path, family: str, component: Component
) -> None:
    base = folders(family, "bfloat16")
    found = checked(base, tmp_path / "out", plainly(component), registry)
    assert (found.rounded, found.distance, found.same_argmax) == (0, 0.0, 1.0)
    want, got = lazy_tensors(base / WEIGHTS), lazy_tensors(tmp_path / "out" / WEIGHTS)
    assert got.keys() == want.keys() and found.exact >= len(want)
    assert all(mx.array_equal(got[name].read(), want[name].read()) for name in want)
    assert {got[name].dtype for name in want} == {"bfloat16"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    ours = small_models.REGISTRY.find("architecture", small_models.FAMILIES[family][0])
    assert loading.load(tmp_path / "out", registry).architecture.spec.name == ours.spec.name


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "ia3", "vera"])
def test_an_adapter_in_float32_leaves_nothing_but_the_order_of_sums(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path, name: str
) -> None:
    base = folders("llama")
    adapter = adapter_of(base, registry, tmp_path / "adapter.safetensors", name)
    found = checked(base, tmp_path / "out", plainly(HF), registry, adapter)
    assert found.rounded == 0 and 0 < found.distance < 1e-5
    # And it does change what the model computes.
    plain = checked(base, tmp_path / "plain", plainly(HF), registry)
    assert plain.distance == 0
    one, two = (loading.load(tmp_path / name, registry).language_model for name in ("out", "plain"))
    ids = mx.array([[5, 6, 7]])
    assert mx.abs(one(ids) - two(ids)).max() > 1e-2


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("float16", 1e-5, 2.0**-10), ("bfloat16", 1e-4, 2.0**-7)]
)
def test_a_smaller_type_is_told_by_how_much_it_rounds(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path, dtype: str, least: float, most: float
) -> None:
    found = checked(folders("llama"), tmp_path / "out", plainly(HF, dtype=dtype), registry)
    assert found.exact == 0 and found.rounded == 21
    assert least < found.largest_rounding < most and least < found.distance < 20 * most


def test_packed_weights_with_an_adapter_are_held_against_the_adapted_model(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    from mlxlora_core import cli

    base = tmp_path / "model"
    command = ["convert", "--torch-path", folders("phi3"), "--mlx-path", base, "-q", "--q-group-size", 32]
    assert cli.execute([*map(str, command)]) == 0
    adapter = adapter_of(base, registry, tmp_path / "adapter.safetensors")
    plain = checked(base, tmp_path / "plain", plainly(MLX_LM), registry)
    assert (plain.rounded, plain.distance) == (0, 0.0)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4 and config["quantization_config"] == config["quantization"]
    assert "model.layers.0.self_attn.qkv_proj.scales" in lazy_tensors(tmp_path / "plain" / WEIGHTS)
    tuned = checked(base, tmp_path / "tuned", plainly(MLX_LM), registry, adapter)
    assert tuned.rounded == 0 and 1e-3 < tuned.distance < 0.5
    dense = checked(base, tmp_path / "dense", plainly(HF), registry, adapter)
    assert dense.rounded == 0 and dense.distance < 1e-5


def test_eight_bits_that_q8_0_counts_from_another_number_are_no_other_model(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    """Of mlxlora itself, and of a Q8_0 whose weights an adapter has changed."""
    from mlxlora_core import cli

    base, gguf = tmp_path / "model", tmp_path / "out.gguf"
    command = ["convert", "--model", folders("llama"), "--mlx-path", base, "-q"]
    assert cli.execute([*map(str, command), "--q-bits", "8", "--q-group-size", "32"]) == 0
    made = checked(base, gguf, plainly(GGUF), registry)
    assert made.rounded >= 14 and 1e-3 < made.largest_rounding < 0.01 and made.distance < 0.05
    again = checked(gguf, tmp_path / "again.gguf", plainly(GGUF), registry)
    assert (again.rounded, again.distance) == (0, 0.0)
    adapter = adapter_of(gguf, registry, tmp_path / "adapter.safetensors")
    tuned = checked(gguf, tmp_path / "tuned.gguf", plainly(GGUF), registry, adapter)
    assert tuned.rounded == 14 and 1e-3 < tuned.largest_rounding < 0.01 and tuned.distance < 0.05


# --- faults that are planted --------------------------------------------------


def tensors(change: Callable[[dict[str, LazyTensor]], Mapping[str, LazyTensor]]) -> Callable[[Path], None]:
    """What writes the weights again, changed."""

    def spoil(target: Path) -> None:
        held = {name: _kept(tensor) for name, tensor in lazy_tensors(target / WEIGHTS).items()}
        save_tensors(target / WEIGHTS, change(held), {"format": "pt"})

    return spoil


def _kept(tensor: LazyTensor) -> LazyTensor:
    array = tensor.read()
    mx.eval(array)
    return LazyTensor(array.shape, tensor.dtype, lambda: array)


def turned(name: str, function: Callable[[mx.array], mx.array]) -> Callable[[Path], None]:
    """What changes one tensor."""

    def change(held: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        made = function(held[name].read())
        return {**held, name: LazyTensor(made.shape, held[name].dtype, lambda: made)}

    return tensors(change)


def document(file: str, **changed: Any) -> Callable[[Path], None]:
    """What changes keys of a JSON file; None takes one away."""

    def spoil(target: Path) -> None:
        path = target / file
        held = {**json.loads(path.read_text()), **changed}
        path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return spoil


def permuted_again(weight: mx.array) -> mx.array:
    """Rows of heads of 16 ordered once more."""
    return weight.reshape(-1, 2, 8, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def swapped(held: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    gate, up = ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")
    return {**held, gate: held[up], up: held[gate]}


def doubled_head(held: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {**held, "lm_head.weight": held["model.embed_tokens.weight"]}


def other_splits(target: Path) -> None:
    """The same vocabulary, but texts are cut into single letters first."""
    path = target / "tokenizer.json"
    held = json.loads(path.read_text())
    held["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "."}
    path.write_text(json.dumps(held))


QUERIES, KEYS = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
ROPE = {"rope_theta": 5e5, "rope_parameters": None}
FAULTS: Mapping[str, tuple[str, Callable[[Path], Any], str]] = {
    "queries permuted again": ("llama", turned(QUERIES, permuted_again), "attention.wq.weight differs by 1"),
    "keys permuted again": ("qwen3", turned(KEYS, permuted_again), "attention.wk.weight differs by 1"),
    "one more in a norm": (
        "gemma2",
        turned("model.layers.1.input_layernorm.weight", lambda w: w + 1),
        "layers.1.attention_norm.weight differs",
    ),
    "one less in the last norm": (
        "gemma3",
        turned("model.norm.weight", lambda w: w - 1),
        "norm.weight differs",
    ),
    "gate and up swapped": ("llama", tensors(swapped), "feed_forward.w1.weight differs"),
    "half of a fused linear": (
        "phi3",
        turned("model.layers.0.mlp.gate_up_proj.weight", lambda w: mx.concatenate([w[:96], w[:96]])),
        "feed_forward.w3.weight differs",
    ),
    "one bit of one number": (
        "llama",
        turned(QUERIES, lambda w: w + mx.zeros_like(w).at[3, 5].add(w[3, 5] * 2.0**-20)),
        "attention.wq.weight differs by",
    ),
    "a tied head twice": ("llama tied", tensors(doubled_head), "tie_word_embeddings is False, wanted True"),
    "a head that is said to be tied": (
        "llama",
        tensors(lambda held: {n: t for n, t in held.items() if n != "lm_head.weight"}),
        "lm_head.weight",
    ),
    "a tensor more": (
        "llama",
        tensors(lambda held: {**held, "model.layers.9.mlp.up_proj.weight": held[QUERIES]}),
        "model.layers.9.mlp.up_proj.weight",
    ),
    "another rope base": ("llama", document("config.json", **ROPE), "rope_theta is 500000.0, wanted 10000.0"),
    "no scaling of the rope": (
        "llama tied",
        document("config.json", rope_scaling=None, rope_parameters=None),
        "by its config the model computes something else: by",
    ),
    "another eps": ("qwen2", document("config.json", rms_norm_eps=1e-6), "norm_eps is 1e-06, wanted 1e-05"),
    "no window": (
        "mistral",
        document("config.json", sliding_window=4096),
        "sliding_window is 4096, wanted 24",
    ),
    "another context": ("olmo2", document("config.json", max_position_embeddings=128), "max_seq_len is 128"),
    "another cap": ("gemma2", document("config.json", attn_logit_softcapping=30.0), "attn_logit_softcapping"),
    "another end id": ("llama", document("generation_config.json", eos_token_id=[1, 2]), "texts end with"),
    "a dropped chat template": (
        "llama",
        document("tokenizer_config.json", chat_template=None),
        "a conversation of 1 messages has other ids",
    ),
    "no begin id": ("llama", document("tokenizer_config.json", add_bos_token=False), "texts begin with"),
    "other cuts": ("llama", other_splits, "its tokenizer has other ids for"),
    "no tokenizer": ("llama", lambda target: (target / "tokenizer.json").unlink(), "there is no tokenizer"),
    "half a file": (
        "llama",
        lambda target: (target / WEIGHTS).write_bytes((target / WEIGHTS).read_bytes()[:-5000]),
        "exporter 'odd:hf' has written another model",
    ),
    "no weights": ("llama", lambda target: (target / WEIGHTS).unlink(), "has written another model"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_planted_fault_is_4_in_one_line_and_leaves_nothing(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path, case: str
) -> None:
    family, spoil, words = FAULTS[case]
    with pytest.raises(ModelError) as caught:
        checked(folders(family), tmp_path / "out", by(HF, spoil), registry)
    told = str(caught.value)
    assert words in told and "which was not kept" in told
    assert "\n" not in told and len(told.encode()) < 2000 and str(tmp_path) not in told
    assert caught.value.exit_code == 4 and list(tmp_path.iterdir()) == []


def test_an_export_that_is_there_stays_when_its_successor_is_wrong(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    checked(folders("llama"), target, plainly(HF), registry)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    wrong = by(HF, turned(QUERIES, permuted_again))
    with pytest.raises(ModelError, match="was not kept"):
        result_of(export(folders("llama"), target, wrong, registry, overwrite=True))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_does_not_hide_a_fault(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path, dtype: str
) -> None:
    wrong = by(HF, turned(KEYS, lambda w: w * 1.02), dtype=dtype)
    with pytest.raises(
        ModelError, match=rf"wk\.weight differs by 0\.02\d? of its size, where {dtype} explains"
    ):
        checked(folders("llama"), tmp_path / "out", wrong, registry)


def test_an_adapter_that_was_left_out_is_found(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = folders("llama")
    adapter = adapter_of(base, registry, tmp_path / "adapter.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    plain = lazy_tensors(base / WEIGHTS)[name].read()
    with pytest.raises(ModelError, match=r"layers\.1\.attention\.wv\.weight differs"):
        checked(base, tmp_path / "out", by(HF, turned(name, lambda w: plain)), registry, adapter)


def test_memory_of_the_check_does_not_grow_with_the_model(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What MLX holds at most while a model of 12 layers is compared and computes."""
    sizes: dict[str, Any] = {"n_layers": 12, "dim": 256, "hidden_dim": 512}
    name, more = small_models.FAMILIES["llama"]
    monkeypatch.setitem(small_models.FAMILIES, "large", (name, {**more, **sizes}))
    base = small_models.write(tmp_path / "base", "large")
    size = (base / WEIGHTS).stat().st_size
    events = export(
        base, tmp_path / "out", plainly(HF), registry, told=lambda what, done, count: mx.clear_cache()
    )
    next(events)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    report = result_of(events)
    assert report.check is not None and report.check.distance == 0
    largest = 512 * 256 * 4
    assert size > 30 * largest
    assert mx.get_peak_memory() - before < 8 * largest


def test_an_exporter_that_nothing_reads_is_not_checked(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    spec = replace(HF.spec, opens="")
    choice = Choice(replace(HF, spec=spec), spec.options())
    assert result_of(export(folders("llama"), tmp_path / "out", choice, registry)).check is None


def test_logits_are_those_of_the_model_in_memory(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    """The streamed model computes what the loaded one does."""
    from mlxlora_core.model.export_check import text_of
    from mlxlora_core.model.own_weights import own_tensors
    from mlxlora_core.model.streaming import stream

    for family in small_models.FAMILIES:
        base = folders(family)
        loaded = loading.load(base, registry)
        ids = text_of(loaded.tokenizer, loaded.language_model)
        outline, stored = loading.outline(base, registry)
        stream(outline.module, own_tensors(outline, stored, None))
        want, got = (np.array(model.language_model(ids)) for model in (loaded, outline))
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max(), family


# --- an adapter alone ---------------------------------------------------------


def alone(
    change: Callable[[dict[str, mx.array]], Mapping[str, mx.array]] = lambda held: held, scale: float = 2.0
) -> Choice:
    """An exporter of adapters in one file, which may spoil the tensors or the scale."""

    def write(source: ExportSource, target: Path, options: Any) -> None:
        assert source.adapter is not None and not source.tensors
        made = change({name: tensor.read() for name, tensor in source.adapter.tensors.items()})
        record = json.loads(source.adapter.metadata["mlxlora"])
        record["options"]["scale"] = scale
        record["paths"] = sorted({name.rpartition(".")[0] for name in made})
        held = {n: LazyTensor(t.shape, "float32", lambda t=t: t.astype(mx.float32)) for n, t in made.items()}
        save_tensors(target / "held.safetensors", held, {"mlxlora": json.dumps(record)})

    spec = Exporter(
        name="alone", summary="s", export=write, takes="adapter", ending=".safetensors", opens="adapter"
    )
    plugin = Plugin("alone", "alone", "1", "installed", "alone")
    return Choice(Component("exporter", spec, plugin), NoOptions())


def test_an_adapter_alone_is_held_against_the_one_that_is_on_the_model(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = folders("llama")
    adapter = adapter_of(base, registry, tmp_path / "adapter.safetensors")
    found = checked(base, tmp_path / "out.safetensors", alone(), registry, adapter)
    assert (found.exact, found.rounded, found.distance, found.tokens) == (14, 0, 0.0, 64)
    half = alone(lambda held: {name: t.astype(mx.bfloat16) for name, t in held.items()})
    rounded = checked(base, tmp_path / "half.safetensors", half, registry, adapter)
    assert rounded.rounded == 14 and 1e-4 < rounded.largest_rounding < 2.0**-7
    assert 1e-6 < rounded.distance < 1e-2


TURNED = "layers.0.attention.wq.lora_b"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (alone(scale=4.0), "is changed otherwise: by 1 of the change"),
        (
            alone(lambda held: {**held, TURNED: permuted_again(held[TURNED].T).T}),
            "layers.0.attention.wq is changed otherwise",
        ),
        (
            alone(lambda held: {n: t for n, t in held.items() if "layers.1" in n}),
            "leaves out layers.0",
        ),
        (alone(lambda held: {n: mx.zeros_like(t) for n, t in held.items()}), "is changed otherwise: by 1 of"),
    ],
    ids=["another scale", "rows in another order", "linears left out", "nothing in it"],
)
def test_a_fault_in_an_adapter_alone_is_4_and_leaves_nothing(
    folders: Callable[..., Path], registry: Registry, tmp_path: Path, choice: Choice, words: str
) -> None:
    base = folders("llama")
    adapter = adapter_of(base, registry, tmp_path / "adapter.safetensors")
    with pytest.raises(ModelError) as caught:
        checked(base, tmp_path / "out.safetensors", choice, registry, adapter)
    assert words in str(caught.value) and "was not kept" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]
