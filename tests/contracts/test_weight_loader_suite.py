"""The conformance suite over every weight loader that is registered."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from mlxlora_core import plugins as registry
from mlxlora_core.testing.weight_loader import WeightLoaderSuite

LOADERS = {c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("loader")}
WIDTH = 8


class TestTorchPth(WeightLoaderSuite):
    """One shard, every dtype."""

    spec = LOADERS["torch-pth"]
    shards = 1

    def write(self, folder: Path) -> Mapping[str, mx.array]:
        draw = np.random.default_rng(7)

        def some(*shape: int) -> np.ndarray:
            # Small multiples of 1/8 are exact in every dtype.
            return draw.integers(-64, 64, shape).astype(np.float32) / 8

        want = {
            "tok_embeddings.weight": mx.array(some(12, WIDTH)).astype(mx.bfloat16),
            "layers.0.attention.wq.weight": mx.array(some(WIDTH, WIDTH)).astype(mx.float16),
            "layers.0.attention.wo.weight": mx.array(some(WIDTH, WIDTH)).astype(mx.bfloat16),
            "norm.weight": mx.array(some(WIDTH)),
        }
        axes = {
            "tok_embeddings.weight": 1,
            "layers.0.attention.wq.weight": 0,
            "layers.0.attention.wo.weight": 1,
        }
        whole = {name: to_torch(array) for name, array in want.items()}
        write_shards(folder, whole, axes, self.shards)
        return want

    def write_large(self, folder: Path, total_bytes: int) -> None:
        weight = torch.zeros(2048, 2048, dtype=torch.float16)  # 8 MiB
        count = -(-total_bytes // weight.nbytes)
        whole = {
            f"layers.{n}.attention.wq.weight": weight + n + torch.arange(2048)[:, None] for n in range(count)
        }
        axes = dict.fromkeys(whole, 0)
        write_shards(folder, whole, axes, self.shards)

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        last = f"consolidated.{self.shards - 1:02d}.pth"
        return {
            "truncated": lambda folder: os.truncate(folder / last, (folder / last).stat().st_size // 2),
            "emptied": lambda folder: os.truncate(folder / last, 0),
            "one bit of a weight": lambda folder: flip_a_bit(folder / last),
            "a web page": lambda folder: (folder / last).write_text("<!DOCTYPE html><html></html>"),
            "a shard too many": lambda folder: shutil.copy(
                folder / last, folder / f"consolidated.{self.shards:02d}.pth"
            ),
            "a NaN": lambda folder: poke(folder / last, "layers.0.attention.wq.weight", float("nan")),
            "params.json cut": lambda folder: os.truncate(folder / "params.json", 5),
        }

    def hostile(self) -> Mapping[str, Callable[[Path, Path], object]]:
        last = f"consolidated.{self.shards - 1:02d}.pth"

        def plant(new_format: bool) -> Callable[[Path, Path], object]:
            def write(folder: Path, canary: Path) -> None:
                table: dict[str, Any] = torch.load(folder / last, weights_only=True)
                table["layers.0.attention.wk.weight"] = Touch(canary)
                torch.save(table, folder / last, _use_new_zipfile_serialization=new_format)

            return write

        return {"a call in the pickle": plant(True), "a call in a bare pickle": plant(False)}


class TestTorchPthOfTwoShards(TestTorchPth):
    """The same model, split for model parallelism."""

    shards = 2


def test_every_loader_is_covered() -> None:
    elsewhere = {"gguf": "plugins/test_gguf_suite.py", "hf": "plugins/test_hf_suite.py"}
    assert {TestTorchPth.spec.name, *elsewhere} == set(LOADERS)
    assert all((Path(__file__).parents[1] / path).is_file() for path in elsewhere.values())


def test_the_documented_loader_works(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/kinds/weight-loaders.md").read_text()
    code = next(block for block in page.split("```python\n")[1:] if "def open_folder" in block).split("```")[
        0
    ]
    names: dict[str, Any] = {"__name__": "one_file"}
    exec(code, names)
    (spec,) = names["mlxlora_weight_loaders"]()
    want = {"a": mx.arange(6.0).reshape(2, 3), "b": mx.array([1.5, -2.0]).astype(mx.bfloat16)}
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), want)
    (tmp_path / "config.json").write_text("{}")
    assert spec.detect(tmp_path)
    tensors = spec.open(tmp_path, spec.options()).tensors
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        "a": ((2, 3), "float32"),
        "b": ((2,), "bfloat16"),
    }
    assert all(mx.array_equal(t.read(), want[name]).item() for name, t in tensors.items())


class Touch:
    """Unpickled without care, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def to_torch(array: mx.array) -> torch.Tensor:
    dtype = getattr(torch, str(array.dtype).rsplit(".", 1)[-1])
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(dtype)


def write_shards(folder: Path, whole: dict[str, torch.Tensor], axes: dict[str, int], count: int) -> None:
    for number in range(count):
        part = {
            name: t.chunk(count, axes[name])[number].clone() if name in axes else t
            for name, t in whole.items()
        }
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps({"dim": WIDTH, "n_layers": 1, "n_heads": 2}))
    (folder / "tokenizer.model").write_bytes(b"not looked at")


def poke(path: Path, name: str, value: float) -> None:
    table = torch.load(path, weights_only=True)
    table[name][0, 0] = value
    torch.save(table, path)


def flip_a_bit(path: Path) -> None:
    """Change a byte of the embedding, which is the first tensor in the file."""
    table = torch.load(path, weights_only=True)
    data = bytearray(path.read_bytes())
    start = data.index(bytes(table["tok_embeddings.weight"].contiguous().view(torch.uint8).numpy()))
    data[start] ^= 1
    path.write_bytes(data)
