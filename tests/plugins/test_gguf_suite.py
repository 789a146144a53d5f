"""The conformance suite over the loader of GGUF files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf_files
import mlx.core as mx
import mlxlora_gguf
import numpy as np

from mlxlora_core.testing.weight_loader import WeightLoaderSuite


class TestGguf(WeightLoaderSuite):
    """One file, dense and packed tensors."""

    (spec,) = mlxlora_gguf.mlxlora_weight_loaders()
    parts = 1

    def write(self, folder: Path) -> Mapping[str, mx.array]:
        tensors = gguf_files.some_tensors()
        self._write_parts(folder, tensors)
        types = {"F16": mx.float16, "BF16": mx.bfloat16}
        weights = {t.name: np.array(gguf_files.weights(t.type, t.data)).reshape(t.shape) for t in tensors}
        return {
            t.name: mx.array(weights[t.name], mx.float32).astype(types.get(t.type, mx.float32))
            for t in tensors
        }

    def write_large(self, folder: Path, total_bytes: int) -> None:
        data = gguf_files.blocks("Q8_0", 1 << 10) * 64  # 2 MiB of weights, 8 MiB as float32
        count = -(-total_bytes // (8 << 20))
        names = [f"blk.{n}.ffn_up.weight" for n in range(count)]
        self._write_parts(folder, [gguf_files.Tensor(name, (2048, 1024), "Q8_0", data) for name in names])

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        def last(folder: Path) -> Path:
            return max(folder.iterdir())

        def no_number(folder: Path) -> None:
            path = last(folder)  # whose last tensor is bfloat16
            path.write_bytes(path.read_bytes()[:-32] + 16 * b"\xff\x7f")

        return {
            "truncated": lambda folder: os.truncate(last(folder), last(folder).stat().st_size // 2),
            "emptied": lambda folder: os.truncate(last(folder), 0),
            "cut in the header": lambda folder: os.truncate(last(folder), 100),
            "a web page": lambda folder: last(folder).write_text("<!DOCTYPE html><html></html>"),
            "a NaN": no_number,
        }

    def _write_parts(self, folder: Path, tensors: Sequence[gguf_files.Tensor]) -> None:
        keys: dict[str, Any] = {**gguf_files.ARCHITECTURE, **gguf_files.BYTE_LEVEL}
        if self.parts == 1:
            (folder / "model.gguf").write_bytes(gguf_files.gguf(keys, tensors))
            return
        split = {"split.count": self.parts, "split.tensors.count": len(tensors)}
        size = -(-len(tensors) // self.parts)
        for number in range(self.parts):
            told = {**(keys if number == 0 else {}), **split, "split.no": number}
            content = gguf_files.gguf(told, tensors[number * size : (number + 1) * size])
            (folder / f"model-{number + 1:05d}-of-{self.parts:05d}.gguf").write_bytes(content)


class TestGgufOfTwoParts(TestGguf):
    """The same model in two files."""

    parts = 2
