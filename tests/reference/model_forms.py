"""Small models of the Llama family in the forms that people have, and what their weights are.

Each writer gives the weights by the names of the original checkpoints, in float64 and in the order
of rows that :mod:`llama_torch` computes with: worked out of the bytes that were written, not by
mlxlora. A config is that of :mod:`llama_torch`, with ``model_type`` in it.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf_files
import hf_folder
import llama_torch
import mlx.core as mx
import numpy as np
import small_tokenizers
import torch
from gguf_files import BYTE_LEVEL, Tensor
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]
Config = dict[str, Any]
#: path -> (group size, bits), and (0, 0) for one that stays dense
Bits = Mapping[str, tuple[int, int]]

#: module here -> module of Hugging Face and mlx-lm, and in GGUF
MODULES = {
    "tok_embeddings": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "output": ("lm_head", "output"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
    "attention.wq": ("self_attn.q_proj", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attn_output"),
    "attention.q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attention.k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
    "feed_forward.w3": ("mlp.up_proj", "ffn_up"),
}
HF, GGUF = 0, 1
#: what sets a family apart from Llama
FAMILIES: dict[str, Config] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"biases": ("wq", "wk", "wv")},
    "qwen3": {"head_norms": True},
    "smollm3": {"n_layers": 4, "unrotated_layers": (3,)},
}
#: families whose queries and keys GGUF leaves in the order of Hugging Face
GGUF_IN_HALVES = ("qwen2", "qwen3")
GGUF_VOCAB = len(BYTE_LEVEL["tokenizer.ggml.tokens"])


def config(model_type: str = "llama", **sizes: Any) -> Config:
    """A model of 2 layers with 4 heads and 2 of keys, 64 wide; ``sizes`` are something else."""
    found: Config = {"model_type": model_type, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
    found |= {"n_kv_heads": 2, "vocab_size": 420, "norm_eps": 1e-5, "rope_theta": 10000.0}
    found |= FAMILIES[model_type] | sizes
    return {"head_dim": found["dim"] // found["n_heads"], **found}


# --- names and rows -----------------------------------------------------------


def foreign(name: str, form: int) -> str:
    """What a parameter is called there."""
    path, _, part = name.rpartition(".")
    layer = ""
    if path.startswith("layers."):
        _, number, path = path.split(".", 2)
        layer = f"{('model.layers', 'blk')[form]}.{number}."
    return f"{layer}{MODULES[path][form]}.{part}"


def turned_heads(name: str, config: Config) -> int:
    """The heads of which a parameter's rows are, where rotary positions turn them; else 0."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"wq": config["n_heads"], "wk": config["n_kv_heads"], "q_norm": 1, "k_norm": 1}
    return int(heads.get(module, 0))


def in_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows whose pairs are neighbours, with the first of all pairs in front of the second, head by head."""
    return rows.unflatten(0, (heads, -1, 2)).swapaxes(1, 2).flatten(0, 2) if heads else rows


def in_neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What :func:`in_halves` was made of."""
    return rows.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).flatten(0, 2) if heads else rows


def unpacked(words: Any, scales: Any, biases: Any, group: int, bits: int) -> np.ndarray[Any, Any]:
    """The weight that packed bits stand for, taken apart bit by bit, in float64."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    steps = stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))
    scale, bias = (np.repeat(np.asarray(part, np.float64), group, -1) for part in (scales, biases))
    return steps * scale + bias


# --- folders ------------------------------------------------------------------


def _array(tensor: torch.Tensor) -> mx.array:
    """The same numbers for MLX."""
    dtype = getattr(mx, str(tensor.dtype).removeprefix("torch."))
    return mx.array(tensor.float().contiguous().numpy()).astype(dtype)


def _wide(array: mx.array) -> np.ndarray[Any, Any]:
    """Numbers of any type, in float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def hf_config(config: Config, *, tied: bool) -> Config:
    """config.json of Hugging Face."""
    stated = {
        "model_type": config["model_type"],
        "hidden_size": config["dim"],
        "intermediate_size": config["hidden_dim"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config["n_kv_heads"],
        "head_dim": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "rms_norm_eps": config["norm_eps"],
        "rope_theta": config["rope_theta"],
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "eos_token_id": 1,
    }
    if config["model_type"] == "mistral":
        stated["sliding_window"] = config["sliding_window"]
    if config["model_type"] == "smollm3":
        marks = [int(i not in config["unrotated_layers"]) for i in range(config["n_layers"])]
        stated["no_rope_layers"] = marks
    return stated


def write_hf(
    folder: Path,
    config: Config,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 0,
    tied: bool = False,
    bits: Bits | None = None,
    seed: int = 0,
) -> Weights:
    """A folder of Hugging Face; with ``bits`` one of mlx-lm's, where 4 bits and groups of 32 are the rule.

    Args:
        folder: made if absent.
        config: of the model.
        dtype: of the weights, and of scales and biases.
        shards: into how many files, with an index; 0 is one file without.
        tied: whether the embedding is the head.
        bits: by the paths of Hugging Face.
        seed: of the weights.
    """
    drawn = llama_torch.random_weights(config, tied=tied, seed=seed)
    weights = {name: weight.to(dtype) for name, weight in drawn.items()}
    tensors = {foreign(n, HF): _array(in_halves(w, turned_heads(n, config))) for n, w in weights.items()}
    stated = hf_config(config, tied=tied)
    if bits is not None:
        tensors = hf_folder.packed(tensors, bits)
        table: Config = {"group_size": 32, "bits": 4}
        table |= {path: {"group_size": g, "bits": b} if b else False for path, (g, b) in bits.items()}
        stated |= {"quantization": table, "quantization_config": table}
    if shards:
        hf_folder.write_shards(folder, tensors, shards, stated)
    else:
        hf_folder.write(folder, tensors, stated)
    small_tokenizers.write(folder, small_tokenizers.byte_level(["<s>", "</s>"], bos="<s>"), {}, 1)
    return {name: _exact(name, weight, tensors, bits or {}, config) for name, weight in weights.items()}


def _exact(
    name: str, weight: torch.Tensor, tensors: Mapping[str, mx.array], bits: Bits, config: Config
) -> torch.Tensor:
    """What a folder of mlx-lm holds of a weight."""
    path = foreign(name, HF).removesuffix(".weight")
    if f"{path}.scales" not in tensors:
        return weight.double()
    words, scales, biases = (tensors[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
    found = unpacked(np.array(words), _wide(scales), _wide(biases), *bits.get(path, (32, 4)))
    return in_neighbours(torch.from_numpy(found), turned_heads(name, config))


def write_mistral(folder: Path, config: Config, tokenizer: Path) -> Weights:
    """A folder as Mistral lays it out: its own names, params.json, and a tokenizer of a version."""
    folder.mkdir()
    weights = {n: w.bfloat16() for n, w in llama_torch.random_weights(config).items()}
    hf_folder.save(folder / "consolidated.safetensors", {n: _array(w) for n, w in weights.items()})
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps", "vocab_size")
    params = {key: config[key] for key in (*keys, "rope_theta")}
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model.v3").write_bytes(tokenizer.read_bytes())
    return {name: weight.double() for name, weight in weights.items()}


def read_folder(folder: Path) -> Weights:
    """The weights of a model folder in one safetensors file, packed by ``affine`` or dense."""
    tensors = load_file(folder / "model.safetensors")
    stated = json.loads((folder / "config.json").read_text())
    for path, differing in stated.get("quantized", {}).items():
        options = stated["quantization"] | differing
        words, scales, biases = (tensors.pop(f"{path}.{part}") for part in ("weight", "scales", "biases"))
        parts = (words.view(torch.uint8).numpy(), scales.double().numpy(), biases.double().numpy())
        tensors[f"{path}.weight"] = torch.from_numpy(unpacked(*parts, options["group_size"], options["bits"]))
    return {name: tensor.double() for name, tensor in tensors.items()}


# --- GGUF ---------------------------------------------------------------------


def gguf_keys(config: Config) -> Config:
    """The metadata that llama.cpp's converter writes, without a tokenizer."""
    prefix = config["model_type"]
    keys = {
        "block_count": config["n_layers"],
        "context_length": 256,
        "embedding_length": config["dim"],
        "feed_forward_length": config["hidden_dim"],
        "attention.head_count": config["n_heads"],
        "attention.head_count_kv": config["n_kv_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    return {"general.architecture": prefix} | {f"{prefix}.{key}": value for key, value in keys.items()}


def write_gguf(path: Path, config: Config, kinds: tuple[str, ...], *, tied: bool = False) -> Weights:
    """A file whose matrices take turns at some types; vectors are F32."""
    tensors, weights = [], {}
    matrices = 0
    for number, (name, shape) in enumerate(llama_torch.shapes(config, tied=tied).items()):
        kind = "F32"
        if len(shape) > 1:
            kind, matrices = kinds[matrices % len(kinds)], matrices + 1
        data = tensor_bytes(name, kind, shape, number)
        tensors.append(Tensor(foreign(name, GGUF), shape, kind, data))
        found = torch.tensor(gguf_files.weights(kind, data), dtype=torch.float64).reshape(shape)
        halves = config["model_type"] in GGUF_IN_HALVES
        weights[name] = in_neighbours(found, turned_heads(name, config)) if halves else found
    keys = {**gguf_keys(config), **BYTE_LEVEL, "tokenizer.ggml.add_bos_token": True}
    path.write_bytes(gguf_files.gguf(keys, tensors))
    return weights


def tensor_bytes(name: str, kind: str, shape: tuple[int, ...], seed: int) -> bytes:
    """Random numbers of a type that are of about the size of a model's."""
    _, in_block, size = gguf_files.TYPES[kind]
    if in_block > 1:
        data = random.Random(seed).randbytes(math.prod(shape) // in_block * size)
        return with_scales(kind, data, 2.5 / shape[-1] ** 0.5, seed)
    numbers = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        numbers *= 1.5 / shape[-1] ** 0.5
    else:
        numbers = 0.3 * numbers if name.endswith("bias") else 1 + 0.2 * numbers
    if kind == "F32":
        return numbers.tobytes()
    half = torch.from_numpy(numbers).to({"F16": torch.float16, "BF16": torch.bfloat16}[kind])
    return half.view(torch.int16).numpy().tobytes()


def with_scales(kind: str, data: bytes, largest: float, seed: int) -> bytes:
    """Blocks whose weights are of both signs and seldom above ``largest``."""
    draw, content = random.Random(seed), bytearray(data)
    middle = {"Q4": 8, "Q5": 16, "Q8": 128, "Q6": 32}[kind[:2]]
    for at in range(0, len(data), gguf_files.TYPES[kind][2]):
        scale = draw.uniform(0.5, 1.5) * largest / middle / (64 if kind.endswith("K") else 1)
        # The second number is what is added, and in super-blocks what is taken off.
        numbers = (scale, middle * scale if kind.endswith("K") else -middle * scale)
        for half, number in zip(gguf_files.HALVES[kind], numbers, strict=False):
            struct.pack_into("<e", content, at + half, number)
    return bytes(content)


# --- adapters -----------------------------------------------------------------


def adapted(weights: Mapping[str, torch.Tensor], adapter: Path, scale: float) -> Weights:
    """The weights with the LoRA adapter in a file added: W + scale · (A B)ᵀ.

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """
    parts = {name: part.double() for name, part in load_file(adapter).items()}
    found = dict(weights)
    for name in parts:
        if path := name.removesuffix(".lora_a") if name.endswith(".lora_a") else "":
            change = scale * (parts[name] @ parts[f"{path}.lora_b"]).T
            found[f"{path}.weight"] = found[f"{path}.weight"] + change
    return found
