"""The folders of exporters ``hf`` and ``mlx-lm``: shards, tokenizers, cards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import small_models
from mlxlora_hf import export as hf_export

from mlxlora_core.errors import ModelError
from mlxlora_core.values import ExportSource, LazyTensor

HF, MLX_LM = (small_models.REGISTRY.find("exporter", name).spec for name in ("hf", "mlx-lm"))
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8}


def source(folder: Path, values: dict[str, Any] | None = None, **more: Any) -> ExportSource:
    """Some tensors and the tokenizer of a small model."""
    small_models.write_tokenizer(folder)
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    held = values if values is not None else {f"t{i}": mx.full((10, 8), i, mx.float16) for i in range(6)}
    tensors = {
        n: LazyTensor(a.shape, str(a.dtype).rpartition(".")[2], lambda a=a: a) for n, a in held.items()
    }
    given = ExportSource(CONFIG, {name: folder / name for name in names}, tensors, stops=frozenset({1, 3}))
    return replace(given, **more)


def written(spec: Any, given: ExportSource, target: Path, **options: Any) -> Path:
    target.mkdir()
    spec.export(given, target, spec.options(**options))
    return target


def config_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    held: dict[str, Any] = json.loads((folder / name).read_text())
    return held


@pytest.mark.parametrize("spec", [HF, MLX_LM], ids=lambda spec: spec.name)
def test_shards_hold_no_more_than_they_may_and_the_index_names_each_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: Any
) -> None:
    monkeypatch.setattr(hf_export, "SHARD_BYTES", 400)
    given = source(tmp_path)
    out = written(spec, given, tmp_path / "out")
    index = config_of(out, "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": 6 * 160}
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for shard in shards:
        held: Any = mx.load(str(out / shard))
        assert sorted(held) == sorted(name for name, place in index["weight_map"].items() if place == shard)
        assert sum(array.nbytes for array in held.values()) <= 400
    assert set(index["weight_map"]) == set(given.tensors)


@pytest.mark.parametrize(("spec", "form", "index"), [(HF, "pt", False), (MLX_LM, "mlx", True)])
def test_one_file_says_whose_it_is(tmp_path: Path, spec: Any, form: str, index: bool) -> None:
    out = written(spec, source(tmp_path), tmp_path / "out")
    _, metadata = mx.load(str(out / "model.safetensors"), return_metadata=True)  # type: ignore[misc]  # a pair
    assert metadata["format"] == form
    assert (out / "model.safetensors.index.json").exists() == index
    config = config_of(out)
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == ([1, 3], None, None)
    assert not config.keys() & {"quantization", "quantization_config"}


def test_end_ids_that_generation_config_lacks_are_put_there(tmp_path: Path) -> None:
    given = source(tmp_path)
    file = given.tokenizer["generation_config.json"]
    assert isinstance(file, Path)
    file.write_text(json.dumps({"temperature": 0.5, "eos_token_id": 1, "bos_token_id": 0}))
    out = written(HF, given, tmp_path / "out")
    assert config_of(out, "generation_config.json") == {
        "temperature": 0.5,
        "eos_token_id": [1, 3],
        "bos_token_id": 0,
    }
    assert config_of(out)["bos_token_id"] == 0
    # One that has them stays as it is, however it is written.
    file.write_text('{"eos_token_id":[3,1]}')
    again = written(HF, given, tmp_path / "again")
    assert (again / "generation_config.json").read_text() == '{"eos_token_id":[3,1]}'


def test_a_sentencepiece_model_by_itself_gets_the_class_that_reads_it(tmp_path: Path) -> None:
    alone = source(tmp_path, tokenizer={"tokenizer.model": b"\x0a\x0e\x0a\x05<unk>"})
    out = written(HF, alone, tmp_path / "one")
    assert config_of(out, "tokenizer_config.json")["tokenizer_class"] == "LlamaTokenizer"
    config = b'{"tokenizer_class": "GemmaTokenizer"}'
    stated = source(tmp_path, tokenizer={"tokenizer.model": b"\x0a", "tokenizer_config.json": config})
    assert (written(HF, stated, tmp_path / "two") / "tokenizer_config.json").read_bytes() == config
    ranks = source(tmp_path, tokenizer={"tokenizer.model": b"IQ== 0\nIg== 1\n"})
    assert not (written(HF, ranks, tmp_path / "three") / "tokenizer_config.json").exists()


def test_values_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    given = source(tmp_path, {"large": mx.array([1e6, 1.0])})
    with pytest.raises(ModelError, match=r"large has values that float16 cannot hold"):
        written(HF, given, tmp_path / "out", dtype="float16")


@pytest.mark.parametrize(
    ("base", "front", "made"),
    [
        (f"org/name@{'0a' * 20}", 'base_model: "org/name"', "Made of `org/name` by mlxlora."),
        ("/home/somebody/models/mine", "", "Made of `mine` by mlxlora."),
        ("", "", "Made by mlxlora."),
    ],
)
def test_the_card_names_the_base_and_no_folder_of_its_maker(
    tmp_path: Path, base: str, front: str, made: str
) -> None:
    given = source(tmp_path, base=base, card="## How it was tuned\n\n- loss 1.25")
    card = (written(HF, given, tmp_path / "out") / "README.md").read_text()
    assert front in card and made in card and card.endswith("- loss 1.25\n")
    assert "/home" not in card and ("base_model" in card) == bool(front)
