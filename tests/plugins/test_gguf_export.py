"""What the exporter ``gguf`` writes: blocks to the bit, what each type costs, keys of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf_files
import mlx.core as mx
import numpy as np
import pytest
import small_tokenizers
from gguf_files import ARCHITECTURE, BYTE_LEVEL, PIECES
from mlxlora_gguf import ExportOptions, export
from mlxlora_gguf.model import tokenizer_files
from mlxlora_gguf.splitting import RULES
from mlxlora_gguf.splitting_out import find_name

from mlxlora_core.errors import MlxloraError, ModelError, UsageError
from mlxlora_core.files.tensor_checks import type_name
from mlxlora_core.plugins.progress import notes_heard
from mlxlora_core.values import ExportSource, LazyTensor, PackedTensor, TokenizerFiles

GGML = "tokenizer.ggml."
NAME = "blk.0.ffn_up.weight"
CONFIG = {"general.architecture": "llama", "llama.context_length": 64}


def held(array: mx.array) -> LazyTensor:
    return LazyTensor(tuple(array.shape), type_name(array.dtype), lambda: array)


def packed(parts: tuple[mx.array, ...], size: int, bits: int) -> LazyTensor:
    """A weight in affine groups."""
    named = dict(zip(("weight", "scales", "biases"), map(held, parts), strict=True))
    shape = (parts[0].shape[0], parts[0].shape[1] * 32 // bits)

    def read() -> mx.array:
        words, scales, biases = parts
        return mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), size, bits)

    how = PackedTensor("affine", {"group_size": size, "bits": bits}, named)
    return LazyTensor(shape, "float32", read, how)


def normal(shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(5).normal(0, 0.5, shape).astype(np.float32)).astype(dtype)


def files_of(folder: Path, keys: Mapping[str, Any] = BYTE_LEVEL) -> TokenizerFiles:
    path = folder / "vocabulary.gguf"
    path.write_bytes(gguf_files.gguf({**ARCHITECTURE, **keys}))
    return tokenizer_files(path)


def written(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    files: TokenizerFiles | None = None,
    config: Mapping[str, Any] = CONFIG,
    stops: frozenset[int] = frozenset(),
    rows: int = 0,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Keys, name -> (type, shape, bytes), and notes of what is exported."""
    folder.mkdir(exist_ok=True)
    files = files_of(folder) if files is None else files
    source = ExportSource(config, files, tensors, stops=stops, vocab_size=rows)
    with notes_heard() as notes:
        export(source, folder, ExportOptions(**options))
    keys, found = gguf_files.read((folder / "model.gguf").read_bytes())
    return keys, found, notes


# --- blocks -------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(
    ("bits", "kind"), [(2, "Q4_1"), (3, "Q4_1"), (4, "Q4_1"), (5, "Q5_1")], ids=lambda value: str(value)
)
def test_packed_weights_come_out_as_the_integers_that_they_are(
    tmp_path: Path, bits: int, kind: str, size: int
) -> None:
    parts = mx.quantize(normal((3, 256), mx.float16), size, bits)
    _, found, notes = written(tmp_path, {NAME: packed(parts, size, bits)})
    got, shape, data = found[NAME]
    assert (got, shape, notes) == (kind, (3, 256), [])
    length = gguf_files.TYPES[kind][2]
    blocks = [data[at : at + length] for at in range(0, len(data), length)]
    steps = np.array([gguf_files.integers(kind, block) for block in blocks]).reshape(3, 256)
    words, scales, biases = (np.array(part) for part in parts)
    # MLX's stream of bits, taken apart one number at a time
    stream = [sum(int(word) << 32 * i for i, word in enumerate(row)) for row in words]
    assert steps.tolist() == [[row >> bits * i & (1 << bits) - 1 for i in range(256)] for row in stream]
    told = np.array([gguf_files.groups(kind, block)[0] for block in blocks]).reshape(3, 8, 2)
    assert np.array_equal(told[..., 0], np.repeat(scales, size // 32, -1))
    assert np.array_equal(told[..., 1], np.repeat(biases, size // 32, -1))


def test_eight_bits_around_0_are_those_of_q8_0(tmp_path: Path) -> None:
    data = gguf_files.blocks("Q8_0", 24)
    numbers = np.frombuffer(data, np.uint8).reshape(24, 34)
    scales = np.ascontiguousarray(numbers[:, :2]).view(np.float16).reshape(3, 8)
    words = np.ascontiguousarray(numbers[:, 2:] ^ 0x80).reshape(3, 256).view(np.uint32)
    parts = (mx.array(words), mx.array(scales), mx.array(scales * np.float16(-128)))
    _, found, notes = written(tmp_path, {NAME: packed(parts, 32, 8)})
    assert found[NAME] == ("Q8_0", (3, 256), data) and notes == []


@pytest.mark.parametrize(("bits", "least", "most"), [(6, 0.002, 0.008), (8, 0.002, 0.008)])
def test_other_integers_of_eight_bits_are_made_anew_and_the_cost_is_told(
    tmp_path: Path, bits: int, least: float, most: float
) -> None:
    parts = mx.quantize(normal((4, 256), mx.float16), 64, bits)
    tensor = packed(parts, 64, bits)
    _, found, notes = written(tmp_path, {NAME: tensor})
    kind, _, data = found[NAME]
    want = np.array(tensor.read(), np.float64)
    got = np.array(gguf_files.weights(kind, data)).reshape(want.shape)
    apart = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert kind == "Q8_0" and least < apart < most
    assert notes == [
        f"rounded to Q8_0: 1 of the tensors, by {apart:.2g} of their size, "
        f"and at most by {apart:.2g} ({NAME})"
    ]


@pytest.mark.parametrize(("dtype", "most"), [(mx.float32, 2.0**-11), (mx.bfloat16, 0.0)])
def test_scales_that_float16_rounds_are_told(tmp_path: Path, dtype: mx.Dtype, most: float) -> None:
    words, scales, biases = mx.quantize(normal((3, 128)), 32, 4)
    tensor = packed((words, scales.astype(dtype), biases.astype(dtype)), 32, 4)
    _, found, notes = written(tmp_path, {NAME: tensor})
    want = np.array(tensor.read(), np.float64)
    got = np.array(gguf_files.weights(*found[NAME][::2])).reshape(want.shape)
    apart = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert apart <= most and bool(notes) == (most > 0)
    if most:
        assert f"at most by {apart:.2g} ({NAME})" in notes[0]


def test_a_scale_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    words, scales, biases = mx.quantize(normal((3, 128)) * 1e7, 32, 4)
    with pytest.raises(ModelError, match=r"numbers up to .*, which Q4_1 cannot hold.*export\.type=F32"):
        written(tmp_path, {NAME: packed((words, scales, biases), 32, 4)})
    assert not list(tmp_path.glob("*model.gguf*"))


def test_a_number_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{NAME} has numbers up to .*, which F16 cannot hold"):
        written(tmp_path, {NAME: held(normal((3, 64)) * 1e6)}, type="F16")


def test_dense_weights_keep_their_type_and_vectors_are_float32(tmp_path: Path) -> None:
    types = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    tensors = {f"blk.0.{kind}.weight": held(normal((3, 50), dtype)) for kind, dtype in types.items()}
    tensors |= {f"blk.1.{kind}.weight": held(normal((50,), dtype)) for kind, dtype in types.items()}
    _, found, notes = written(tmp_path, tensors)
    assert {name: kind for name, (kind, *_) in found.items()} == {
        name: kind if name.startswith("blk.0") else "F32"
        for name, kind in ((name, name.split(".")[2]) for name in tensors)
    }
    for name, (kind, shape, data) in found.items():
        want = np.array(tensors[name].read().astype(mx.float32))
        assert np.array_equal(np.array(gguf_files.weights(kind, data)).reshape(shape), want)
    assert notes == []


def test_rows_that_blocks_do_not_fill_are_float16_and_that_is_told(tmp_path: Path) -> None:
    tensors = {NAME: held(normal((3, 48))), "blk.0.ffn_gate.weight": held(normal((3, 64)))}
    _, found, notes = written(tmp_path, tensors, type="Q8_0")
    assert {name: kind for name, (kind, *_) in found.items()} == {
        NAME: "F16",
        "blk.0.ffn_gate.weight": "Q8_0",
    }
    assert notes[0] == f"1 tensors are F16, for 32 does not divide their 48 columns: {NAME}"


# --- keys ---------------------------------------------------------------------


def test_the_file_tells_its_type_and_settings_are_tensors(tmp_path: Path) -> None:
    config = {**CONFIG, "llama.rope.freq_base": 1e4, "rope_freqs.weight": [1.0, 2.5]}
    keys, found, _ = written(tmp_path, {NAME: held(normal((3, 64), mx.bfloat16))}, config=config)
    assert keys["general.file_type"] == 32 and keys["general.alignment"] == 32
    assert keys["general.type"] == "model" and "general.quantization_version" not in keys
    assert keys["llama.rope.freq_base"] == 1e4 and keys["llama.context_length"] == 64
    assert found["rope_freqs.weight"][:2] == ("F32", (2,))
    assert gguf_files.weights("F32", found["rope_freqs.weight"][2]) == [1.0, 2.5]
    keys, _, _ = written(tmp_path / "q8", {NAME: held(normal((3, 64)))}, type="Q8_0")
    assert (keys["general.file_type"], keys["general.quantization_version"]) == (7, 2)


def test_a_length_that_nobody_states_is_asked_for(tmp_path: Path) -> None:
    config = {"general.architecture": "llama"}
    with pytest.raises(ModelError, match=r"export\.context_length=4096"):
        written(tmp_path, {}, config=config)
    keys, _, _ = written(tmp_path, {}, config=config, context_length=2048)
    assert keys["llama.context_length"] == 2048


@pytest.mark.parametrize(
    ("vocabulary", "begin", "end"), [(BYTE_LEVEL, 261, 262), (PIECES, 1, 2)], ids=["gpt2", "llama"]
)
def test_a_vocabulary_comes_out_as_it_went_in(
    tmp_path: Path, vocabulary: dict[str, Any], begin: int, end: int
) -> None:
    more = {"tokenizer.ggml.eot_token_id": begin, "tokenizer.ggml.fim_pre_token_id": 7}
    given = {**vocabulary, **more, "tokenizer.chat_template.tool_use": "{{ tools }}"}
    given |= {"tokenizer.chat_template": "{{ messages }}"}
    keys, _, notes = written(tmp_path, {}, files_of(tmp_path, given), stops=frozenset({begin, end}))
    found = {key: value for key, value in keys.items() if key.startswith("tokenizer.")}
    assert {key: found[key] for key in given} == given
    assert found.keys() - given.keys() <= {GGML + "add_space_prefix", GGML + "add_bos_token"}
    assert notes == []


def test_rows_without_a_token_are_unused_and_stay_so(tmp_path: Path) -> None:
    keys, _, _ = written(tmp_path, {}, rows=266)
    assert keys[GGML + "tokens"][264:] == ["[PAD264]", "[PAD265]"]
    assert keys[GGML + "token_type"][261:] == [3, 3, 4, 5, 5]
    again, _, _ = written(tmp_path, {}, files_of(tmp_path, keys), rows=266)
    assert {key: value for key, value in again.items() if key.startswith(GGML)} == {
        key: value for key, value in keys.items() if key.startswith(GGML)
    }


def test_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    keys, _, notes = written(tmp_path, {}, rows=263)
    assert len(keys[GGML + "tokens"]) == 263 and "1 tokens from id 263 on" in notes[0]


@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_found_again(tmp_path: Path, name: str) -> None:
    files = files_of(tmp_path, {**BYTE_LEVEL, GGML + "pre": name})
    content = files["tokenizer.json"]
    assert isinstance(content, bytes)
    document = json.loads(content)
    assert find_name(document, name) == name
    found = RULES[find_name(document) or ""]
    assert (found.patterns, found.digits, found.gpt2, found.ignore_merges) == (
        RULES[name].patterns,
        RULES[name].digits,
        RULES[name].gpt2,
        RULES[name].ignore_merges,
    )
    keys, _, _ = written(tmp_path, {}, files)
    assert keys[GGML + "pre"] == name


def changed(files: TokenizerFiles, **parts: Any) -> dict[str, Path | bytes]:
    """The files with parts of tokenizer.json changed."""
    content = files["tokenizer.json"]
    assert isinstance(content, bytes)
    return {**files, "tokenizer.json": json.dumps({**json.loads(content), **parts}).encode()}


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, LEVEL]}},
        {"pre_tokenizer": {**LEVEL, "add_prefix_space": True}},
        {"pre_tokenizer": LEVEL, "normalizer": {"type": "Lowercase"}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": "[0-9]+"},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    LEVEL,
                ],
            }
        },
    ],
)
def test_an_unknown_rule_is_refused_with_the_option_that_names_it(
    tmp_path: Path, parts: dict[str, Any]
) -> None:
    files = changed(files_of(tmp_path), **parts)
    with pytest.raises(ModelError, match=r"--set export\.pre=NAME") as caught:
        written(tmp_path, {}, files)
    assert "\n" not in str(caught.value)
    keys, _, _ = written(tmp_path, {}, files, pre="qwen2")
    assert keys[GGML + "pre"] == "qwen2"
    with pytest.raises(UsageError, match=r"export\.pre: got 'odd', wanted"):
        written(tmp_path, {}, files, pre="odd")


def test_the_rule_of_the_file_is_not_taken_where_the_steps_are_others(tmp_path: Path) -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    keys, _, _ = written(tmp_path, {}, changed(files_of(tmp_path), pre_tokenizer=level))
    assert keys[GGML + "pre"] == "gpt-2"  # it was smollm


def test_pieces_of_a_tokenizer_json_are_scored_by_their_merges(tmp_path: Path) -> None:
    tokenizer = small_tokenizers.like_llama_2()
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    files = small_tokenizers.write(tmp_path, tokenizer, config, 2)
    keys, _, _ = written(tmp_path, {}, files, stops=frozenset({2}))
    assert keys[GGML + "model"] == "llama" and keys[GGML + "add_space_prefix"] is True
    assert keys[GGML + "add_bos_token"] is True
    assert keys[GGML + "token_type"][:259] == [2, 3, 3, *[6] * 256]
    tokens, scores = keys[GGML + "tokens"], keys[GGML + "scores"]
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    first = [tokens.index("".join(merge)) for merge in merges]
    assert [scores[number] for number in first] == [-float(n) for n in range(len(first))]
    # SentencePiece itself, which goes by scores alone, splits texts as the merges do.
    again = files_of(tmp_path, keys)
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=again["tokenizer.model"])
    for text in ("the gradient of layer weights", "café scales 42", "answer  token"):
        want = tokenizer.encode(text, add_special_tokens=False).ids
        assert pieces.encode(text) == want, text


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"tokenizer.model": small_tokenizers.tiktoken_file()}, "put the model's tokenizer.json into"),
        ({"tekken.json": small_tokenizers.tekken_file()}, "put the model's tokenizer.json into"),
        ({"tokenizer.json": small_tokenizers.unigram().to_str().encode()}, "of kind 'Unigram'"),
        ({"tokenizer.json": small_tokenizers.words().to_str().encode()}, "of kind 'WordLevel'"),
        ({"tokenizer.model": b"\x0a\x05\x0a\x03abc\x0a\xff\xff\xff\xff\x0f"}, "goes past its end"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'}, "spaces"),
    ],
)
def test_other_tokenizers_are_refused_in_one_line(tmp_path: Path, files: dict[str, bytes], what: str) -> None:
    with pytest.raises(MlxloraError, match=what) as caught:
        written(tmp_path, {}, files)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*model.gguf*"))


def test_ends_that_llama_cpp_does_not_know_are_stated(tmp_path: Path) -> None:
    keys, _, notes = written(tmp_path, {}, stops=frozenset({262, 10, 11}))
    assert (keys[GGML + "eos_token_id"], keys[GGML + "eot_token_id"]) == (262, 10)
    assert keys[GGML + "eom_token_id"] == 11 and notes == []
    assert [keys[GGML + "token_type"][number] for number in (10, 11)] == [3, 3]
    _, _, notes = written(tmp_path, {}, stops=frozenset({262, 10, 11, 12}))
    assert len(notes) == 1 and "will not stop at" in notes[0]
