"""The conformance suite of exporters.

Subclass :class:`ExporterSuite` in a test file and run it with pytest::

    class TestMyExporter(ExporterSuite):
        spec = my_plugin.EXPORTER
        option_sets = ({}, {"dtype": "float32"})

        def read(self, folder, options): ...

One that asks for a layout says what a small model is there: ``config``, ``shapes``, ``foreign`` of the
linear that the adapter is on, and a ``tokenizer`` where it reads that. One of adapters alone gives back
``PATH.lora_a`` and ``PATH.lora_b`` from ``read``.
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

from mlxlora_core.errors import MlxloraError
from mlxlora_core.files.tensor_checks import type_name
from mlxlora_core.options import parse
from mlxlora_core.specs import Exporter
from mlxlora_core.values import (
    ExportAdapter,
    ExportSource,
    ForeignTensor,
    LazyTensor,
    LowRank,
    PackedTensor,
)

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
        config: of a small model, in the layout that the exporter asks for.
        shapes: of its tensors, by their names there.
        tokenizer: name -> contents of its files.
        adapted: path here of the linear that the adapter is on.
        foreign: name of its weight in the exporter's layout.
        rows: for each of its outputs here which one it is there.
        group_size: of the weights that are handed over packed; it divides the columns of ``packed``.
        packed: names of tensors that are handed over packed, where the exporter takes them so.
    """

    spec: Exporter
    option_sets: Sequence[Mapping[str, Any]] = ({},)
    dtypes: Sequence[str] = ("float16", "float32")
    config: Mapping[str, Any] = CONFIG
    shapes: Mapping[str, tuple[int, ...]] = SHAPES
    tokenizer: Mapping[str, bytes] = {"tokenizer.model": b"the bytes of a tokenizer"}
    adapted = ADAPTED
    foreign = f"{ADAPTED}.weight"
    rows: Sequence[int] | None = None
    group_size = 32
    packed: Sequence[str] = (f"{ADAPTED}.weight",)

    def read(self, folder: Path, options: Any) -> Mapping[str, np.ndarray]:
        """The tensors that an independent reader finds, by the names that they have in the source.

        Those that are packed are given as the numbers that they stand for; an adapter's as
        ``PATH.lora_a`` (inputs, R) and ``PATH.lora_b`` (R, outputs), by the path here, with
        outputs in the order that they have here.

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
        """A small model, or an adapter, the same every time; its tokenizer stands in ``folder``."""
        for name, content in self.tokenizer.items():
            (folder / name).write_bytes(content)
        draw = np.random.default_rng(3)
        alone = self.spec.takes == "adapter"
        shapes = {} if alone else self.shapes
        return ExportSource(
            config=self.config,
            tokenizer={name: folder / name for name in self.tokenizer},
            tensors={name: _lazy(draw.normal(0, 0.5, shape), dtype) for name, shape in shapes.items()},
            adapter=self.adapter() if alone else None,
            stops=frozenset({2}),
            vocab_size=50,
            base="a base",
        )

    def adapter(self) -> ExportAdapter:
        """A low-rank update of one linear, of rank 2."""
        draw = np.random.default_rng(4)
        rows, columns = self.shapes[self.foreign][0], self.shapes[self.foreign][1]
        count = len(self.rows) if self.rows is not None else rows
        parts = {"lora_a": draw.normal(0, 1, (columns, 2)), "lora_b": draw.normal(0, 1, (2, count))}
        tensors = {f"{self.adapted}.{name}": _lazy(value, "float32") for name, value in parts.items()}
        held = {name: mx.array(value.astype(np.float32)) for name, value in parts.items()}
        place = ForeignTensor(f"{self.adapted}.weight", self.foreign, self.rows)
        return ExportAdapter(
            "lora:lora",
            {"rank": 2, "scale": 2.0, "dropout": 0.0},
            (self.adapted,),
            tensors,
            low_rank={self.adapted: LowRank(held["lora_a"], held["lora_b"], 2.0)},
            places={self.adapted: place},
            layers=2,
        )

    def wanted(self, source: ExportSource) -> dict[str, np.ndarray]:
        """What a reader must find of a source."""
        held = source.tensors
        if self.spec.takes == "adapter":
            assert source.adapter is not None
            held = source.adapter.tensors
        return {name: np.array(tensor.read().astype(mx.float32)) for name, tensor in held.items()}

    def exported(self, source: ExportSource, target: Path, options: Any) -> Path:
        """``target``, exported to."""
        target.mkdir()
        given: Any = self.spec.export(source, target, options)  # type: ignore[func-returns-value]  # or it does
        assert given is None, f"export gives {type(given).__name__}, wanted None"
        return target

    def assert_found(self, source: ExportSource, target: Path, options: Any) -> None:
        """A reader finds in what was exported every number of a source."""
        found, wanted = self.read(target, options), self.wanted(source)
        assert found.keys() == wanted.keys()
        for name, want in wanted.items():
            got = np.asarray(found[name], dtype=np.float32)
            assert got.shape == want.shape, name
            apart = np.abs(got - want).max() / np.abs(want).max()
            assert apart <= self.error_bound(options), f"{name} by {apart}"

    # --- the tests ---

    def test_an_independent_reader_finds_every_number(self, options: Any, dtype: str, tmp_path: Path) -> None:
        """All tensors are there and hold what they should."""
        source = self.source(tmp_path, dtype)
        self.assert_found(source, self.exported(source, tmp_path / "out", options), options)

    def test_packed_weights_hold_the_same_numbers(self, options: Any, tmp_path: Path) -> None:
        """Weights that are handed over in 4 bits come out as the numbers that they stand for."""
        if self.spec.packed is None or not self.spec.packed(options):
            pytest.skip("it takes dense weights with these options")
        source = self.source(tmp_path)
        tensors = dict(source.tensors)
        for name in self.packed:
            tensors[name] = _packed(tensors[name], self.group_size)
        source = replace(source, tensors=tensors)
        self.assert_found(source, self.exported(source, tmp_path / "out", options), options)

    def test_whole_files_and_nothing_else(self, options: Any, tmp_path: Path) -> None:
        """It leaves regular files with something in them, and writes nowhere else."""
        (tmp_path / "room").mkdir()
        out = self.exported(self.source(tmp_path), tmp_path / "room" / "out", options)
        files = [path for path in out.rglob("*") if not path.is_dir()]
        assert files and all(path.is_file() and not path.is_symlink() for path in files)
        assert all(path.stat().st_size for path in files)
        assert not any(path.name.startswith(".") or path.suffix == ".tmp" for path in files)
        assert [path.name for path in (tmp_path / "room").iterdir()] == ["out"]

    def test_one_file_with_its_ending_where_it_has_one(self, options: Any, tmp_path: Path) -> None:
        """And it knows that file again, and no other."""
        if not self.spec.ending:
            pytest.skip("it writes a folder")
        (file,) = self.exported(self.source(tmp_path), tmp_path / "out", options).iterdir()
        assert file.name.endswith(self.spec.ending)
        assert self.spec.wrote is not None and self.spec.wrote(file)
        other = tmp_path / f"other{self.spec.ending}"
        other.write_bytes(b"what somebody else has written")
        assert not self.spec.wrote(other)

    def test_the_same_model_gives_the_same_bytes(self, options: Any, tmp_path: Path) -> None:
        """Nothing of the moment or of the machine is in the files."""
        one, two = (self.exported(self.source(tmp_path), tmp_path / n, options) for n in ("one", "two"))
        assert _contents(one) == _contents(two)

    def test_option_sets_differ(self, tmp_path: Path) -> None:
        """No two sets of options write the same files: each option does something."""
        seen: dict[str, Any] = {}
        for number, values in enumerate(self.option_sets):
            options = parse(self.spec.options, values, owner=self.spec.name)
            sources = [self.source(tmp_path, dtype) for dtype in self.dtypes]
            targets = [tmp_path / f"{number}-{i}" for i in range(len(sources))]
            pairs = zip(sources, targets, strict=True)
            written = [_contents(self.exported(source, target, options)) for source, target in pairs]
            same = next((other for other, files in seen.items() if files == written), None)
            assert same is None, f"{dict(values)} writes what {same} writes"
            seen[str(dict(values))] = written

    def test_a_number_that_is_too_large_is_refused_or_kept(self, options: Any, tmp_path: Path) -> None:
        """None becomes infinite unseen, whatever type is written."""
        if self.spec.takes == "adapter" or "float32" not in self.dtypes:
            pytest.skip("it is handed over no such number")
        source = self.source(tmp_path, "float32")
        name = self.foreign
        large = _lazy(np.full(self.shapes[name], 1e30), "float32")
        source = replace(source, tensors={**source.tensors, name: large})
        try:
            target = self.exported(source, tmp_path / "out", options)
        except MlxloraError:
            return
        assert np.isfinite(self.read(target, options)[name]).all(), f"{name} is not finite any more"

    def test_tensors_are_let_go_one_after_another(self, options: Any, tmp_path: Path) -> None:
        """Memory in use does not grow with the model."""
        if self.spec.takes == "adapter":
            pytest.skip("an adapter is small, and stands in memory already")
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
        largest = 4 * max(int(np.prod(shape)) for shape in self.shapes.values())
        assert max(alive) - alive[0] <= 3 * largest, "it keeps what it has read"

    def test_an_adapter_changes_nothing_in_the_weights(self, options: Any, tmp_path: Path) -> None:
        """The weights that are handed over have the adapter in them already."""
        if self.spec.takes == "adapter":
            pytest.skip("it writes the adapter alone")
        source, adapter = self.source(tmp_path), self.adapter()
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
        for name, content in self.tokenizer.items():
            assert (tmp_path / name).read_bytes() == content


def _lazy(values: np.ndarray, dtype: str) -> LazyTensor:
    """A tensor that is made anew each time it is read."""

    def read() -> mx.array:
        array = mx.array(values.astype(np.float32)).astype(getattr(mx, dtype))
        mx.eval(array)
        return array

    return LazyTensor(values.shape, dtype, read)


def _packed(tensor: LazyTensor, group_size: int) -> LazyTensor:
    """The same weight (outputs, inputs), 4 bits each."""
    parts = mx.quantize(tensor.read(), group_size=group_size, bits=4)
    held = {name: _lazy_array(part) for name, part in zip(("weight", "scales", "biases"), parts, strict=True)}

    def read() -> mx.array:
        words, scales, biases = (part.read() for part in held.values())
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(words, scales, biases, group_size=group_size, bits=4)

    options = {"group_size": group_size, "bits": 4}
    return LazyTensor(tensor.shape, "float32", read, PackedTensor("affine", options, held))


def _lazy_array(array: mx.array) -> LazyTensor:
    return LazyTensor(array.shape, type_name(array.dtype), lambda: array)


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
