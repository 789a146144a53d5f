from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxlora_core.errors import ModelError, PluginError, ResourceError, SafetyError
from mlxlora_core.files import tensor_file
from mlxlora_core.machine import memory
from mlxlora_core.machine.device import compute_dtype, on_cpu
from mlxlora_core.model import adapters, loading
from mlxlora_core.model import folder as folders
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of
from mlxlora_core.model.linears import StoredEmbedding, StoredLinear, linears, parameters
from mlxlora_core.model.tokenizers import open_tokenizer
from mlxlora_core.plugins import Registry, sections

MakeModel = Callable[..., Path]


@pytest.fixture
def copy(tmp_path: Path, model_folder: MakeModel) -> MakeModel:
    """A function that gives a model folder of one's own, to damage."""
    numbers = itertools.count()

    def make(**options: Any) -> Path:
        return Path(shutil.copytree(model_folder(**options), tmp_path / f"model {next(numbers)}"))

    return make


def weights(folder: Path) -> dict[str, mx.array]:
    return tensor_file.load(folder / "model.safetensors")[0]


def store(folder: Path, tensors: dict[str, mx.array], name: str = "model.safetensors") -> None:
    tensor_file.save(folder / name, tensors.items(), {}, most=len(tensors))


def configure(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def refused(folder: Path, registry: Registry, error: type[Exception] = ModelError) -> str:
    with pytest.raises(error) as caught:
        loading.load(folder, registry)
    return str(caught.value)


# --- what is loaded -----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_parameters_are_those_of_the_file_in_the_type_to_compute_in(
    model_folder: MakeModel, registry: Registry, dtype: str
) -> None:
    folder = model_folder(dtype=dtype)
    model = loading.load(folder, registry)
    got, want = parameters(model.module), weights(folder)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == compute_dtype(tensor.dtype)
        assert mx.array_equal(got[name], tensor.astype(got[name].dtype)), name


def test_loading_holds_a_tensor_twice_and_not_the_model(
    make_checkpoint: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dim=128, n_layers=12)
    result_of(convert(checkpoint, tmp_path / "model", registry, dtype="float16"))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = loading.load(tmp_path / "model", registry)
    held = sum(t.nbytes for t in parameters(model.module).values())
    assert held > 5e6
    assert mx.get_active_memory() - before < 1.05 * held
    assert mx.get_peak_memory() - before < 1.2 * held


def test_a_loaded_model_is_frozen_and_ready_to_answer(model_folder: MakeModel, registry: Registry) -> None:
    model = loading.load(model_folder(), registry)
    assert tree_flatten(model.module.trainable_parameters()) == []
    assert not model.module.training
    assert model.tokenizer.vocab_size == model.language_model.vocab_size == 320
    assert model.quantization is None
    assert model.language_model(mx.array([[1, 5, 7]])).shape == (1, 3, 320)


def test_a_quantized_folder_says_how_and_loads_packed(model_folder: MakeModel, registry: Registry) -> None:
    model = loading.load(model_folder(bits=4), registry)
    assert model.quantization is not None
    assert model.quantization.component.spec.name == "affine"
    assert (model.quantization.options.group_size, model.quantization.options.bits) == (32, 4)
    kinds = {path: type(linear).__name__ for path, linear in linears(model.module)}
    assert kinds["output"] == "Linear" and kinds["layers.0.attention.wq"] == "QuantizedLinear"
    assert tree_flatten(model.module.trainable_parameters()) == []


def test_rows_are_no_longer_than_the_context(copy: MakeModel, registry: Registry) -> None:
    model = loading.load(configure(copy(), max_seq_len=100), registry)
    assert (model.sequence_limit(2048), model.sequence_limit(50)) == (100, 50)
    model = loading.load(configure(copy(), max_seq_len=None), registry)
    assert model.sequence_limit(2048) == 2048


def test_the_fingerprint_tells_bases_apart(
    copy: MakeModel, model_folder: MakeModel, registry: Registry
) -> None:
    def mark(folder: Path) -> str:
        return loading.load(folder, registry).fingerprint

    first = mark(model_folder())
    assert mark(model_folder(seed=1)) != first
    assert mark(model_folder(bits=4)) != first
    folder = copy()
    assert mark(folder) == first
    tensors = weights(folder)
    mx.eval(tensors)
    store(folder, {"norm.weight": tensors.pop("norm.weight") * 1.0, **tensors})
    assert mark(folder) == first  # the order of tensors does not matter
    assert mark(configure(folder, rope_theta=5000.0)) != first
    configure(folder, rope_theta=10000.0)
    assert mark(folder) == first
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | {"norm.weight": mx.ones((32,))})
    assert mark(folder) == first  # a file that does not say it is measured
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | {"norm.weight": mx.ones((32,)) * 1.5})
    assert mark(folder) != first


def test_another_tokenizer_of_the_same_size_is_another_base(
    copy: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    import sentencepiece

    folder = copy()
    first = loading.load(folder, registry).fingerprint
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["other words altogether, zebras and quizzes"] * 50),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        byte_fallback=True,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=[f"<{i}>" for i in range(40)],
    )
    (folder / "tokenizer.vocab").unlink()
    files = {"tokenizer.model": folder / "tokenizer.model"}
    size = open_tokenizer(files, registry, folder).vocab_size
    configure(folder, vocab_size=size)
    tensors = weights(folder)
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = tensors[name][:size]
    store(folder, tensors)
    second = loading.load(folder, registry).fingerprint
    assert second != first


# --- folders written before -----------------------------------------------------

BEFORE = Path(__file__).parent / "before"  # by tests/reference/model_folder_before.py


def test_a_folder_and_an_adapter_written_before_still_fit(registry: Registry) -> None:
    said = json.loads((BEFORE / "said.json").read_text())
    assert "tokenizer_files" not in json.loads((BEFORE / "model" / "config.json").read_text())
    model = loading.load(BEFORE / "model", registry)
    assert model.fingerprint == said["fingerprint"]
    assert model.quantization is not None
    tokens = mx.array([[1, 300, 7, 41]])
    for name in ("base", "adapted"):
        logits = model.language_model(tokens)[0, -1, :8]
        assert mx.allclose(logits, mx.array(said[name]), rtol=1e-4, atol=1e-4), name
        if name == "base":
            adapters.load(BEFORE / "adapter.safetensors", model, registry)
    assert model.tokenizer.decode(model.tokenizer.encode("the weights")) == "the weights"


def test_lists_that_config_json_did_not_have_before_are_no_part_of_the_base(
    copy: MakeModel, registry: Registry
) -> None:
    """A checkpoint that is converted again fits the adapters made for it before."""
    folder = copy(bits=4)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("tokenizer_files") == ["tokenizer.model"]
    assert not any(config.pop("quantized").values())
    first = loading.load(folder, registry).fingerprint
    (folder / "config.json").write_text(json.dumps(config))
    assert loading.load(folder, registry).fingerprint == first


@pytest.mark.parametrize(
    "names",
    [[], "tokenizer.model", ["../x"], ["a/b"], ["a\\b"], [".."], [""], [1], {}, ["a\n"], None, ["no"]],
)
def test_a_config_that_names_other_tokenizer_files_is_refused(
    copy: MakeModel, registry: Registry, names: Any
) -> None:
    folder = configure(copy(), tokenizer_files=names)
    says = "there is no tokenizer: it lacks no" if names == ["no"] else f"tokenizer_files is {names!r}"
    assert says in refused(folder, registry).replace("\\\\n", "\\n")
    assert not folders.holds_only_a_model(folder) or names != ["no"]


# --- shards -------------------------------------------------------------------


def shard(folder: Path, names: tuple[str, str] = ("model-1.safetensors", "model-2.safetensors")) -> Path:
    tensors = sorted(weights(folder).items())
    mx.eval([tensor for _, tensor in tensors])
    (folder / "model.safetensors").unlink()
    halves = dict(tensors[:5]), dict(tensors[5:])
    for name, half in zip(names, halves, strict=True):
        store(folder, half, name)
    index = {"weight_map": {k: n for n, half in zip(names, halves, strict=True) for k in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_model(copy: MakeModel, model_folder: MakeModel, registry: Registry) -> None:
    whole, sharded = loading.load(model_folder(), registry), loading.load(shard(copy()), registry)
    assert whole.fingerprint == sharded.fingerprint
    tokens = mx.array([[1, 5, 7, 9]])
    assert mx.array_equal(whole.language_model(tokens), sharded.language_model(tokens))


def test_a_shard_that_is_absent_elsewhere_or_holds_the_same_is_refused(
    copy: MakeModel, registry: Registry
) -> None:
    folder = shard(copy())
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    for odd in ("../x.safetensors", "/etc/passwd", "a/b.safetensors"):
        index.write_text(good.replace("model-2.safetensors", odd))
        assert "shards outside its folder" in refused(folder, registry, SafetyError)
    for broken in ("{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1, "b": "x"}}', "[" * 100_000):
        index.write_text(broken)
        assert str(index) in refused(folder, registry)
    index.write_text(good)
    shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors")
    assert "another shard holds" in refused(folder, registry)
    (folder / "model-2.safetensors").unlink()
    assert "model-2.safetensors: there is no such file" in refused(folder, registry)


# --- what is refused ----------------------------------------------------------


def test_a_folder_without_a_part_is_refused(copy: MakeModel, registry: Registry, tmp_path: Path) -> None:
    assert "there is no config.json" in refused(tmp_path / "absent", registry)
    folder = copy()
    (folder / "tokenizer.model").rename(tmp_path / "tokenizer")
    assert "there is no tokenizer" in refused(folder, registry)
    (tmp_path / "tokenizer").rename(folder / "tokenizer.model")
    shutil.copy(folder / "model.safetensors", folder / "weights.npz")
    assert "there are both model.safetensors, weights.npz" in refused(folder, registry)
    (folder / "model.safetensors").unlink()
    assert "weights.npz: is truncated or damaged" in refused(folder, registry)
    (folder / "weights.npz").unlink()
    assert "there are no weights (model.safetensors, weights.npz)" in refused(folder, registry)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(
    copy: MakeModel, registry: Registry, content: bytes
) -> None:
    folder = copy()
    (folder / "config.json").write_bytes(content)
    assert "config.json:" in refused(folder, registry)


def test_a_config_of_another_model_is_refused(copy: MakeModel, registry: Registry) -> None:
    folder = copy()
    message = refused(configure(folder, model_type="gpt2"), registry)
    assert "model_type 'gpt2' is not known (there is " in message and "llama, mistral" in message
    assert "model_type" in refused(configure(folder, model_type=["llama"]), registry)
    message = refused(configure(folder, model_type="llama", n_heads=0, norm_eps="x"), registry)
    assert (
        message.startswith(f"{folder / 'config.json'}: ") and "n_heads" in message and "norm_eps" in message
    )


@pytest.mark.parametrize(
    ("quantization", "error", "says"),
    [
        ({"group_size": 32, "bits": 7}, ModelError, "'bits': must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"group_size": 32, "bitz": 4}, ModelError, "no option 'bitz'"),
        (True, ModelError, "quantization is True"),
        ([4], ModelError, "quantization is [4]"),
        ({"group_size": 64, "bits": 4}, ModelError, "the weights do not fit config.json"),
        ({"group_size": 32, "bits": 8}, ModelError, "do not belong together at 8 bits"),
        (None, ModelError, "unknown: layers.0.attention.wk.biases"),
    ],
)
def test_a_quantization_that_is_not_that_of_the_weights_is_refused(
    copy: MakeModel, registry: Registry, quantization: Any, error: type[Exception], says: str
) -> None:
    assert says in refused(configure(copy(bits=4), quantization=quantization), registry, error)


def test_a_quantizer_that_is_not_there_is_named(copy: MakeModel, registry: Registry) -> None:
    assert "no quantizer 'gptq'" in refused(configure(copy(bits=4), quantizer="gptq"), registry, PluginError)
    assert "quantization is" in refused(configure(copy(bits=4), quantizer=4), registry)


def test_all_tensors_that_do_not_fit_are_told(copy: MakeModel, registry: Registry) -> None:
    folder = copy()
    tensors = weights(folder)
    mx.eval(tensors)
    del tensors["norm.weight"]
    tensors["layers.0.ffn_norm.weight"] = mx.ones((31,))
    tensors["layers.1.ffn_norm.weight"] = mx.ones((32,), dtype=mx.int32)
    tensors["extra"] = mx.ones((1,))
    store(folder, tensors)
    message = refused(folder, registry)
    for part in (
        "1 missing: norm.weight",
        "1 unknown: extra",
        "layers.0.ffn_norm.weight is (31,), wanted (32,)",
        "layers.1.ffn_norm.weight is int32, wanted float32",
    ):
        assert part in message


def test_a_model_of_another_vocabulary_is_refused(copy: MakeModel, registry: Registry) -> None:
    folder = configure(copy(), vocab_size=319)
    tensors = weights(folder)
    mx.eval(tensors)
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = tensors[name][:319]
    store(folder, tensors)
    assert "tokenizer has 320 pieces, the model a vocabulary of 319" in refused(folder, registry)


def test_a_key_that_the_architecture_does_not_have_is_refused(copy: MakeModel, registry: Registry) -> None:
    message = refused(configure(copy(), rope_tetha=5e5), registry)
    assert "has no option 'rope_tetha' (did you mean 'rope_theta'?" in message
    message = refused(configure(copy(), hidden_size=32), registry)
    assert "is the config of a Hugging Face folder (hidden_size)" in message


def test_only_what_is_written_by_convert_counts_as_ours(copy: MakeModel) -> None:
    folder = copy()
    assert folders.holds_only_a_model(folder)
    (folder / "README.md").write_text("")
    assert not folders.holds_only_a_model(folder)
    (folder / "README.md").unlink()
    (folder / "config.json").unlink()
    assert not folders.holds_only_a_model(folder)


# --- weights that stay as they are stored --------------------------------------


@pytest.mark.skipif(not on_cpu(), reason="elsewhere weights are computed with as they are stored")
@pytest.mark.parametrize(("dtype", "bits"), [("float16", None), ("bfloat16", None), ("float16", 4)])
def test_weights_too_large_to_expand_are_expanded_on_use_and_compute_the_same(
    model_folder: MakeModel,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    bits: int | None,
) -> None:
    """Logits, gradients with respect to an adapter and to what enters, and memory."""
    folder = model_folder(dtype=dtype, bits=bits)
    expanded = loading.load(folder, registry)
    assert expanded.note == ""
    size = sum(t.nbytes for t in parameters(expanded.module).values())
    monkeypatch.setattr(loading, "free_memory_bytes", lambda: int(1.5 * size))
    stored = loading.load(folder, registry)
    assert "expanded for each product" in stored.note and "50% of" in stored.note
    assert sum(t.nbytes for t in parameters(stored.module).values()) < 0.7 * size
    assert stored.fingerprint == expanded.fingerprint

    tokens = mx.array([[5, 9, 300, 7, 7, 41]])
    lora = registry.find("adapter", "lora")
    results = []
    for model in (expanded, stored):
        adapters.attach(model, *sections.configure(lora, {"layers": -1, "targets": "all-linear"}), 0)
        model.module.update(tree_map(lambda t: t + 0.01, model.module.trainable_parameters()))

        def loss(parameters: Any, hidden: mx.array, model: Any = model) -> mx.array:
            model.module.update(parameters)
            return model.language_model.head(model.language_model.run(hidden)).square().mean()

        entering = model.language_model.embed(tokens)
        assert entering.dtype == mx.float32
        gradients = mx.grad(loss, argnums=(0, 1))(model.module.trainable_parameters(), entering)
        results.append({"logits": model.language_model(tokens), **dict(tree_flatten(gradients))})
    assert len(results[0]) > 4 and results[0].keys() == results[1].keys()
    for name, want in results[0].items():
        scale = float(mx.abs(want).max())
        assert mx.abs(results[1][name] - want).max() <= 1e-5 * scale, name


def test_a_tied_head_is_expanded_on_use_too() -> None:
    embedding = nn.Embedding(30, 8)
    embedding.weight = embedding.weight.astype(mx.float16)
    stored = StoredEmbedding(embedding)
    x = mx.random.normal((2, 3, 8))
    assert mx.abs(stored.as_linear(x) - x @ embedding.weight.astype(mx.float32).T).max() < 1e-5


def test_a_bias_is_added_to_a_weight_that_is_expanded_on_use() -> None:
    linear = nn.Linear(8, 5)
    x = mx.random.normal((2, 8))
    assert mx.abs(StoredLinear(linear)(x) - linear(x)).max() < 1e-6


def test_what_is_stored_must_fit(
    model_folder: MakeModel, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_rooms", lambda root: [memory._Room(0, 1000, "memory")])
    with pytest.raises(ResourceError, match=r"the model needs about .* of memory in all, 0.00 MB can be had"):
        loading.load(model_folder(dtype="float16"), registry)
