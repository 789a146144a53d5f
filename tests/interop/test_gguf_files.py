"""Real GGUF files: SmolLM2, and llama.cpp's vocabularies with their golden ids."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import gguf_files
import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from mlxlora_affine import AffineOptions, dequantize
from mlxlora_gguf import GgufOptions, open_path
from mlxlora_gguf.header import read_header
from mlxlora_gguf.model import tokenizer_files
from smollm2_file import expanded

from mlxlora_core.errors import ModelError
from mlxlora_core.values import ForeignModel, LazyTensor, TokenizerFiles

SHA_256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="module")
def model(smollm2: Path) -> ForeignModel:
    assert hashlib.sha256(smollm2.read_bytes()).hexdigest() == SHA_256
    return open_path(smollm2, GgufOptions())


def test_keys_and_names(model: ForeignModel) -> None:
    config = model.config
    assert config["general.architecture"] == "llama" and config["llama.vocab_size"] == 49152
    assert (config["llama.block_count"], config["llama.embedding_length"]) == (30, 576)
    assert config["llama.rope.freq_base"] == 100000.0
    assert not [key for key in config if key.startswith("tokenizer.")]
    assert len(model.tensors) == 272 and list(model.notes) == []
    assert model.tensors["token_embd.weight"].shape == (49152, 576)
    assert model.tensors["blk.29.attn_k.weight"].shape == (192, 576)
    assert model.tensors["blk.0.ffn_down.weight"].shape == (576, 1536)


def steps(tensor: LazyTensor, rows: slice) -> Any:
    """Some rows as they expand from the parts that are handed over."""
    assert tensor.packed is not None
    parts = {name: part.read()[rows] for name, part in tensor.packed.parts.items()}
    return np.array(dequantize(parts, AffineOptions(32, tensor.packed.options["bits"])))


def test_every_tensor_is_the_one_in_the_file(model: ForeignModel, smollm2: Path) -> None:
    _, found = gguf_files.read(smollm2.read_bytes())
    assert found.keys() == model.tensors.keys()
    for name, (kind, shape, data) in found.items():
        want = expanded(kind, shape, data).astype(np.float32)
        lazy = model.tensors[name]
        assert np.array_equal(np.array(lazy.read()), want), name
        if kind != "F32":
            assert np.array_equal(steps(lazy, slice(None)), want), name


def test_the_gguf_package_finds_the_same(model: ForeignModel, smollm2: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs another reader: pip install gguf")
    for tensor in gguf.GGUFReader(smollm2).tensors:
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(np.array(model.tensors[tensor.name].read()), want), tensor.name


@pytest.mark.parametrize("kind", gguf_files.TYPES)
def test_every_type_is_what_the_gguf_package_makes_of_it(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs another reader: pip install gguf")
    (_, tensor) = gguf_files.write_model(tmp_path / "model.gguf", kinds=(kind,))
    number, in_block, size = gguf_files.TYPES[kind]
    raw = np.frombuffer(tensor.data, np.uint8).reshape(3, 512 // in_block * size)
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(number))
    lazy = open_path(tmp_path / "model.gguf", GgufOptions()).tensors[tensor.name]
    assert np.array_equal(np.array(lazy.read().astype(mx.float32)), want)


def test_a_model_of_mixed_types(gemma3: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs another reader: pip install gguf")
    model = open_path(gemma3, GgufOptions())
    entries = read_header(gemma3).tensors
    assert Counter(entry.type.name for entry in entries) == {
        "F32": 109,
        "Q5_0": 81,
        "Q4_K": 27,
        "Q8_0": 10,
        "Q6_K": 9,
    }
    assert [note for note in model.notes if note.startswith("9 tensors (Q6_K)")]
    content = np.memmap(gemma3, np.uint8, "r")
    for entry in entries:
        if entry.type.weights == 1:
            continue
        rows = slice(0, 2000)  # of the embedding, which is large
        raw = content[entry.offset : entry.offset + entry.size].reshape(-1, entry.row_bytes)[rows]
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[entry.type.name])
        lazy = model.tensors[entry.name]
        assert (lazy.packed is None) == (entry.type.name == "Q6_K")
        got = lazy.read()[rows] if lazy.packed is None else steps(lazy, rows)
        assert np.array_equal(np.array(got), want), entry.name
    tokenizer = Opened(model.tokenizer)
    assert tokenizer.encode("The capital of France is") == [818, 5279, 529, 7001, 563]


# --- vocabularies -------------------------------------------------------------


class Opened:
    """A tokenizer in the files of a vocabulary, as the library of its kind opens it."""

    def __init__(self, files: TokenizerFiles) -> None:
        content = files.get("tokenizer.json")
        self.pieces = None
        if isinstance(content, bytes):
            tokenizers = pytest.importorskip("tokenizers", reason="needs pip install tokenizers")
            self.whole = tokenizers.Tokenizer.from_str(content.decode())
        else:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])

    def encode(self, text: str) -> list[int]:
        if self.pieces is not None:
            return list(self.pieces.encode(text))
        return list(self.whole.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        if self.pieces is not None:
            return str(self.pieces.decode(ids))
        return str(self.whole.decode(ids, skip_special_tokens=False))


GOLDEN = [
    "llama-bpe",
    "qwen2",
    "qwen35",
    "gpt-2",
    "starcoder",
    "refact",
    "command-r",
    "mpt",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
]
GOLDEN += ["llama-spm", "phi-3"]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids(name: str, llama_cpp: Path) -> None:
    path = llama_cpp / f"ggml-vocab-{name}.gguf"
    tokenizer = Opened(tokenizer_files(path))
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[*map(int, line.split())] for line in path.with_suffix(".gguf.out").read_text().splitlines()]
    ids += [[]] * (len(texts) - len(ids))  # the last text may be empty
    assert len(texts) == len(ids) >= 47
    for text, want in zip(texts, ids, strict=True):
        assert tokenizer.encode(text) == want, repr(text)
        assert tokenizer.decode(want) == text


def test_smollm2_splits_digits(smollm2: Path) -> None:
    files = tokenizer_files(smollm2)
    tokenizer = Opened(files)
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    ids = [504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 4521, 314, 11452, 30]
    assert tokenizer.encode(text) == ids
    assert [tokenizer.decode([number]) for number in tokenizer.encode("  123")] == ["  ", "1", "2", "3"]
    chat = "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.encode(chat)[0] == 1 and 2 in tokenizer.encode(chat)
    ends = files["generation_config.json"]
    assert isinstance(ends, bytes) and json.loads(ends)["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert-bge", "WordPiece"),
        ("nomic-bert-moe", "the Unigram of T5"),
        ("gemma-4", "that of Gemma 4"),
    ],
)
def test_other_tokenizers_are_refused_by_name(name: str, reason: str, llama_cpp: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        tokenizer_files(llama_cpp / f"ggml-vocab-{name}.gguf")


def test_every_vocabulary_has_a_sound_header(llama_cpp: Path) -> None:
    paths = sorted(llama_cpp.glob("*.gguf"))
    assert len(paths) > 15
    for path in paths:
        assert read_header(path).keys["tokenizer.ggml.tokens"], path.name
