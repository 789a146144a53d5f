"""The conformance suite of weight loaders.

Subclass :class:`WeightLoaderSuite` in a test file and run it with pytest::

    class TestMyLoader(WeightLoaderSuite):
        spec = my_plugin.LOADER

        def write(self, folder): ...
        def write_large(self, folder, total_bytes): ...
        def damage(self): ...
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from mlxlora_core.errors import MlxloraError
from mlxlora_core.files.input_file import is_plain_name
from mlxlora_core.machine.children import safe_python
from mlxlora_core.specs import WeightLoader
from mlxlora_core.testing.spoiling import assert_refused_or_the_same, spoilt
from mlxlora_core.values import ForeignModel, LazyTensor

# Reads a small checkpoint and then a large one in a process of its own, and prints how far
# the memory in use rose for the large one, in bytes, and the names of its tensors.
_MEASURE = """
import json, resource, sys
from pathlib import Path
import mlx.core as mx
from mlxlora_core.plugins import load

def peak_bytes():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss: on Linux that starts with what the parent process had in use.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

spec = load().find("loader", sys.argv[1]).spec
for path in sys.argv[2:]:
    before = peak_bytes()  # of the second one, with all libraries there
    tensors = spec.open(Path(path), spec.options()).tensors
    read_bytes = 0
    for lazy in tensors.values():
        tensor = lazy.read()
        mx.eval(tensor)
        read_bytes += tensor.nbytes
        del tensor
print(read_bytes, peak_bytes() - before, json.dumps(list(tensors)))
"""


class WeightLoaderSuite:
    """What every weight loader must do.

    The loader is used with its default options. It must be installed, so that
    the memory test finds it by its name in a process of its own.

    Attributes:
        spec: the loader.
        large_bytes: size of the checkpoint that memory is measured with.
        growth_bytes: how far memory may rise above what a small one takes.
    """

    spec: WeightLoader
    large_bytes = 192 << 20
    growth_bytes = 96 << 20

    def write(self, folder: Path) -> Mapping[str, mx.array]:
        """Write a small good checkpoint into ``folder``; return the tensors that must be read from it."""
        raise NotImplementedError

    def path(self, folder: Path) -> Path:
        """What is opened of a checkpoint in ``folder``: the folder, or for a loader of files one in it."""
        return folder

    def write_large(self, folder: Path, total_bytes: int) -> None:
        """Write a good checkpoint with ``total_bytes`` in tensors of at most 8 MiB each."""
        raise NotImplementedError

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        """Name -> a function that damages the good checkpoint in a folder so that it must be refused."""
        raise NotImplementedError

    def hostile(self) -> Mapping[str, Callable[[Path, Path], object]]:
        """Name -> a function ``(folder, canary)`` that plants code in a good checkpoint.

        The code would make the file ``canary`` if it ran. Leave it empty for a
        format that cannot hold code.
        """
        return {}

    # --- the tests ---

    def test_knows_its_folders(self, tmp_path: Path) -> None:
        """``detect`` says yes to a checkpoint and no, without an error, to anything else."""
        for name in ("good", "empty"):
            (tmp_path / name).mkdir()
        self.write(tmp_path / "good")
        (tmp_path / "file").write_bytes(b"x")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        assert self.spec.detect(self.path(tmp_path / "good"))
        known = [n for n in ("empty", "file", "loop", "absent") if self.spec.detect(tmp_path / n)]
        assert known == []

    def test_names_shapes_dtypes_and_values(self, tmp_path: Path) -> None:
        """Every tensor is there and is what was written, to the bit; what is told of it unread is true."""
        want = self.write(tmp_path)
        tensors = self._open(tmp_path).tensors
        assert sorted(tensors) == sorted(want)
        for name, lazy in tensors.items():
            got = lazy.read()
            assert isinstance(got, mx.array)
            assert (tuple(lazy.shape), lazy.dtype) == (got.shape, _name(got.dtype)), name
            assert (got.shape, got.dtype) == (want[name].shape, want[name].dtype), name
            assert mx.array_equal(got, want[name]).item(), name

    def test_tensors_can_be_read_again_and_in_any_order(self, tmp_path: Path) -> None:
        """A second reading, last tensor first, gives the same values."""
        want = self.write(tmp_path)
        tensors = self._open(tmp_path).tensors
        for name in [*tensors, *reversed(list(tensors))]:
            assert mx.array_equal(tensors[name].read(), want[name]).item(), name

    def test_opening_twice_gives_the_same(self, tmp_path: Path) -> None:
        """Names and their order depend on the folder alone."""
        self.write(tmp_path)
        one, two = self._open(tmp_path), self._open(tmp_path)
        assert list(one.tensors) == list(two.tensors)
        assert one.config == two.config

    def test_config_and_tokenizer(self, tmp_path: Path) -> None:
        """The config is what JSON can hold, and the tokenizer is files with plain names."""
        self.write(tmp_path)
        checkpoint = self._open(tmp_path)
        assert json.loads(json.dumps(checkpoint.config)) == checkpoint.config
        assert checkpoint.tokenizer
        for name, file in checkpoint.tokenizer.items():
            assert is_plain_name(name), name
            assert file if isinstance(file, bytes) else file.is_file(), name

    def test_source_is_left_alone(self, tmp_path: Path) -> None:
        """Reading changes no file and adds none."""
        self.write(tmp_path)
        before = _snapshot(tmp_path)
        self._read_all(tmp_path)
        assert _snapshot(tmp_path) == before

    def test_missing_part_is_an_error(self, tmp_path: Path) -> None:
        """Without any one of its files, a checkpoint is refused."""
        self.write(tmp_path / _made(tmp_path, "good"))
        for file in sorted((tmp_path / "good").iterdir()):
            folder = tmp_path / f"without {file.name}"
            shutil.copytree(tmp_path / "good", folder)
            (folder / file.name).unlink()
            self._refused(folder, f"{file.name} is missing")

    def test_damage_is_an_error(self, tmp_path: Path) -> None:
        """Each kind of damage is one line with the place, at the latest when the tensors are read."""
        kinds = self.damage()
        assert kinds, "damage() names no damage"
        for number, (name, spoil) in enumerate(kinds.items()):
            folder = tmp_path / _made(tmp_path, str(number))
            self.write(folder)
            spoil(folder)
            self._refused(folder, name)

    def test_a_spoilt_file_is_refused_or_makes_no_difference(self, tmp_path: Path) -> None:
        """Any file cut short, and any document that says less: one line, or the tensors as they were."""
        want = self.write(tmp_path / _made(tmp_path, "good"))
        for name, folder in spoilt(tmp_path / "good", tmp_path):
            assert_refused_or_the_same(name, want, partial(self._found, folder))

    def test_runs_no_code(self, tmp_path: Path) -> None:
        """Code in a file is refused and does not run."""
        canary, kinds = tmp_path / "canary", self.hostile()
        if not kinds:
            pytest.skip("the suite plants no code")
        for number, (name, plant) in enumerate(kinds.items()):
            folder = tmp_path / _made(tmp_path, str(number))
            self.write(folder)
            plant(folder, canary)
            self._refused(folder, name)
            assert not canary.exists(), f"{name}: the code ran"

    def test_memory_does_not_grow_with_the_model(self, tmp_path: Path) -> None:
        """A large checkpoint takes hardly more than a small one; the order is that of another process."""
        small, large = (tmp_path / _made(tmp_path, name) for name in ("small", "large"))
        self.write(small)
        self.write_large(large, self.large_bytes)
        paths = (str(self.path(folder)) for folder in (small, large))
        try:
            command = safe_python("-c", _MEASURE, self.spec.name, *paths)
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            names = list(self._open(large).tensors)
        finally:
            shutil.rmtree(tmp_path)  # pytest keeps folders of earlier runs
        read_bytes, growth_bytes, order = done.stdout.split(maxsplit=2)
        assert int(read_bytes) >= self.large_bytes, "write_large() wrote too little"
        assert int(growth_bytes) < self.growth_bytes
        assert json.loads(order) == names, "another process gives the tensors in another order"

    # --- what the tests share ---

    def _open(self, folder: Path) -> ForeignModel:
        return self.spec.open(self.path(folder), self.spec.options())

    def _found(self, folder: Path) -> Mapping[str, LazyTensor]:
        return self._open(folder).tensors

    def _read_all(self, folder: Path) -> None:
        for lazy in self._open(folder).tensors.values():
            mx.eval(lazy.read())

    def _refused(self, folder: Path, name: str) -> None:
        """Assert that reading ``folder`` fails as an error of mlxlora that names the place."""
        try:
            self._read_all(folder)
        except MlxloraError as fault:
            assert "\n" not in str(fault), f"{name}: {fault!s}"
            assert str(folder) in fault.where, f"{name}: the error does not say where: {fault}"
        else:
            pytest.fail(f"{name}: read without an error")


def _made(parent: Path, name: str) -> str:
    (parent / name).mkdir()
    return name


def _name(dtype: mx.Dtype) -> str:
    """``float16`` for ``mx.float16``."""
    return str(dtype).rsplit(".", 1)[-1]


def _snapshot(folder: Path) -> dict[str, str]:
    """File name -> hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
