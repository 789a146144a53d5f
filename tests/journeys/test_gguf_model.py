"""A model in a GGUF file, from the file to its answers: against torch, converted, and trained."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import llama_torch
import mlx.core as mx
import numpy as np
import pytest
import torch
from gguf_files import BYTE_LEVEL, Tensor

from mlxlora_core.model import loading
from mlxlora_core.model.linears import is_packed, linears
from mlxlora_core.plugins import load as load_registry

VOCAB, DIM, HIDDEN, HEADS, KV_HEADS, LAYERS = 264, 256, 256, 4, 2, 2
CONFIG: dict[str, Any] = {
    "dim": DIM,
    "hidden_dim": HIDDEN,
    "vocab_size": VOCAB,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "head_dim": DIM // HEADS,
    "n_layers": LAYERS,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
KEYS = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": DIM,
    "llama.feed_forward_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": DIM // HEADS,
    "llama.vocab_size": VOCAB,
}
#: the names here -> the names in the file
NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def foreign(name: str) -> str:
    path = name.removesuffix(".weight")
    if path.startswith("layers."):
        _, layer, path = path.split(".", 2)
        return f"blk.{layer}.{NAMES[path]}.weight"
    return f"{NAMES[path]}.weight"


def halves(kind: str, data: bytes) -> bytes:
    """Blocks with scales that make weights of about the size of a model's."""
    draw, content = random.Random(kind), bytearray(data)
    for at in range(0, len(data), gguf_files.TYPES[kind][2]):
        for number, half in enumerate(gguf_files.HALVES[kind]):
            bits = {"Q4": 8, "Q5": 16, "Q8": 128, "Q6": 32}[kind[:2]]
            scale = draw.uniform(0.5, 1.5) * 0.1 / bits / (32 if kind.endswith("K") else 1)
            struct.pack_into(
                "<e", content, at + half, -bits * scale if number and not kind.endswith("K") else scale
            )
    return bytes(content)


def write(path: Path, kinds: list[str], *, tied: bool) -> dict[str, torch.Tensor]:
    """A model whose weights take turns at the types; gives them under the names here, in float64."""
    tensors, weights = [], {}
    for number, (name, shape) in enumerate(llama_torch.shapes(CONFIG, tied=tied).items()):
        if len(shape) == 1:
            kind = "F32"
            data = struct.pack(f"<{shape[0]}f", *(1 + 0.01 * n / shape[0] for n in range(shape[0])))
        else:
            kind = kinds[number % len(kinds)]
            _, in_block, size = gguf_files.TYPES[kind]
            data = random.Random(name).randbytes(math.prod(shape) // in_block * size)
            if in_block > 1:
                data = halves(kind, data)
            else:
                numbers = np.random.default_rng(number).normal(0, 0.06, shape).astype(np.float32)
                bits = numbers.astype("<f2").tobytes() if kind == "F16" else numbers.tobytes()
                data = (
                    b"".join(bits[at + 2 : at + 4] for at in range(0, len(bits), 4))
                    if kind == "BF16"
                    else bits
                )
        tensors.append(Tensor(foreign(name), shape, kind, data))
        weights[name] = torch.tensor(gguf_files.weights(kind, data), dtype=torch.float64).reshape(shape)
    path.write_bytes(gguf_files.gguf({**KEYS, **BYTE_LEVEL, "tokenizer.ggml.add_bos_token": True}, tensors))
    return weights


CASES = {"packed": [*gguf_files.PACKED], "mixed": ["Q4_K", "Q6_K", "F16", "BF16", "F32", "Q8_0"]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "with a head"])
@pytest.mark.parametrize("kinds", CASES.values(), ids=list(CASES))
def test_logits_are_those_of_torch(kinds: list[str], tied: bool, tmp_path: Path) -> None:
    weights = write(tmp_path / "model.gguf", kinds, tied=tied)
    model = loading.load(tmp_path / "model.gguf", load_registry(environ={"MLXLORA_PLUGINS": ""}))
    assert [path for path, linear in linears(model.module) if is_packed(linear)]
    ids = model.tokenizer.encode("hello hell, 12 caf\u00e9!")
    assert ids[0] == 261
    want = llama_torch.logits(weights, torch.tensor([ids]), CONFIG)[0].numpy()
    got = np.array(model.module(mx.array([ids]))[0].astype(mx.float32))
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_it_generates_converts_and_trains(
    mlxlora: Callable[..., Any], tiny_data: Path, tmp_path: Path
) -> None:
    source, folder = tmp_path / "model.gguf", tmp_path / "model"
    write(source, CASES["mixed"], tied=True)
    asked = ("--temp", "0", "-n", "8", "-p", "hello", "--json")
    first = mlxlora("generate", "--model", source, *asked)
    assert first.code == 0, first.err
    done = mlxlora("convert", "--torch-path", source, "--mlx-path", folder, "--dtype", "float32")
    assert done.code == 0 and "are expanded to float32" in done.err + done.out, done.err
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "generation_config.json"}
    again = mlxlora("generate", "--model", folder, *asked)
    assert json.loads(again.out)["text"] == json.loads(first.out)["text"]
    adapter = tmp_path / "adapter.safetensors"
    files = ("--model", source, "--data", tiny_data, "--adapter-file", adapter)
    trained = mlxlora("train", *files, "--iters", "3", "--batch-size", "2", "--lora-layers", "-1")
    assert trained.code == 0, trained.err
    adapted = mlxlora("generate", "--model", source, "--adapter-file", adapter, *asked)
    assert adapted.code == 0, adapted.err
