"""The conformance suite of adapter loaders.

Subclass :class:`AdapterLoaderSuite` in a test file and run it with pytest::

    class TestMyLoader(AdapterLoaderSuite):
        spec = my_plugin.LOADER

        def write(self, folder): ...
        def damage(self): ...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxlora_core.errors import LINE_BYTES, MlxloraError
from mlxlora_core.files.tensor_checks import type_name
from mlxlora_core.options import parse
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins import load as load_plugins
from mlxlora_core.specs import AdapterLoader
from mlxlora_core.testing.spoiling import assert_refused_or_the_same, spoilt
from mlxlora_core.values import ForeignAdapter, LazyTensor, Place


class AdapterLoaderSuite:
    """What every adapter loader must do. The loader is used with its default options.

    Attributes:
        spec: the loader.
    """

    spec: AdapterLoader

    def write(self, folder: Path) -> Mapping[str, mx.array]:
        """Write a small good adapter into ``folder``.

        Returns:
            ``PATH.NAME`` -> the tensor that must be read from it, PATH of a module as it is called
            there and NAME of a parameter as it is called and turned here.
        """
        raise NotImplementedError

    def path(self, folder: Path) -> Path:
        """What is opened of an adapter in ``folder``: the folder, or for a loader of files one in it."""
        return folder

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        """Name -> a function that changes the good adapter in a folder so that it must be refused."""
        raise NotImplementedError

    def updates(self) -> Mapping[str, np.ndarray]:
        """Module as it is called in the files that ``write`` wrote -> what is added to its weight there.

        (outputs, inputs), computed without the loader. The scale counts, which no tensor tells.
        """
        pytest.skip("the suite says nothing of what is added to the weights")

    def registry(self) -> Registry:
        """Where the adapters are looked up that the loader names."""
        return load_plugins()

    # --- the tests ---

    def test_knows_its_adapters(self, tmp_path: Path) -> None:
        """``detect`` says yes to an adapter and no, without an error, to anything else."""
        for name in ("good", "empty"):
            (tmp_path / name).mkdir()
        self.write(tmp_path / "good")
        (tmp_path / "file").write_bytes(b"x")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for name in ("a.safetensors", "a.npz", "a.gguf", "a.bin"):
            (tmp_path / name).write_bytes(b"\x00" * 64)
        assert self.spec.detect(self.path(tmp_path / "good"))
        others = [path for path in sorted(tmp_path.iterdir()) if path.name != "good"]
        assert [path.name for path in (*others, tmp_path / "absent") if self.spec.detect(path)] == []

    def test_names_shapes_and_values(self, tmp_path: Path) -> None:
        """Every tensor is there and is what was written, to the bit; what is told of it unread is true."""
        want = self.write(tmp_path)
        tensors = _tensors(self._open(tmp_path))
        assert sorted(tensors) == sorted(want)
        for name, lazy in tensors.items():
            for got in (lazy.read(), lazy.read()):
                assert isinstance(got, mx.array)
                assert (tuple(lazy.shape), lazy.dtype) == (got.shape, type_name(got.dtype)), name
                assert mx.array_equal(got, want[name]).item(), name

    def test_says_what_it_is_here(self, tmp_path: Path) -> None:
        """The adapter that it names is there, and takes the options, those that differ among them."""
        self.write(tmp_path)
        opened = self._open(tmp_path)
        options = self.registry().find("adapter", opened.adapter).spec.options
        parse(options, opened.options, owner=opened.adapter, strict=True)
        for path, differing in opened.overrides.items():
            assert path in opened.linears
            assert differing.items() - opened.options.items(), f"{path}: these do not differ"
            parse(options, {**opened.options, **differing}, owner=opened.adapter, strict=True)
        assert not set(opened.unstated) & opened.options.keys()
        assert all(isinstance(note, str) for note in opened.notes)

    def test_adds_what_the_files_say(self, tmp_path: Path) -> None:
        """With its options, the adapter that it names adds to each weight what it should."""
        want = self.updates()
        self.write(tmp_path)
        opened = self._open(tmp_path)
        adapter = self.registry().find("adapter", opened.adapter).spec
        assert sorted(want) == sorted(opened.linears)
        for path, update in want.items():
            values = {**opened.options, **opened.overrides.get(path, {})}
            linear = nn.Linear(update.shape[1], update.shape[0], bias=False)
            linear.weight = mx.zeros(update.shape)
            place = Place(path, 0, update.shape)
            module = adapter.wrap(linear, place, parse(adapter.options, values, owner=opened.adapter))
            module.load_weights([(n, t.read()) for n, t in opened.linears[path].items()], strict=False)
            got = np.array(adapter.fuse(module, linear.weight))
            assert np.allclose(got, update, atol=1e-5 * np.abs(update).max()), path

    def test_outputs_are_axes_of_its_parameters(self, tmp_path: Path) -> None:
        """Of each parameter that goes along outputs, one axis is told that it has."""
        self.write(tmp_path)
        opened = self._open(tmp_path)
        shapes = {name: t.shape for held in opened.linears.values() for name, t in held.items()}
        for name, axis in (*opened.outputs.items(), *opened.inputs.items()):
            assert name in shapes
            assert 0 <= axis < len(shapes[name])
        assert opened.outputs, "no parameter goes along the outputs, so that none can be put in order"

    def test_opening_twice_gives_the_same(self, tmp_path: Path) -> None:
        """What is opened depends on the files alone."""
        self.write(tmp_path)
        one, two = self._open(tmp_path), self._open(tmp_path)
        assert list(_tensors(one)) == list(_tensors(two))
        assert (one.adapter, one.options, one.overrides) == (two.adapter, two.options, two.overrides)
        assert json.loads(json.dumps(dict(one.options))) == one.options

    def test_source_is_left_alone(self, tmp_path: Path) -> None:
        """Reading changes no file and adds none."""
        self.write(tmp_path)
        before = _snapshot(tmp_path)
        self._read_all(tmp_path)
        assert _snapshot(tmp_path) == before

    def test_damage_is_an_error(self, tmp_path: Path) -> None:
        """What is damaged, or cannot be converted, is one line, at the latest when the tensors are read."""
        kinds = self.damage()
        assert kinds, "damage() names no damage"
        for number, (name, spoil) in enumerate(kinds.items()):
            folder = tmp_path / str(number)
            folder.mkdir()
            self.write(folder)
            spoil(folder)
            self.spec.detect(self.path(folder))  # says yes or no, and raises nothing
            try:
                self._read_all(folder)
            except MlxloraError as fault:
                line = str(fault)
                assert "\n" not in line and len(line.encode()) <= LINE_BYTES, f"{name}: {line}"
            else:
                pytest.fail(f"{name}: read without an error")

    def test_a_spoilt_file_is_refused_or_makes_no_difference(self, tmp_path: Path) -> None:
        """Any file cut short, and any document that says less: one line, or the tensors as they were."""
        (tmp_path / "good").mkdir()
        want = self.write(tmp_path / "good")
        for name, folder in spoilt(tmp_path / "good", tmp_path):
            assert_refused_or_the_same(name, want, partial(self._found, folder))

    # --- what the tests share ---

    def _open(self, folder: Path) -> ForeignAdapter:
        opened = self.spec.open(self.path(folder), self.spec.options())
        assert isinstance(opened, ForeignAdapter)
        return opened

    def _found(self, folder: Path) -> dict[str, LazyTensor]:
        return _tensors(self._open(folder))

    def _read_all(self, folder: Path) -> None:
        for lazy in _tensors(self._open(folder)).values():
            mx.eval(lazy.read())


def _tensors(opened: ForeignAdapter) -> dict[str, LazyTensor]:
    """``PATH.NAME`` -> tensor."""
    return {f"{path}.{name}": t for path, held in opened.linears.items() for name, t in held.items()}


def _snapshot(folder: Path) -> dict[str, str]:
    """File name -> hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
