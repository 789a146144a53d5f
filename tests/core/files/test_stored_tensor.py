"""Tensors of a .safetensors, one at a time: values, order, and a file that changes meanwhile."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

from mlxlora_core.errors import ModelError
from mlxlora_core.files import lazy_tensors, save_tensors
from mlxlora_core.files.tensor_file import TYPES
from mlxlora_core.machine.children import safe_python
from mlxlora_core.values import LazyTensor


def write(path: Path, tensors: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(path), tensors)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_is_read_to_the_bit_as_often_as_asked(tmp_path: Path, dtype: mx.Dtype) -> None:
    want = {
        "b": mx.arange(6).reshape(2, 3).astype(dtype),
        "a": mx.array(1).astype(dtype),
        "none": mx.zeros((0, 4), dtype),
    }
    write(tmp_path / "w.safetensors", want)
    tensors = lazy_tensors(tmp_path / "w.safetensors")
    for name in ("a", "b", "b", "none", "a", "none"):
        got = tensors[name].read()
        assert (got.dtype, got.shape, tensors[name].shape) == (dtype, want[name].shape, want[name].shape)
        assert mx.array_equal(got, want[name]).item()
        assert getattr(mx, tensors[name].dtype.replace("bool", "bool_")) == dtype


def test_they_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    names = [f"t{i * 7 % 20}" for i in range(20)]
    tensors = {n: LazyTensor((2,), "float32", lambda i=i: mx.full((2,), i)) for i, n in enumerate(names)}
    for ending in (".safetensors", ".npz"):
        save_tensors(tmp_path / f"w{ending}", tensors)
        found = lazy_tensors(tmp_path / f"w{ending}")
        assert list(found) == names
        assert [int(t.read()[0]) for t in reversed(found.values())] == list(range(19, -1, -1))


@pytest.mark.parametrize("first", [False, True], ids=["before anything is read", "after one is read"])
def test_a_file_in_its_place_is_not_read(tmp_path: Path, first: bool) -> None:
    path = tmp_path / "w.safetensors"
    write(path, {"a": mx.zeros(3), "b": mx.zeros(3)})
    tensors = lazy_tensors(path)
    if first:
        assert tensors["a"].read().tolist() == [0, 0, 0]
    write(tmp_path / "other", {"a": mx.ones(3), "b": mx.ones(3)})
    os.replace(tmp_path / "other.safetensors", path)
    # Either the file that was checked, which is open still, or none.
    if first:
        assert tensors["b"].read().tolist() == [0, 0, 0]
    with pytest.raises(ModelError, match="changed while it was read"):
        tensors["a"].read()


def test_a_file_that_is_cut_meanwhile_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, {"a": mx.zeros(1000), "b": mx.zeros(1000)})
    tensors = lazy_tensors(path)
    tensors["a"].read()
    os.truncate(path, 600)
    with pytest.raises(ModelError, match="b cannot be read"):
        tensors["b"].read()
    with pytest.raises(ModelError, match="changed while it was read"):
        tensors["a"].read()


def test_a_process_that_has_read_ends_well(tmp_path: Path) -> None:
    """Threads that MLX reads with must not outlive what they read from."""
    write(tmp_path / "w.safetensors", {f"t{i}": mx.zeros((256, 256)) for i in range(40)})
    program = "import sys; from pathlib import Path; from mlxlora_core.files import lazy_tensors\n"
    program += "for tensor in lazy_tensors(Path(sys.argv[1])).values(): tensor.read()"
    for _ in range(6):
        command = safe_python("-c", program, str(tmp_path / "w.safetensors"))
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
