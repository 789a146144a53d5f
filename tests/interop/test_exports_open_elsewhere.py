"""What is exported opens in the programs that it is for, with the numbers that the model has here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import small_models
import torch

import mlxlora_core
from mlxlora_core import cli
from mlxlora_core.model import adapters, loading
from mlxlora_core.plugins.sections import configure

transformers: Any = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'mlxlora[interop]'"
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")
REGISTRY = small_models.REGISTRY
TOKENS = 40  # more than the windows of the small models
EXACT = 1e-5


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family, in float32."""
    made = tmp_path_factory.mktemp("bases")
    return {family: small_models.write(made / family, family) for family in small_models.FAMILIES}


def adapter_of(base: Path, path: Path) -> Path:
    """A low-rank update of all linears that changes what the model computes."""
    model = loading.load(base, REGISTRY)
    choice, config = configure(REGISTRY.find("adapter", "lora"), {"rank": 2, "targets": ("all-linear",)})
    adapted = adapters.attach(model, choice, config, seed=1)
    held = adapters.trainable(model.module)
    keys = mx.random.split(mx.random.key(5), len(held))
    drawn = [
        (n, mx.random.normal(t.shape, key=k) * 0.1) for (n, t), k in zip(held.items(), keys, strict=True)
    ]
    model.module.load_weights(drawn, strict=False)
    adapters.save(path, model, adapted)
    return path


def ids_of(base: Path) -> np.ndarray:
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(2).integers(4, min(vocabulary, 400), (1, TOKENS))


def ours(base: Path, ids: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    """Logits of the model in memory, the adapter beside it."""
    model = loading.load(base, REGISTRY)
    if adapter is not None:
        adapters.load(adapter, model, REGISTRY)
    return np.array(model.language_model(mx.array(ids))[0].astype(mx.float32))


def theirs(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return np.asarray(model(torch.tensor(ids)).logits[0].float().numpy())


def of_mlx_lm(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of mlx-lm."""
    utils: Any = pytest.importorskip("mlx_lm.utils", reason="needs mlx-lm: pip install mlx-lm")
    model, _ = utils.load_model(folder)
    return np.array(model(mx.array(ids))[0].astype(mx.float32))


def apart(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def export(base: Path | str, to: str, out: Path, adapter: Path | None = None, **options: Any) -> Path:
    report = mlxlora_core.export(str(base), to, out, adapter_file=adapter, **options)
    assert report.check is not None
    return out


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_transformers_computes_the_same(
    bases: dict[str, Path], tmp_path: Path, family: str, adapted: bool
) -> None:
    base, ids = bases[family], ids_of(bases[family])
    adapter = adapter_of(base, tmp_path / "adapter.safetensors") if adapted else None
    want = ours(base, ids, adapter)
    assert apart(theirs(export(base, "hf", tmp_path / "out", adapter), ids), want) < EXACT
    if adapted:
        assert apart(ours(base, ids), want) > 1e-2


@pytest.mark.parametrize("family", [f for f in small_models.FAMILIES if f not in ("mistral",)])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_mlx_lm_computes_the_same(bases: dict[str, Path], tmp_path: Path, family: str, adapted: bool) -> None:
    """mlx-lm has no window of a Mistral; in Gemma 2 it has none either, so that texts are shorter there."""
    base, ids = bases[family], ids_of(bases[family])[:, : 20 if family == "gemma2" else TOKENS]
    adapter = adapter_of(base, tmp_path / "adapter.safetensors") if adapted else None
    out = export(base, "mlx-lm", tmp_path / "out", adapter)
    assert apart(of_mlx_lm(out, ids), ours(base, ids, adapter)) < EXACT


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("family", ["llama", "llama tied", "qwen3", "phi3", "gemma3"])
def test_mlx_lm_reads_quantized_weights_as_they_are(
    bases: dict[str, Path], tmp_path: Path, family: str, adapted: bool
) -> None:
    base, ids = tmp_path / "model", ids_of(bases[family])
    command = ["convert", "--torch-path", bases[family], "--mlx-path", base, "-q", "--q-group-size", 32]
    assert cli.execute([*map(str, command)]) == 0
    adapter = adapter_of(base, tmp_path / "adapter.safetensors") if adapted else None
    out = export(base, "mlx-lm", tmp_path / "out", adapter)
    held: Any = mx.load(str(out / "model.safetensors"))
    assert sum(name.endswith(".scales") for name in held) >= 8
    got = of_mlx_lm(out, ids)
    # What it computes is what the weights in the file are worth.
    assert apart(got, ours(out, ids)) < EXACT
    far = apart(got, ours(base, ids, adapter))
    assert far < (0.5 if adapted else EXACT)  # the adapter's change is rounded to 4 bits


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": "linear", "rope_factor": 4.0},
        {
            "rope_scaling": "yarn",
            "rope_factor": 4.0,
            "rope_original_len": 16,
            "rope_beta_fast": 32.0,
            "rope_beta_slow": 1.0,
            "rope_attention_factor": 1.3,
            "rope_theta": 100.0,
        },
    ],
    ids=lambda rope: rope["rope_scaling"],
)
def test_transformers_turns_by_the_same_angles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rope: dict[str, Any]
) -> None:
    name, more = small_models.FAMILIES["llama"]
    monkeypatch.setitem(small_models.FAMILIES, "scaled", (name, {**more, **rope}))
    base = small_models.write(tmp_path / "base", "scaled")
    ids = ids_of(base)
    assert apart(theirs(export(base, "hf", tmp_path / "out"), ids), ours(base, ids)) < EXACT


def test_the_tokenizer_of_an_export_gives_the_same_ids_and_conversation(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    out = export(bases["llama"], "hf", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    own = loading.load(out, REGISTRY).tokenizer
    text = "the gradient of  12345 weights\n\tcafé"
    assert tokenizer(text)["input_ids"] == own.encode(text)
    messages = [{"role": "user", "content": "the token"}, {"role": "assistant", "content": "answer"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    said = [token for piece in own.render(messages) for token in piece.ids]
    assert said == tokenizer(rendered, add_special_tokens=False)["input_ids"][: len(said)]
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [1, 3]


def test_a_sentencepiece_tokenizer_alone_is_opened_as_llamas(tiny_model: Path, tmp_path: Path) -> None:
    out = export(tiny_model, "hf", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    own = loading.load(tiny_model, REGISTRY).tokenizer
    for text in ("a sentence of words", "two  spaces and 42"):
        assert tokenizer(text)["input_ids"] == own.encode(text)
    ids = np.array([own.encode("a sentence of words")])
    assert apart(theirs(out, ids), ours(tiny_model, ids)) < EXACT


def test_a_folder_of_transformers_comes_back_to_the_bit(tmp_path: Path) -> None:
    """Saved by transformers in bfloat16 and several shards -> a model folder -> exported."""
    config = transformers.AutoConfig.for_model(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=424,
        tie_word_embeddings=True,
        eos_token_id=[1, 3],
    )
    torch.manual_seed(0)
    source = tmp_path / "source"
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(
        source, max_shard_size="60KB"
    )
    small_models.write_tokenizer(source)
    command = ["convert", "--torch-path", source, "--mlx-path", tmp_path / "model", "--dtype", "stored"]
    assert cli.execute([*map(str, command)]) == 0
    out = export(tmp_path / "model", "hf", tmp_path / "out")
    want: dict[str, mx.array] = {}
    for shard in source.glob("*.safetensors"):
        held: Any = mx.load(str(shard))
        want |= held
    assert len(list(source.glob("*.safetensors"))) > 2
    got: Any = mx.load(str(out / "model.safetensors"))
    assert got.keys() == want.keys()
    assert all(got[n].dtype == mx.bfloat16 and mx.array_equal(got[n], want[n]) for n in want)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    again = transformers.AutoConfig.from_pretrained(out)
    assert (again.dtype, again.tie_word_embeddings, again.eos_token_id) == (torch.bfloat16, True, [1, 3])


# --- a real model -------------------------------------------------------------


def test_smollm2_opens_in_transformers_and_mlx_lm(smollm2: Path, tmp_path: Path) -> None:
    model = loading.load(smollm2, REGISTRY)
    ids = np.array([model.tokenizer.encode("The capital of France is Paris, and that of Italy is")])
    want = np.array(model.language_model(mx.array(ids))[0].astype(mx.float32))
    del model
    dense = export(smollm2, "hf", tmp_path / "hf")
    assert apart(theirs(dense, ids), ours(dense, ids)) < EXACT
    assert apart(theirs(dense, ids), want) < 2e-3  # 4 bits times a scale, rounded to float16
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    assert tokenizer("The capital of France is Paris, and that of Italy is")["input_ids"] == ids[0].tolist()
    packed = export(smollm2, "mlx-lm", tmp_path / "mlx-lm")
    assert apart(of_mlx_lm(packed, ids), want) < 1e-3  # its kernels have scales of float16
    assert math.isclose((packed / "model.safetensors").stat().st_size, smollm2.stat().st_size, rel_tol=0.05)
