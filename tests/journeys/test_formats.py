"""What people have lying about, through the verbs: odd checkpoints, foreign adapters, other formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch

Command = Callable[..., Any]
PROMPT = ("--prompt", "A layer", "--temp", 0, "-n", 3, "--seed", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint whose linears are wide enough for groups of 64."""
    return make_checkpoint(tmp_path_factory.mktemp("wide") / "checkpoint", dim=64)


@pytest.fixture
def convert(tmp_path: Path, checkpoint: Path, mlxlora: Command) -> Callable[..., Path]:
    """A function that converts the wide checkpoint with the verb."""

    def make(name: str, *more: object) -> Path:
        done = mlxlora("convert", "--torch-path", checkpoint, "--mlx-path", tmp_path / name, *more)
        assert done.code == 0, done.err
        return tmp_path / name

    return make


# --- conversion ---------------------------------------------------------------


def test_what_was_done_to_a_checkpoint_is_printed_and_kept(
    tmp_path: Path, make_checkpoint: Callable[..., Path], mlxlora: Command
) -> None:
    params = {"multiple_of": None, "head_dim": 8, "hidden_dim": 64}
    folder = make_checkpoint(tmp_path / "checkpoint", params=params)
    stated = json.loads((folder / "params.json").read_text())
    del stated["multiple_of"], stated["n_kv_heads"]
    (folder / "params.json").write_text(json.dumps(stated))
    tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save(
        {"model": {f"module.{k}": v for k, v in tensors.items()}, "step": 3}, folder / "consolidated.00.pth"
    )
    (folder / "tokenizer.model").rename(folder / "tokenizer.model.v3")
    told = (
        "tokenizer.model.v3 is taken for tokenizer.model",
        "the tensors stand below 'model'; left out beside them: 'step'",
        "taken off the names of the tensors: 'module.'",
        "params.json states no rope_theta: 1000000.0 is taken, as Mistral's own reader has it",
        "params.json leaves out what the tensors tell: n_kv_heads 2",
    )
    done = mlxlora("convert", "--torch-path", folder, "--mlx-path", tmp_path / "model")
    assert done.code == 0 and all(words in done.out for words in told), done.out + done.err
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["rope_theta"], config["n_kv_heads"]) == (1e6, 2)
    done = mlxlora("convert", "--torch-path", folder, "--mlx-path", tmp_path / "again", "--json")
    assert [note.split(";")[0] for note in json.loads(done.out)["notes"]] == [
        words.split(";")[0] for words in told
    ]


def test_a_key_that_nobody_knows_is_one_line(
    tmp_path: Path, make_checkpoint: Callable[..., Path], mlxlora: Command
) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", params={"rope_tetha": 5e5, "moe": {"num_experts": 8}})
    done = mlxlora("convert", "--torch-path", folder, "--mlx-path", tmp_path / "model")
    assert done.code == 4 and "did you mean 'rope_theta'?" in done.error and "moe: got" in done.error


@pytest.mark.parametrize("group", [64, 128])
def test_quantizing_nothing_is_an_error_before_there_is_a_folder(
    tmp_path: Path, tiny_checkpoint: Path, mlxlora: Command, group: int
) -> None:
    """Groups of 64 divide the inputs of w2 alone, groups of 128 none."""
    done = mlxlora(
        *("convert", "--torch-path", tiny_checkpoint, "--mlx-path", tmp_path / "model", "-q"),
        *("--q-group-size", group),
    )
    if group == 64:
        assert done.code == 0 and "2 linears quantized" in done.out
        return
    assert done.code == 2 and not (tmp_path / "model").exists()
    assert "nothing is quantized: quantizer 'affine' (group_size 128, bits 4)" in done.err.splitlines()[-1]


# --- what is not read ---------------------------------------------------------


def write(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


HF_CONFIG = json.dumps(
    {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32}
).encode()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("model.gguf", b"GGUF\x03\0\0\0", "GGUF file"),
        ("model.bin", b"ggjt\x03\0\0\0", "GGML file"),
        ("config.json", HF_CONFIG, "there are no weights; read are model.safetensors, or shards"),
        ("pytorch_model.bin", b"PK\x03\x04", "pytorch_model.bin"),
        ("model.pth", b"PK\x03\x04", "none is called consolidated.NN.pth"),
    ],
)
def test_other_formats_are_named(
    tmp_path: Path, mlxlora: Command, name: str, content: bytes, told: str
) -> None:
    folder = write(tmp_path / "theirs", name, content)
    source = folder / name if name in ("model.gguf", "model.bin") else folder
    done = mlxlora("convert", "--torch-path", source, "--mlx-path", tmp_path / "model")
    assert done.code == 4 and told in done.error
    if "config" not in name:
        done = mlxlora("generate", "--model", source, *PROMPT)
        assert done.code == 4 and told in done.error


def test_a_model_folder_needs_no_conversion(
    convert: Callable[..., Path], tmp_path: Path, mlxlora: Command
) -> None:
    done = mlxlora("convert", "--torch-path", convert("model"), "--mlx-path", tmp_path / "again")
    assert done.code == 4 and "is a model folder already" in done.error
    more = ("--torch-path", tmp_path / "model", "--mlx-path", tmp_path / "packed", "-q", "--q-group-size", 32)
    assert mlxlora("convert", *more).code == 0


def test_a_quantized_embedding_that_config_json_does_not_tell_of_is_named(
    convert: Callable[..., Path], mlxlora: Command
) -> None:
    folder = convert("model")
    weights, _ = mx.load(str(folder / "model.safetensors"), return_metadata=True)
    path = "tok_embeddings"
    packed = mx.quantize(weights[f"{path}.weight"], group_size=64, bits=4)
    weights |= {f"{path}.{part}": t for part, t in zip(("weight", "scales", "biases"), packed, strict=True)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    done = mlxlora("generate", "--model", folder, *PROMPT)
    assert done.code == 4 and "2 unknown: tok_embeddings.biases, tok_embeddings.scales" in done.error


# --- padding ------------------------------------------------------------------


def test_padding_is_never_drawn_by_generate_nor_by_run(
    tmp_path: Path, make_checkpoint: Callable[..., Path], tiny_data: Path, mlxlora: Command
) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for name in ("tok_embeddings.weight", "output.weight"):
        rows = torch.stack([torch.full((32,), 50.0), torch.full((32,), -50.0)]).half()
        tensors[name] = torch.cat([tensors[name], rows if name.startswith("output") else rows * 0])
    torch.save(tensors, folder / "consolidated.00.pth")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        [run]
        folder = "{tmp_path / "run"}"
        [model]
        torch_path = "{folder}"
        [data]
        use = "jsonl"
        options = {{ path = "{tiny_data}" }}
        [train]
        iters = 2
        [generate]
        prompts = ["A layer"]
        num_tokens = 8
        """
    )
    done = mlxlora("run", recipe)
    assert done.code == 0, done.err
    assert "has 2 more ids than the tokenizer has pieces: no text, and never drawn" in done.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    stages = (record["stages"][stage]["result"]["answers"] for stage in ("before", "after"))
    assert all(answer["text"].strip() for answers in stages for answer in answers), "padding would be no text"
    done = mlxlora("generate", "--model", tmp_path / "run" / "model", "--no-adapter", *PROMPT)
    assert done.code == 0 and done.out.strip()


# --- adapters -----------------------------------------------------------------


def foreign(path: Path, rank: int, names: tuple[str, ...] = ("wq", "wv")) -> Path:
    """An adapter of the wide model as Apple's LoRA example writes one."""
    widths = {"wq": 64, "wk": 32, "wv": 32}
    tensors = {}
    for name in names:
        tensors[f"layers.1.attention.{name}.lora_a"] = mx.random.normal((64, rank), key=mx.random.key(1))
        tensors[f"layers.1.attention.{name}.lora_b"] = mx.random.normal(
            (rank, widths[name]), key=mx.random.key(2)
        )
    mx.savez(str(path), **tensors)
    return path


def test_a_foreign_adapter_answers_and_what_is_assumed_is_told(
    convert: Callable[..., Path], tmp_path: Path, tiny_data: Path, mlxlora: Command
) -> None:
    model, adapter = convert("model"), foreign(tmp_path / "adapters.npz", 4)
    done = mlxlora("generate", "--model", model, "--adapter-file", adapter, *PROMPT)
    assert done.code == 0 and "was read as lora by mlx-lm: rank 4 and 2 linears" in done.err
    assert "does not say its scale: 2.0 is assumed (say another with --set adapter.scale=VALUE)" in done.err
    stated = mlxlora(
        *("evaluate", "--model", model, "--adapter-file", adapter, "--data", tiny_data),
        *("--set", "adapter.scale=2.5", "--set", "adapter.rank=4"),
    )
    assert stated.code == 0 and "does not say" not in stated.err
    other = mlxlora(
        "generate", "--model", model, "--adapter-file", adapter, "--set", "adapter.rank=8", *PROMPT
    )
    assert other.code == 4 and "rank is 4, wanted 8" in other.error
    into = tmp_path / "own.safetensors"
    done = mlxlora(
        *("train", "--model", model, "--data", tiny_data, "--resume-adapter-file", adapter, "--iters", 2),
        *("--adapter-file", into, "--set", "adapter.scale=3.0"),
    )
    assert done.code == 0 and "was read as lora by mlx-lm" in done.err, done.err
    done = mlxlora("generate", "--model", model, "--adapter-file", into, *PROMPT)
    assert done.code == 0 and "was read as" not in done.err


def trained(mlxlora: Command, model: Path, data: Path, into: Path) -> Path:
    done = mlxlora(
        *("train", "--model", model, "--data", data, "--adapter-file", into, "--iters", 20),
        *("--learning-rate", 1e-2, "--lora-layers", -1),
    )
    assert done.code == 0, done.err
    return into


def test_an_adapter_of_a_quantized_base_goes_everywhere_when_it_is_allowed(
    convert: Callable[..., Path], tmp_path: Path, tiny_data: Path, mlxlora: Command
) -> None:
    dense, packed = convert("dense"), convert("packed", "-q")
    adapter = ("--adapter-file", trained(mlxlora, packed, tiny_data, tmp_path / "a.safetensors"))
    allow = ("--base-mismatch", "allow")
    verbs: dict[str, tuple[object, ...]] = {
        "generate": PROMPT,
        "evaluate": ("--data", tiny_data),
        "fuse": ("--save-path", tmp_path / "fused"),
        "export": ("--to", "npz", "--out", tmp_path / "exported"),
    }
    for verb, more in verbs.items():
        done = mlxlora(verb, "--model", dense, *adapter, *more)
        assert done.code == 4, done.err
        assert "made for another base" in done.err and "--base-mismatch allow" in done.err.splitlines()[-1]
        done = mlxlora(verb, "--model", dense, *adapter, *more, *allow)
        assert done.code == 0 and "made for another base" in done.err, done.err
        assert "rounded" not in done.err
    more = ("--data", tiny_data, "--iters", 1, "--adapter-file", tmp_path / "b.safetensors")
    resume = ("--resume-adapter-file", adapter[1])
    assert mlxlora("train", "--model", dense, *more, *resume).code == 4
    done = mlxlora("train", "--model", dense, *more, *resume, *allow)
    assert done.code == 0 and "made for another base" in done.err, done.err
    done = mlxlora("generate", "--model", dense, "--adapter-file", tmp_path / "b.safetensors", *PROMPT)
    assert done.code == 0 and "made for another base" not in done.err


@pytest.mark.parametrize("option", ["--dequantize", "--de-quantize"])
def test_fuse_makes_a_dense_model_of_a_quantized_one(
    convert: Callable[..., Path], tmp_path: Path, tiny_data: Path, mlxlora: Command, option: str
) -> None:
    packed = convert("packed", "-q", "--q-bits", 3)
    adapter = ("--adapter-file", trained(mlxlora, packed, tiny_data, tmp_path / "a.safetensors"))
    done = mlxlora("fuse", "--model", packed, *adapter, "--save-path", tmp_path / "dense", option)
    assert done.code == 0 and "warning" not in done.err, done.err
    assert "quantiz" not in (tmp_path / "dense" / "config.json").read_text()
    tested = [mlxlora("evaluate", "--model", packed, "--data", tiny_data, *adapter, "--json")]
    tested += [
        mlxlora("evaluate", "--model", tmp_path / "dense", "--data", tiny_data, "--no-adapter", "--json")
    ]
    one, other = (json.loads(done.out)["loss"] for done in tested)
    assert abs(one - other) < 5e-3
    shutil.rmtree(tmp_path / "dense")


def test_rounding_is_warned_of_only_where_something_was_quantized(
    convert: Callable[..., Path], tmp_path: Path, tiny_data: Path, mlxlora: Command
) -> None:
    """An adapter that changes next to nothing: float16 rounds it away too, but nothing was quantized."""
    for name, more, warned in (("dense", (), False), ("packed", ("-q", "--q-bits", 2), True)):
        model = convert(name, *more)
        into = tmp_path / f"{name}.safetensors"
        done = mlxlora(
            *("train", "--model", model, "--data", tiny_data, "--adapter-file", into, "--iters", 1),
            *("--learning-rate", 1e-7),
        )
        assert done.code == 0, done.err
        done = mlxlora(
            "fuse", "--model", model, "--adapter-file", into, "--save-path", tmp_path / f"{name}-fused"
        )
        assert done.code == 0 and ("warning: quantizing again rounded" in done.err) is warned, done.err
