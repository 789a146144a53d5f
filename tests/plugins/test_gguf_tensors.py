"""The tensors of GGUF files, against weights worked out one by one."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf_files
import mlx.core as mx
import numpy as np
import pytest
from gguf_files import ARCHITECTURE, BYTE_LEVEL, Tensor
from mlxlora_affine import AffineOptions, dequantize
from mlxlora_gguf import GgufOptions, open_path

from mlxlora_core.errors import ModelError
from mlxlora_core.values import ForeignModel, LazyTensor

NAME = "blk.0.ffn_up.weight"


def opened(folder: Path, *tensors: Tensor, scales: str = "exact", **layout: Any) -> ForeignModel:
    path = folder / "model.gguf"
    path.write_bytes(gguf_files.gguf({**ARCHITECTURE, **BYTE_LEVEL}, tensors, **layout))
    return open_path(path, GgufOptions(scales))


def quantized(kind: str, rows: int, columns: int, **how: Any) -> Tensor:
    count = rows * columns // gguf_files.TYPES[kind][1]
    return Tensor(NAME, (rows, columns), kind, gguf_files.blocks(kind, count, **how))


def rounded(weights: list[float], *shape: int) -> np.ndarray[Any, Any]:
    """Exact weights as float32: what the format means, with one rounding."""
    return np.array(weights, np.float64).astype(np.float32).reshape(shape)


def values(tensor: LazyTensor) -> Any:
    array = tensor.read()
    assert array.shape == tensor.shape and str(array.dtype) == f"mlx.core.{tensor.dtype}"
    return np.array(array)


def parts(tensor: LazyTensor) -> dict[str, mx.array]:
    assert tensor.packed is not None and tensor.packed.quantizer == "affine"
    found = {name: part.read() for name, part in tensor.packed.parts.items()}
    for name, part in tensor.packed.parts.items():
        assert (found[name].shape, str(found[name].dtype)) == (part.shape, f"mlx.core.{part.dtype}"), name
    return found


def packed_options(tensor: LazyTensor) -> Mapping[str, Any]:
    assert tensor.packed is not None
    return tensor.packed.options


BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}


@pytest.mark.parametrize("kind", gguf_files.PACKED)
def test_a_packed_weight_is_the_one_in_the_file(kind: str, tmp_path: Path) -> None:
    tensor = quantized(kind, 9, 1024)
    lazy = opened(tmp_path, tensor).tensors[NAME]
    want = rounded(gguf_files.weights(kind, tensor.data), 9, 1024)
    assert np.array_equal(values(lazy), want)
    assert packed_options(lazy) == {"group_size": 32, "bits": BITS[kind]}
    found = parts(lazy)
    wide = {name: part if name == "weight" else part.astype(mx.float32) for name, part in found.items()}
    expanded = mx.dequantize(wide["weight"], wide["scales"], wide["biases"], group_size=32, bits=BITS[kind])
    assert np.array_equal(np.array(expanded), want)
    assert np.array_equal(np.array(dequantize(found, AffineOptions(32, BITS[kind]))), want)


@pytest.mark.parametrize("kind", gguf_files.PACKED)
def test_scales_biases_and_integers_one_by_one(kind: str, tmp_path: Path) -> None:
    tensor = quantized(kind, 9, 1024)
    found = parts(opened(tmp_path, tensor).tensors[NAME])
    size, bits = gguf_files.TYPES[kind][2], BITS[kind]
    each = [tensor.data[at : at + size] for at in range(0, len(tensor.data), size)]
    groups = [group for block in each for group in gguf_files.groups(kind, block)]
    type_ = np.float32 if kind.endswith("K") else np.float16
    for number, name in enumerate(("scales", "biases")):
        want = np.array([group[number] for group in groups], np.float64).astype(type_)
        assert found[name].dtype == (mx.float32 if kind.endswith("K") else mx.float16)
        assert np.array_equal(np.array(found[name]).reshape(-1), want), name
    stream = int.from_bytes(np.array(found["weight"]).tobytes(), "little")
    steps = [number for block in each for number in gguf_files.integers(kind, block)]
    mask = (1 << bits) - 1
    assert [stream >> bits * n & mask for n in range(0, len(steps), 7)] == steps[::7]


def test_six_bits_have_groups_of_16_and_are_expanded_exactly(tmp_path: Path) -> None:
    tensor = quantized("Q6_K", 9, 1024)
    model = opened(tmp_path, tensor)
    want = gguf_files.weights("Q6_K", tensor.data)
    lazy = model.tensors[NAME]
    assert lazy.packed is None
    assert values(lazy).astype(np.float64).reshape(-1).tolist() == want
    assert [note for note in model.notes if "1 tensors (Q6_K)" in note and "float32, exactly" in note]


@pytest.mark.parametrize(("kind", "form"), [("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2")])
def test_dense_tensors_are_the_same_to_the_bit(kind: str, form: str, tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 16, (7, 600), dtype=np.uint16)
    bits[(bits & 0x7F80) == 0x7F80] = 0x8001  # neither infinite nor NaN in either half-precision type
    bits[(bits & 0x7C00) == 0x7C00] = 0x0001
    shape = (7, 300) if kind == "F32" else (7, 600)
    model = opened(tmp_path, Tensor(NAME, shape, kind, bits.tobytes()))
    array = model.tensors[NAME].read()
    assert array.shape == shape and model.tensors[NAME].packed is None
    assert np.array(array.view(mx.uint16)).tobytes() == bits.tobytes()
    assert model.notes == []


def test_runs_of_rows_are_put_together(tmp_path: Path) -> None:
    tensor = quantized("Q8_0", 5000, 576)  # 3 MB: several runs, the last one shorter
    lazy = opened(tmp_path, tensor).tensors[NAME]
    want = np.frombuffer(tensor.data, np.dtype([("d", "<f2"), ("q", "i1", 32)]))
    assert np.array_equal(
        values(lazy), (want["d"].astype(np.float32)[:, None] * want["q"]).reshape(5000, 576)
    )
    assert np.array_equal(
        np.array(parts(lazy)["weight"]).view(np.uint8).reshape(-1, 32), want["q"].view("u1") ^ 128
    )


def test_axes_are_turned_round(tmp_path: Path) -> None:
    data = struct.pack("<24f", *range(24))
    packed = gguf_files.blocks("Q4_1", 4)
    model = opened(
        tmp_path,
        Tensor("deep", (2, 3, 4), "F32", data),
        Tensor("experts", (2, 1, 64), "Q4_1", packed),
        Tensor("flat", (128,), "Q4_1", packed),
    )
    assert np.array_equal(values(model.tensors["deep"]), np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    want = gguf_files.weights("Q4_1", packed)
    assert np.array_equal(values(model.tensors["experts"]), rounded(want, 2, 1, 64))
    assert {name: part.shape for name, part in parts(model.tensors["experts"]).items()} == {
        "weight": (2, 1, 8),
        "scales": (2, 1, 2),
        "biases": (2, 1, 2),
    }
    assert np.array_equal(values(model.tensors["flat"]), rounded(want, 128))
    assert model.tensors["flat"].packed is None  # a vector is no weight of a linear


@pytest.mark.parametrize(
    "layout", [{"version": 2}, {"alignment": 8}, {"alignment": 4096}, {"pad_end": False}]
)
def test_layouts_of_the_file(layout: dict[str, Any], tmp_path: Path) -> None:
    tensors = gguf_files.some_tensors()
    model = opened(tmp_path, *tensors, **layout)
    for tensor in tensors:
        want = rounded(gguf_files.weights(tensor.type, tensor.data), *tensor.shape)
        assert np.array_equal(np.array(model.tensors[tensor.name].read().astype(mx.float32)), want), (
            tensor.name
        )


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    first = Tensor("b", (8,), "F32", struct.pack("<8f", *range(8)), offset=32)
    second = Tensor("a", (8,), "F32", struct.pack("<8f", *range(8, 16)), offset=0)
    model = opened(tmp_path, first, second)
    assert list(model.tensors) == ["a", "b"]
    assert [values(tensor)[0] for tensor in model.tensors.values()] == [0, 8]


# --- types of scales ----------------------------------------------------------


def test_a_bias_that_float16_cannot_hold_is_told_with_what_to_do(tmp_path: Path) -> None:
    tensor = quantized("Q8_0", 1, 1024, large=600.0)  # 128 · 600 is above 65504
    lazy = opened(tmp_path, tensor).tensors[NAME]
    want = rounded(gguf_files.weights("Q8_0", tensor.data), 1, 1024)
    assert np.array_equal(values(lazy), want)  # dense, it is no matter
    with pytest.raises(
        ModelError, match=r"blk\.0.*bias or scale of 76800, which float16 cannot hold.*float32"
    ):
        parts(lazy)
    wide = parts(opened(tmp_path, tensor, scales="float32").tensors[NAME])
    assert wide["biases"].dtype == wide["scales"].dtype == mx.float32
    assert np.array_equal(np.array(dequantize(wide, AffineOptions(32, 8))), want)


def test_scales_of_super_blocks_are_rounded_when_asked(tmp_path: Path) -> None:
    tensor = quantized("Q4_K", 9, 1024)
    model = opened(tmp_path, tensor, scales="float16")
    found = parts(model.tensors[NAME])
    exact = parts(opened(tmp_path, tensor).tensors[NAME])
    for name in ("scales", "biases"):
        assert mx.array_equal(found[name], exact[name].astype(mx.float16)).item()
    assert [note for note in model.notes if "1 tensors (Q4_K, Q5_K) are rounded to float16" in note]


# --- damage -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*gguf_files.PACKED, "Q6_K"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_no_numbers_are_refused(kind: str, number: float, tmp_path: Path) -> None:
    for at in gguf_files.HALVES[kind]:
        tensor = quantized(kind, 1, 1024)
        data = bytearray(tensor.data)
        for byte in range(gguf_files.TYPES[kind][2]):
            if byte not in (at, at + 1):
                data[byte] |= 1  # no scale of 0, by which infinity is no number either
        struct.pack_into("<e", data, at, number)
        tensor.data = bytes(data)
        lazy = opened(tmp_path, tensor).tensors[NAME]
        with pytest.raises(ModelError, match=rf"blk\.0\.ffn_up\.weight \({kind}\) has .* not finite"):
            lazy.read()
        if lazy.packed is not None:
            with pytest.raises(ModelError, match="not finite"):
                parts(lazy)


@pytest.mark.parametrize(
    ("kind", "bits"), [("F32", "0000c07f"), ("F16", "007c"), ("BF16", "80ff"), ("BF16", "c17f")]
)
def test_dense_numbers_that_are_none_are_refused(kind: str, bits: str, tmp_path: Path) -> None:
    data = bytes.fromhex(bits)
    lazy = opened(tmp_path, Tensor(NAME, (8,), kind, bytes(7 * len(data)) + data)).tensors[NAME]
    with pytest.raises(ModelError, match="has 1 values that are not finite"):
        lazy.read()


def test_a_file_that_changes_is_not_read_on(tmp_path: Path) -> None:
    tensor = quantized("Q4_1", 1, 1024)
    lazy = opened(tmp_path, tensor).tensors[NAME]
    path = tmp_path / "model.gguf"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\1")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelError, match="has changed since it was opened"):
        lazy.read()
    path.unlink()
    with pytest.raises(ModelError, match="no such file"):
        lazy.read()


def test_small_tensors_that_are_settings_are_in_the_config(tmp_path: Path) -> None:
    name = "rope_freqs.weight"
    model = opened(tmp_path, Tensor(name, (3,), "F32", struct.pack("<3f", 1, 2.5, 8)))
    assert model.config[name] == [1, 2.5, 8] and not model.tensors and model.layout == "gguf"
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is F32 of shape \(2, 2\)"):
        opened(tmp_path, Tensor(name, (2, 2), "F32", struct.pack("<4f", *range(4))))
