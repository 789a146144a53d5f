"""What the ``npz`` exporter writes: the files of MLX's first LoRA example."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlxlora_npz import NpzOptions, export

from mlxlora_core.errors import ModelError
from mlxlora_core.values import ExportAdapter, ExportSource, LazyTensor


def lazy(values: Any, dtype: str = "float32") -> LazyTensor:
    array = mx.array(values, dtype=getattr(mx, dtype))
    return LazyTensor(tuple(array.shape), dtype, lambda: array)


@pytest.fixture
def source(tmp_path: Path) -> ExportSource:
    (tmp_path / "a.model").write_bytes(b"pieces")
    (tmp_path / "b.json").write_bytes(b"{}")
    files = {"tokenizer.model": tmp_path / "a.model", "added.json": tmp_path / "b.json"}
    return ExportSource({"dim": 2}, files, {"norm.weight": lazy([1, 2.5])})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_the_files_and_their_names(source: ExportSource, out: Path) -> None:
    export(source, out, NpzOptions())
    names = {path.name for path in out.iterdir()}
    assert names == {"weights.npz", "config.json", "tokenizer.model", "added.json"}
    assert json.loads((out / "config.json").read_text()) == {"dim": 2}
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert np.load(out / "weights.npz")["norm.weight"].tolist() == [1, 2.5]


def test_an_adapter_is_kept_beside_with_what_it_says_of_itself(source: ExportSource, out: Path) -> None:
    tensors = {"layers.0.attention.wq.lora_a": lazy([[1.0]]), "half": lazy([0.5], "bfloat16")}
    adapter = ExportAdapter("lora:lora", {"rank": 1}, (), tensors, {"mlxlora": '{"rank": 1}'})
    export(replace(source, adapter=adapter), out, NpzOptions())
    held = np.load(out / "adapters.npz")
    assert {name: held[name].tolist() for name in held.files} == {
        "layers.0.attention.wq.lora_a": [[1]],
        "half": [0.5],
    }
    assert mx.load(str(out / "adapters.npz"))
    from mlxlora_core.files import tensor_file

    assert tensor_file.load(out / "adapters.npz")[1]["mlxlora"] == '{"rank": 1}'


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e6), ("float16", float("nan"))])
def test_a_number_that_the_type_cannot_hold_is_refused(
    source: ExportSource, out: Path, dtype: str, value: float
) -> None:
    bad = replace(source, tensors={"norm.weight": lazy([1.0, value])})
    with pytest.raises(ModelError, match=r"norm\.weight has values that float16 cannot hold"):
        export(bad, out, NpzOptions(dtype))


def test_bfloat16_is_refused_before_anything_is_read(source: ExportSource, out: Path) -> None:
    def read() -> mx.array:
        raise AssertionError("read")

    tensors = {"a": LazyTensor((2,), "float32", read), "b": LazyTensor((2,), "bfloat16", read)}
    with pytest.raises(ModelError, match="1 tensors are bfloat16"):
        export(replace(source, tensors=tensors), out, NpzOptions())
    assert list(out.iterdir()) == []


def test_types(source: ExportSource, out: Path, tmp_path: Path) -> None:
    cases: dict[str, Callable[[Path], None]] = {
        "float32": lambda p: export(source, p, NpzOptions()),
        "float16": lambda p: export(source, p, NpzOptions("float16")),
    }
    for dtype, write in cases.items():
        (tmp_path / dtype).mkdir()
        write(tmp_path / dtype)
        assert np.load(tmp_path / dtype / "weights.npz")["norm.weight"].dtype == dtype
