"""The conformance suite of exporters.

Subclass :class:`ExporterSuite` in a test file and run it with pytest::

    class TestMyExporter(ExporterSuite):
        spec = my_plugin.EXPORTER
        option_sets = ({}, {"dtype": "float32"})

        def read(self, folder, options): ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.options import parse
from mlxlora_core.specs import Exporter
from mlxlora_core.values import ExportAdapter, ExportSource, LazyTensor

#: a Llama of two layers: D 32, 4 heads of 8, 2 kv heads, F 64, V 50
CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "dim": 32,
    "n_layers": 2,
    "head_dim": 8,
    "hidden_dim": 64,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 50,
    "rope_theta": 10000.0,
}
_LAYER = {
    "attention.wq": (32, 32),
    "attention.wk": (16, 32),
    "attention.wv": (16, 32),
    "attention.wo": (32, 32),
    "feed_forward.w1": (64, 32),
    "feed_forward.w2": (32, 64),
    "feed_forward.w3": (64, 32),
    "attention_norm": (32,),
    "ffn_norm": (32,),
}
SHAPES: Mapping[str, tuple[int, ...]] = {
    "tok_embeddings.weight": (50, 32),
    **{f"layers.{i}.{name}.weight": shape for i in range(2) for name, shape in _LAYER.items()},
    "norm.weight": (32,),
    "output.weight": (50, 32),
}
ADAPTED = "layers.1.attention.wq"


class ExporterSuite:
    """What every exporter must do.

    Attributes:
        spec: the exporter.
        option_sets: option values to try.
        dtypes: types of weights that it can write with any of them.
    """

    spec: Exporter
    option_sets: Sequence[Mapping[str, Any]] = ({},)
    dtypes: Sequence[str] = ("float16", "float32")

    def read(self, folder: Path, options: Any) -> Mapping[str, np.ndarray]:
        """The tensors that an independent reader finds, by the names that they have in the source.

        Args:
            folder: that was exported to.
            options: that it was exported with.
        """
        raise NotImplementedError

    def error_bound(self, options: Any) -> float:
        """The most that an exported number may differ, relative to the largest of its tensor."""
        return 0.0

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try every set of options, and every type."""
        if "options" in metafunc.fixturenames:
            sets = [parse(self.spec.options, values, owner=self.spec.name) for values in self.option_sets]
            metafunc.parametrize("options", sets, ids=[str(dict(values)) for values in self.option_sets])
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes)

    # --- what the tests are made of ---

    def source(self, folder: Path, dtype: str = "float16") -> ExportSource:
        """A small Llama without an adapter, the same every time; its tokenizer stands in ``folder``."""
        tokenizer = folder / "tokenizer.model"
        tokenizer.write_bytes(b"the bytes of a tokenizer")
        draw = np.random.default_rng(3)
        tensors = {name: _lazy(draw.normal(0, 0.5, shape), dtype) for name, shape in SHAPES.items()}
        return ExportSource(CONFIG, {"tokenizer.model": tokenizer}, tensors)

    def exported(self, source: ExportSource, target: Path, options: Any) -> Path:
        """``target``, exported to."""
        target.mkdir()
        given: Any = self.spec.export(source, target, options)  # type: ignore[func-returns-value]  # or it does
        assert given is None, f"export gives {type(given).__name__}, wanted None"
        return target

    # --- the tests ---

    def test_an_independent_reader_finds_every_number(self, options: Any, dtype: str, tmp_path: Path) -> None:
        """All tensors are there and hold what they should."""
        source = self.source(tmp_path, dtype)
        found = self.read(self.exported(source, tmp_path / "out", options), options)
        assert found.keys() == source.tensors.keys()
        for name, tensor in source.tensors.items():
            want = np.array(tensor.read().astype(mx.float32))
            got = np.asarray(found[name], dtype=np.float32)
            assert got.shape == want.shape, name
            apart = np.abs(got - want).max() / np.abs(want).max()
            assert apart <= self.error_bound(options), f"{name} by {apart}"

    def test_whole_files_and_nothing_else(self, options: Any, tmp_path: Path) -> None:
        """It leaves regular files with something in them, and writes nowhere else."""
        (tmp_path / "room").mkdir()
        out = self.exported(self.source(tmp_path), tmp_path / "room" / "out", options)
        files = [path for path in out.rglob("*") if not path.is_dir()]
        assert files and all(path.is_file() and not path.is_symlink() for path in files)
        assert all(path.stat().st_size for path in files)
        assert not any(path.name.startswith(".") or path.suffix == ".tmp" for path in files)
        assert [path.name for path in (tmp_path / "room").iterdir()] == ["out"]

    def test_the_same_model_gives_the_same_bytes(self, options: Any, tmp_path: Path) -> None:
        """Nothing of the moment or of the machine is in the files."""
        one, two = (self.exported(self.source(tmp_path), tmp_path / n, options) for n in ("one", "two"))
        assert _contents(one) == _contents(two)

    def test_tensors_are_let_go_one_after_another(self, options: Any, tmp_path: Path) -> None:
        """Memory in use does not grow with the model."""
        alive: list[int] = []
        source = self.source(tmp_path, self.dtypes[0])

        def watched(read: Callable[[], mx.array]) -> Callable[[], mx.array]:
            def call() -> mx.array:
                mx.clear_cache()
                alive.append(mx.get_active_memory())
                return read()

            return call

        tensors = {name: LazyTensor(t.shape, t.dtype, watched(t.read)) for name, t in source.tensors.items()}
        self.exported(replace(source, tensors=tensors), tmp_path / "out", options)
        assert len(alive) >= len(tensors)
        largest = 4 * max(int(np.prod(shape)) for shape in SHAPES.values())
        assert max(alive) - alive[0] <= 3 * largest, "it keeps what it has read"

    def test_an_adapter_changes_nothing_in_the_weights(self, options: Any, tmp_path: Path) -> None:
        """The weights that are handed over have the adapter in them already."""
        source = self.source(tmp_path)
        draw = np.random.default_rng(4)
        tensors = {
            f"{ADAPTED}.lora_a": _lazy(draw.normal(0, 1, (32, 2)), "float32"),
            f"{ADAPTED}.lora_b": _lazy(draw.normal(0, 1, (2, 32)), "float32"),
        }
        adapter = ExportAdapter("lora:lora", {"rank": 2, "scale": 2.0}, (ADAPTED,), tensors)
        plain = self.read(self.exported(source, tmp_path / "plain", options), options)
        tuned = self.exported(replace(source, adapter=adapter), tmp_path / "tuned", options)
        found = self.read(tuned, options)
        assert found.keys() == plain.keys()
        assert all(np.array_equal(found[name], plain[name]) for name in plain)

    def test_what_it_is_given_is_left_as_it_was(self, options: Any, tmp_path: Path) -> None:
        """Neither the config nor the tokenizer changes."""
        source = self.source(tmp_path)
        before = json.dumps([source.config, list(source.tensors)])
        self.exported(source, tmp_path / "out", options)
        assert json.dumps([source.config, list(source.tensors)]) == before
        file = source.tokenizer["tokenizer.model"]
        assert isinstance(file, Path) and file.read_bytes() == b"the bytes of a tokenizer"


def _lazy(values: np.ndarray, dtype: str) -> LazyTensor:
    """A tensor that is made anew each time it is read."""

    def read() -> mx.array:
        array = mx.array(values.astype(np.float32)).astype(getattr(mx, dtype))
        mx.eval(array)
        return array

    return LazyTensor(values.shape, dtype, read)


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
