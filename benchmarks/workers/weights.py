"""One set of weights, as a Meta checkpoint and as a Hugging Face folder.

Meta's checkpoints turn neighbouring features 2i and 2i + 1 by one rotary
angle, Hugging Face's turn features i and i + E/2: the rows of wq and wk are
reordered within each head, so that both compute the same.

Run in an environment with torch, safetensors and sentencepiece::

    python -m workers.weights '{"shape": "90m", "folder": "/tmp/work"}'
"""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from workers.shapes import SHAPES, Shape

META, HUGGING_FACE, ROWS = "meta", "hugging-face", "rows.json"
NORM_EPS, ROPE_THETA, CONTEXT = 1e-5, 10000.0, 2048
ROWS_MADE = 32  # training rows, of which each step takes a batch

#: names of a layer's tensors, Meta's and Hugging Face's
_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def random_tensors(shape: Shape, dtype: str = "float16", device: str = "cpu") -> dict[str, Any]:
    """Meta's names -> tensors in main memory; drawn on the CPU, they are the same on every machine.

    Scaled so that scores and logits differ well, and a loss tells a rotary
    position or a head that is out of place.

    Args:
        shape: of the model.
        dtype: of the tensors.
        device: that draws; a GPU makes a model of 7 B parameters in a second, a CPU in minutes.
    """
    import torch

    draw, stored = torch.Generator(device).manual_seed(0), getattr(torch, dtype)
    width, inner, kv = shape.width, shape.heads * shape.head, shape.kv_heads * shape.head

    def normal(outputs: int, inputs: int, gain: float = 1.0) -> Any:
        drawn = torch.randn(outputs, inputs, generator=draw, device=device)
        return drawn.mul_(gain / inputs**0.5).to(stored).cpu()

    tensors = {
        "tok_embeddings.weight": normal(shape.vocabulary, width, width**0.5),
        "norm.weight": torch.ones(width).to(stored),
    }
    for i in range(shape.layers):
        tensors |= {
            f"layers.{i}.attention.wq.weight": normal(inner, width, 1.5),
            f"layers.{i}.attention.wk.weight": normal(kv, width, 1.5),
            f"layers.{i}.attention.wv.weight": normal(kv, width),
            f"layers.{i}.attention.wo.weight": normal(width, inner),
            f"layers.{i}.feed_forward.w1.weight": normal(shape.mlp, width),
            f"layers.{i}.feed_forward.w2.weight": normal(width, shape.mlp),
            f"layers.{i}.feed_forward.w3.weight": normal(shape.mlp, width),
            f"layers.{i}.attention_norm.weight": torch.ones(width).to(stored),
            f"layers.{i}.ffn_norm.weight": torch.ones(width).to(stored),
        }
    if not shape.tied:
        tensors["output.weight"] = normal(shape.vocabulary, width, 2.0)
    return tensors


def write_meta(folder: Path, shape: Shape, tensors: dict[str, Any]) -> None:
    """consolidated.00.pth, params.json and a tokenizer.model of the vocabulary."""
    import torch

    folder.mkdir()
    torch.save(tensors, folder / "consolidated.00.pth")
    params = {
        "dim": shape.width,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "head_dim": shape.head,
        "norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "vocab_size": shape.vocabulary,
        "max_seq_len": CONTEXT,
    }
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(tokenizer(shape.vocabulary))


def tokenizer(vocabulary: int) -> bytes:
    """A SentencePiece model of exactly ``vocabulary`` pieces, trained on made-up words."""
    import sentencepiece

    draw = random.Random(0)
    syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s")]
    words = ["".join(draw.choices(syllables, k=draw.randint(2, 5))) for _ in range(60_000)]
    lines = (" ".join(draw.choices(words, k=12)) for _ in range(30_000))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        minloglevel=2,
    )
    return model.getvalue()


def write_hugging_face(folder: Path, shape: Shape, tensors: dict[str, Any]) -> None:
    """config.json, model.safetensors and a tokenizer with a word for each id."""
    from safetensors.torch import save_file

    folder.mkdir()
    renamed = {}
    for name, tensor in tensors.items():
        heads = {"wq": shape.heads, "wk": shape.kv_heads}.get(name.split(".")[-2])
        renamed[hugging_face_name(name)] = half_split(tensor, heads) if heads else tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "intermediate_size": shape.mlp,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(tensors["norm.weight"].dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, shape.vocabulary)}
    made = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(made))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    named |= {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def hugging_face_name(name: str) -> str:
    """``layers.3.attention.wq.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] != "layers":
        return _OUTSIDE[parts[0]] + ".weight"
    return f"model.layers.{parts[1]}.{_LAYER['.'.join(parts[2:])]}.weight"


def half_split(weight: Any, heads: int) -> Any:
    """Rows of each head in the order 0, 2, 4, …, 1, 3, 5, …"""
    outputs, inputs = weight.shape
    pairs = weight.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.transpose(1, 2).reshape(outputs, inputs).contiguous()


def main() -> None:
    """Write both folders and the rows."""
    import torch

    asked = json.loads(sys.argv[1])
    (shape,) = [shape for shape in SHAPES if shape.name == asked["shape"]]
    folder = Path(asked["folder"])
    if asked.get("checkpoint"):
        shutil.copytree(asked["checkpoint"], folder / META)
        tensors = torch.load(folder / META / "consolidated.00.pth", weights_only=True)
    else:
        device = "cuda" if shape.needs_gpu and torch.cuda.is_available() else "cpu"
        tensors = random_tensors(shape, asked.get("dtype", "float16"), device)
        write_meta(folder / META, shape, tensors)
    write_hugging_face(folder / HUGGING_FACE, shape, tensors)
    draw = random.Random(0)
    rows = [draw.choices(range(3, shape.vocabulary), k=shape.row_tokens + 1) for _ in range(ROWS_MADE)]
    (folder / ROWS).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
