"""The conformance suite of weight loaders over each kind of folder that ``hf`` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import hf_folder
import mlx.core as mx
from mlxlora_hf import mlxlora_weight_loaders

from mlxlora_core.testing.weight_loader import WeightLoaderSuite

(SPEC,) = mlxlora_weight_loaders()


def large(folder: Path, total_bytes: int) -> dict[str, mx.array]:
    """Tensors of 8 MiB each, ``total_bytes`` in all."""
    count = -(-total_bytes // (8 << 20))
    return {
        f"model.layers.{i}.self_attn.q_proj.weight": mx.full((2048, 2048), i, mx.bfloat16)
        for i in range(count)
    }


class TestHuggingFace(WeightLoaderSuite):
    """One file."""

    spec = SPEC
    weights = "model.safetensors"

    def write(self, folder: Path) -> Mapping[str, mx.array]:
        want = hf_folder.dense()
        hf_folder.write(folder, want)
        return want

    def write_large(self, folder: Path, total_bytes: int) -> None:
        hf_folder.write(folder, large(folder, total_bytes))

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        def spoil(*, at: int) -> Callable[[Path], object]:
            def write(folder: Path) -> None:
                path = folder / self.weights
                data = bytearray(path.read_bytes())
                data[at] ^= 0x20
                path.write_bytes(data)

            return write

        return {
            "truncated": lambda folder: os.truncate(folder / self.weights, 5000),
            "emptied": lambda folder: os.truncate(folder / self.weights, 0),
            "a web page": lambda folder: (folder / self.weights).write_text("<html></html>"),
            "a bit of the length": spoil(at=3),
            "a bit of the header": spoil(at=8),
            "config.json cut": lambda folder: os.truncate(folder / "config.json", 5),
        }

    def hostile(self) -> Mapping[str, Callable[[Path, Path], object]]:
        def plant(folder: Path, canary: Path) -> None:
            (folder / "modeling.py").write_text(f"open({str(canary)!r}, 'w')")
            config = json.loads((folder / "config.json").read_text())
            hf_folder.write_json(folder / "config.json", config | {"model_file": "modeling.py"})

        return {"a file of code": plant}


class TestShards(TestHuggingFace):
    """Several files with an index."""

    weights = "model-00002-of-00003.safetensors"

    def write(self, folder: Path) -> Mapping[str, mx.array]:
        want = hf_folder.dense()
        hf_folder.write_shards(folder, want, 3)
        return want

    def write_large(self, folder: Path, total_bytes: int) -> None:
        hf_folder.write_shards(folder, large(folder, total_bytes), 3)


class TestMlxLm(TestHuggingFace):
    """Packed weights; what is read of them is dense."""

    def write(self, folder: Path) -> Mapping[str, mx.array]:
        tensors = hf_folder.packed(hf_folder.dense(), {})
        hf_folder.write(folder, tensors, hf_folder.CONFIG | {"quantization": {"group_size": 32, "bits": 4}})
        want = hf_folder.dense()
        for name in want:
            path = name.removesuffix(".weight")
            if f"{path}.scales" in tensors:
                parts = (tensors[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
                words, scales, biases = parts
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
                want[name] = mx.dequantize(words, scales, biases, 32, 4)
        return want
