"""SmolLM2 out of its GGUF file, and out of folders made of it, against figures of transformers in float64.

The figures: losses, greedy text and the ids of a chat, of the weights dequantized and
read by transformers 5.23; the losses are means over the tokens after the first.
The folders are written here by numpy, the weights expanded as Hugging Face has them, or
in the same bits as mlx-lm has them; ``gguf`` of PyPI reads the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlxlora_gguf.model import tokenizer_files
from safetensors.numpy import save_file

from mlxlora_core.model import loading
from mlxlora_core.model.generate import decode
from mlxlora_core.model.linears import is_packed, linears
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins import load as load_registry

TEXTS = [
    (
        "The capital of France is Paris, and the capital of Germany is Berlin.",
        [504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 4521, 314, 11452, 30],
        1.7153528,
    ),
    (
        "Gravity is the force that keeps the planets in orbit around the sun.",
        [22007, 6463, 314, 260, 3075, 338, 8211, 260, 9244, 281, 8591, 1130, 260, 2388, 30],
        2.9326541,
    ),
]
GREEDY = [
    7042,
    30,
    198,
    198,
    504,
    2988,
    314,
    42,
    216,
    34,
    32,
    33,
    40,
    29,
    32,
    33,
    29,
    34,
    34,
    216,
    33,
    34,
    42,
]
GREEDY += [33, 34, 42, 37, 35, 30, 2]
CHAT = [
    1,
    9690,
    198,
    2683,
    359,
    253,
    5356,
    5646,
    11173,
    3365,
    3511,
    308,
    34519,
    28,
    7018,
    411,
    407,
    19712,
    8182,
]
CHAT += [2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]


NEEDED = "needs the library gguf: pip install '.[interop]'"
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
HEADS = {"attn_q": 9, "attn_k": 3}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


def renamed(path: Path) -> Iterator[tuple[str, Any, Callable[[np.ndarray], np.ndarray]]]:
    """(path there, the tensor as gguf reads it, what puts its rows in Hugging Face's order)."""
    gguf = pytest.importorskip("gguf", reason=NEEDED)
    for tensor in gguf.GGUFReader(path).tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        there = WHOLE[parts[0]] if parts[0] in WHOLE else f"model.layers.{parts[1]}.{NAMES[parts[2]]}"

        def in_halves(rows: np.ndarray, heads: int = HEADS.get(parts[-1], 0)) -> np.ndarray:
            if not heads:
                return rows
            pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)

        yield there, tensor, in_halves


def expanded(path: Path) -> dict[str, np.ndarray]:
    """The weights as Hugging Face has them, float32."""
    quants = pytest.importorskip("gguf.quants", reason=NEEDED)
    return {
        f"{there}.weight": in_halves(quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        for there, tensor, in_halves in renamed(path)
    }


def packed(path: Path) -> dict[str, np.ndarray]:
    """The weights as mlx-lm has them, in the bits of the file: 4 of Q4_1, 8 of Q8_0, in groups of 32."""
    found = {}
    for there, tensor, in_halves in renamed(path):
        if tensor.tensor_type.name == "F32":
            found[f"{there}.weight"] = np.array(tensor.data)
            continue
        four = tensor.tensor_type.name == "Q4_1"
        data = np.array(tensor.data)
        blocks = data.reshape(data.shape[0], -1, 20 if four else 34)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        if four:
            biases = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0]
            steps = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)
            stream = steps[..., 0::2] | (steps[..., 1::2] << 4)
        else:
            biases = scales * np.float16(-128)
            stream = blocks[..., 2:] ^ 0x80  # from -128 .. 127 to 0 .. 255
        words = np.ascontiguousarray(stream).reshape(data.shape[0], -1).view(np.uint32)
        parts = {"weight": words, "scales": scales, "biases": biases}
        found |= {f"{there}.{name}": in_halves(np.ascontiguousarray(part)) for name, part in parts.items()}
    return found


def folder_of(path: Path, folder: Path, form: str) -> Path:
    """The model as a folder of another library."""
    config: dict[str, Any] = dict(CONFIG)
    if form == "mlx-lm":
        bits = {"group_size": 32, "bits": 4, "model.embed_tokens": {"group_size": 32, "bits": 8}}
        config |= {"quantization": bits, "quantization_config": bits}
    save_file(packed(path) if form == "mlx-lm" else expanded(path), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for name, file in tokenizer_files(path).items():
        assert isinstance(file, bytes)
        (folder / name).write_bytes(file)
    return folder


@pytest.fixture(scope="module", params=["gguf", "mlx-lm", "hugging-face"])
def model(request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    registry = load_registry(environ={"MLXLORA_PLUGINS": ""})
    if request.param == "gguf":
        return loading.load(smollm2, registry)
    folder = folder_of(smollm2, tmp_path_factory.mktemp(request.param), request.param)
    model = loading.load(folder, registry)
    (folder / "model.safetensors").unlink()  # pytest keeps folders of earlier runs
    return model


def test_weights_stay_packed(model: Model) -> None:
    packed = [linear for _, linear in linears(model.module) if is_packed(linear)]
    assert len(packed) == (0 if model.quantization is None else 210)


def loss(model: Model, ids: Sequence[int]) -> float:
    """The mean over the tokens after the first, summed in float64."""
    logits = np.array(model.module(mx.array([ids]))[0].astype(mx.float32)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-np.mean([logs[at, number] for at, number in enumerate(ids[1:])]))


@pytest.mark.parametrize(("text", "ids", "want"), TEXTS)
def test_ids_and_losses(text: str, ids: list[int], want: float, model: Model) -> None:
    assert model.tokenizer.encode(text) == ids
    assert abs(loss(model, ids) - want) < 1e-5


def greedy(model: Model, ids: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens one after another, the one that ends the text among them."""
    found = []
    draw = decode(
        model.module, ids, lambda logits, _: int(mx.argmax(logits).item()), num_tokens=count, stops=()
    )
    for token in draw:
        found.append(token)
        if token in model.tokenizer.stops:
            break
    return found


def test_greedy_text(model: Model) -> None:
    assert greedy(model, TEXTS[0][1][:5], 40) == GREEDY


def test_chat(model: Model) -> None:
    pieces = model.tokenizer.render([{"role": "user", "content": "What is the capital of France?"}])
    ids = [number for piece in pieces for number in piece.ids]
    assert ids == CHAT
    assert greedy(model, ids, 20) == ANSWER
