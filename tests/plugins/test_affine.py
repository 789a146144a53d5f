from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlxlora_affine.packing
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlxlora_affine import AffineOptions, mlxlora_quantizers
from mlxlora_affine.packing import CUDA_ROWS, expand, pack
from mlxlora_affine.unpack import unpack

from mlxlora_core.errors import ModelError, UsageError
from mlxlora_core.machine import device as device_of_mlx
from mlxlora_core.model import linears
from mlxlora_core.model.linears import QuantizedLinear
from mlxlora_core.options import parse
from mlxlora_core.testing.stand_in import choice

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
OUTPUTS, INPUTS = 24, 256


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(0)


@pytest.fixture(params=["expanded", "packed", "on CUDA"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Multiply as on a CPU, as everywhere else, and as on CUDA with 2 rows or more."""
    for module in (mlxlora_affine.packing, linears):
        monkeypatch.setattr(module, "on_cpu", lambda: request.param == "expanded")
    monkeypatch.setattr(mlxlora_affine.packing, "on_cuda", lambda: request.param == "on CUDA")
    monkeypatch.setattr(mlxlora_affine.packing, "CUDA_ROWS", 2)
    return str(request.param)


def quantized(weight: mx.array, bits: int = 4, group_size: int = 64, bias: mx.array | None = None) -> Any:
    """The linear that core makes of a weight that affine has packed."""
    (spec,) = mlxlora_quantizers()
    options = AffineOptions(group_size, bits)
    parts = pack(weight, options)
    assert parts is not None
    return QuantizedLinear(choice("quantizer", spec, options), parts, weight.shape, bias)


def steps_of(packed: Any) -> np.ndarray:
    """The integers (outputs, inputs), read bit by bit."""
    bits = packed.quantization.options.bits
    stream = np.unpackbits(np.array(packed.weight).view(np.uint8), axis=1, bitorder="little")
    places = stream.reshape(packed.shape[0], -1, bits).astype(np.int64)
    return (places << np.arange(bits)).sum(axis=-1)


def grid(packed: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of each weight, float64."""
    size = packed.quantization.options.group_size
    scales, biases = (
        np.repeat(np.array(p.astype(mx.float32), dtype=np.float64), size, axis=1)
        for p in (packed.scales, packed.biases)
    )
    return scales, biases


class TestUnpack:
    @pytest.mark.parametrize("bits", BITS)
    def test_every_value_at_every_place(self, bits: int) -> None:
        packed = mx.array(np.random.default_rng(0).integers(0, 2**32, (64, 32 * bits), dtype=np.uint32))
        stream = np.unpackbits(np.array(packed).view(np.uint8), axis=1, bitorder="little")
        want = (stream.reshape(64, 1024, bits).astype(np.int64) << np.arange(bits)).sum(axis=-1)
        got = unpack(packed, bits)
        assert got.dtype == mx.uint8
        assert np.array_equal(np.array(got), want)
        assert set(np.unique(want)) == set(range(2**bits))

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("group_size", GROUPS)
    def test_dequantizes_as_mlx_does(self, bits: int, group_size: int) -> None:
        packed = quantized(mx.random.normal((OUTPUTS, INPUTS)), bits, group_size)
        want = mx.dequantize(
            packed.weight, packed.scales, packed.biases, group_size=group_size, bits=bits, mode="affine"
        )
        assert mx.array_equal(packed.dequantize(), want)


class TestQuantize:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("group_size", GROUPS)
    def test_formula(self, bits: int, group_size: int, path: str) -> None:
        packed = quantized(mx.random.normal((OUTPUTS, INPUTS)) * 0.02, bits, group_size)
        scale, bias = grid(packed)
        np.testing.assert_allclose(
            np.array(packed.dequantize()), scale * steps_of(packed) + bias, atol=1e-8, rtol=1e-6
        )

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("low", [-1.0, 0.3, -0.2, -3.0])
    def test_takes_the_nearest_step(self, bits: int, low: float) -> None:
        """Half a step where the grid reaches, and no more than a whole one where it ends short."""
        weight = mx.random.uniform(low, 1.0, (OUTPUTS, INPUTS))
        packed = quantized(weight, bits)
        scale, bias = grid(packed)
        ends = np.stack([bias, bias + scale * (2**bits - 1)])
        beyond = np.maximum(ends.min(axis=0) - np.array(weight), np.array(weight) - ends.max(axis=0))
        error = np.abs(np.array(packed.dequantize()) - np.array(weight))
        step = np.abs(scale)
        assert (error <= np.maximum(step / 2, beyond) + 1e-6).all()
        assert (error <= step + 1e-6).all()

    def test_a_whole_step_is_reached(self) -> None:
        """Why the bound is not half a step: zero and the largest weight are on the grid, the rest follows."""
        packed = quantized(mx.array([[-0.75, 0.75] * 16]), bits=2, group_size=32)
        step = abs(packed.scales.item())
        assert step == 0.375
        assert sorted(set(packed.dequantize()[0].tolist())) == [-0.375, 0.75]

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
    def test_zero_and_the_largest_weight_are_kept(self, dtype: mx.Dtype) -> None:
        weight = (mx.random.normal((OUTPUTS, INPUTS)) * 0.02).astype(dtype)
        weight[:, ::64] = 0.0
        weight[:, 1::64] = mx.array(-0.25, dtype)
        back = quantized(weight, bits=8).dequantize()
        assert (back[:, 1::64] == -0.25).all()
        rounding = {mx.float32: 1e-6, mx.float16: 0.25 * 2**-11, mx.bfloat16: 0.25 * 2**-8}[dtype]
        assert mx.abs(back[:, ::64]).max() <= rounding

    def test_scales_have_the_type_of_the_weight(self) -> None:
        for dtype in (mx.float32, mx.float16, mx.bfloat16):
            packed = quantized(mx.random.normal((8, 64)).astype(dtype), bias=mx.ones((8,), dtype=dtype))
            assert packed.weight.dtype == mx.uint32
            assert packed.scales.dtype == packed.biases.dtype == packed.bias.dtype == dtype
            assert packed.dequantize().dtype == mx.float32

    def test_the_whole_range_of_float16(self, path: str) -> None:
        """``scale * q`` overflows float16 where ``scale * q + bias`` does not."""
        weight = mx.random.uniform(-65000, 65000, (8, 64)).astype(mx.float16)
        for bits in BITS:
            packed = quantized(weight, bits)
            error = mx.abs(packed.dequantize() - weight.astype(mx.float32))
            assert (error <= mx.abs(packed.scales.astype(mx.float32)) * 1.2).all()

    @pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf, 3e38])
    def test_refuses_what_has_no_finite_grid(self, value: float) -> None:
        weight = mx.full((8, 64), -3e38)
        weight[2, 3] = value
        with pytest.raises(ModelError, match=r"shape \(8, 64\)"):
            quantized(weight)

    @pytest.mark.parametrize(("inputs", "group_size"), [(96, 64), (64, 128), (33, 32)])
    def test_leaves_what_does_not_divide(self, inputs: int, group_size: int) -> None:
        assert pack(mx.ones((8, inputs)), AffineOptions(group_size, 4)) is None


class TestForward:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("rows", [1, 2, 40])
    @pytest.mark.parametrize("bias", [False, True])
    def test_value_and_gradient(self, bits: int, rows: int, bias: bool, path: str) -> None:
        added = mx.random.normal((OUTPUTS,)) if bias else None
        packed = quantized(mx.random.normal((OUTPUTS, INPUTS)) * 0.05, bits, bias=added)
        x, towards = mx.random.normal((rows, INPUTS)), mx.random.normal((rows, OUTPUTS))
        scale, offset = grid(packed)
        weight = scale * steps_of(packed) + offset
        (got,), (slope,) = mx.vjp(packed, [x], [towards])
        want = np.array(x) @ weight.T + (np.array(added) if added is not None else 0)
        np.testing.assert_allclose(np.array(got), want, atol=1e-5)
        np.testing.assert_allclose(np.array(slope), np.array(towards) @ weight, atol=1e-5)

    @pytest.mark.parametrize(
        ("device", "rows", "expands"),
        [
            ("cpu", 1, False),
            ("cpu", 2, True),
            ("cuda", CUDA_ROWS - 1, False),
            ("cuda", CUDA_ROWS, True),
            ("metal", CUDA_ROWS, False),
        ],
    )
    def test_expands_only_where_that_is_faster(
        self, device: str, rows: int, expands: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        packed = quantized(mx.random.normal((OUTPUTS, INPUTS)))
        multiplied: list[int] = []
        product = mx.quantized_matmul

        def counted(*arguments: Any, **options: Any) -> mx.array:
            multiplied.append(1)
            return product(*arguments, **options)

        monkeypatch.setattr(device_of_mlx, "_lent", {})  # a runtime's own product expands nothing
        for module in (mlxlora_affine.packing, linears):
            monkeypatch.setattr(module, "on_cpu", lambda: device == "cpu")
        monkeypatch.setattr(mlxlora_affine.packing, "on_cuda", lambda: device == "cuda")
        monkeypatch.setattr(mx, "quantized_matmul", counted)
        packed(mx.ones((1, rows, INPUTS)))
        assert bool(multiplied) != expands

    def test_outputs_have_the_type_of_the_inputs(self, path: str) -> None:
        packed = quantized(
            mx.random.normal((OUTPUTS, INPUTS)).astype(mx.float16), bias=mx.zeros((OUTPUTS,), mx.float16)
        )
        for dtype in (mx.float32, mx.float16, mx.bfloat16):
            for rows in (1, 3):
                assert packed(mx.ones((rows, INPUTS), dtype=dtype)).dtype == dtype


class TestLayout:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("group_size", GROUPS)
    @pytest.mark.parametrize("bias", [False, True])
    def test_is_that_of_mlx(self, bits: int, group_size: int, bias: bool) -> None:
        """Names, shapes, types and bits are what ``mlx.nn.QuantizedLinear`` makes and reads."""
        linear = nn.Linear(INPUTS, OUTPUTS, bias=bias)
        theirs = nn.QuantizedLinear.from_linear(linear, group_size, bits)
        ours = quantized(linear.weight, bits, group_size, linear.bias if bias else None)
        mine, want = (dict(tree_flatten(module.parameters())) for module in (ours, theirs))
        assert mine.keys() == want.keys()
        assert all(mx.array_equal(mine[name], want[name]) for name in want)
        x = mx.random.normal((3, INPUTS))
        assert mx.abs(ours(x) - theirs(x)).max() < 1e-5

    @pytest.mark.parametrize(
        ("name", "part"),
        [
            ("scales", mx.zeros((OUTPUTS, 1))),
            ("biases", mx.zeros((OUTPUTS, INPUTS // 32))),
            ("weight", mx.zeros((OUTPUTS, INPUTS // 8), mx.int32)),
            ("weight", mx.zeros((OUTPUTS, INPUTS // 4), mx.uint32)),
        ],
    )
    def test_parts_that_do_not_belong_together(self, name: str, part: mx.array, path: str) -> None:
        options = AffineOptions(64, 4)
        parts = pack(mx.random.normal((OUTPUTS, INPUTS)), options)
        assert parts is not None
        with pytest.raises(ModelError, match="do not belong together at 4 bits, 64 weights a group"):
            expand(parts | {name: part}, options)


class TestOptions:
    def test_defaults(self) -> None:
        assert AffineOptions() == AffineOptions(group_size=64, bits=4)

    @pytest.mark.parametrize(
        "values", [{"bits": 7}, {"bits": 1}, {"bits": 16}, {"group_size": 48}, {"group_size": 0}, {"size": 4}]
    )
    def test_refused(self, values: dict[str, int]) -> None:
        with pytest.raises(UsageError, match=next(iter(values))):
            parse(AffineOptions, values, owner="quantizer 'affine'")
