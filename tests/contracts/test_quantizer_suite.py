"""The conformance suite over every quantizer that is registered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core import plugins as registry
from mlxlora_core.testing.quantizer import QuantizerSuite

QUANTIZERS = {c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("quantizer")}

# What rounding to a type costs: relative to a normal number, and at least.
ROUNDING = {mx.float32: (2**-24, 2**-150), mx.float16: (2**-11, 2**-25), mx.bfloat16: (2**-8, 2**-134)}


class TestAffine(QuantizerSuite):
    """One step of the grid, and what rounding the step to the type of the weight makes of its multiples."""

    spec = QUANTIZERS["affine"]
    option_sets = (
        {},
        {"bits": 2, "group_size": 32},
        {"bits": 3, "group_size": 64},
        {"bits": 5, "group_size": 128},
        {"bits": 6, "group_size": 32},
        {"bits": 8, "group_size": 128},
    )
    left_alone = ((8, 16), (8, 144))

    def error_bound(self, weight: np.ndarray, parts: Mapping[str, mx.array], options: Any) -> np.ndarray:
        relative, least = ROUNDING[parts["scales"].dtype]
        levels = 2**options.bits - 1
        step = np.abs(np.array(parts["scales"].astype(mx.float32), dtype=np.float64))
        largest = np.abs(weight).reshape(*step.shape, options.group_size).max(axis=-1)
        bound = step + (levels + 2) * np.maximum(step * relative, least)
        bound += 2**-22 * (largest + levels * step)  # float32 arithmetic on the way back
        return np.repeat(bound, options.group_size, axis=1)


def test_every_quantizer_is_covered() -> None:
    assert {TestAffine.spec.name} == set(QUANTIZERS)


# --- a quantizer that breaks the contract is caught ----------------------------

AFFINE = QUANTIZERS["affine"]
OPTIONS = AFFINE.options()

Parts = Mapping[str, mx.array]


def first_expert(weight: mx.array, options: Any) -> Parts | None:
    """Every weight of a stack gets the scales of the first."""
    parts = AFFINE.quantize(weight, options)
    if parts is None or weight.ndim == 2:
        return parts
    return {**parts, "scales": mx.broadcast_to(parts["scales"][:1], parts["scales"].shape)}


def drawn(weight: mx.array, options: Any) -> Parts:
    parts = AFFINE.quantize(weight, options)
    return {**parts, "biases": parts["biases"] + 1e-6 * mx.random.normal(parts["biases"].shape)}


def twice(parts: Parts, options: Any) -> mx.array:
    return 2 * AFFINE.dequantize(parts, options)


def kept(weight: mx.array, options: Any) -> Parts:
    """The parts, and the weight set to zero."""
    parts = AFFINE.quantize(weight, options)
    mx.eval(parts)
    weight[:] = 0
    return parts


def wide(x: mx.array, parts: Parts, options: Any) -> mx.array:
    return AFFINE.matmul(x, parts, options).astype(mx.float16)


BROKEN: dict[str, tuple[dict[str, Any], Callable[[TestAffine, Path], None]]] = {
    "the weight itself is a part": (
        {"quantize": lambda w, o: {"weight": w, "scales": w[..., :1], "biases": w[..., :1]}},
        lambda suite, folder: suite.test_shapes(OPTIONS, 0),
    ),
    "a part has another name": (
        {"parts": ("weight", "scales", "offsets")},
        lambda suite, folder: suite.test_shapes(OPTIONS, 0),
    ),
    "half precision comes back": (
        {"dequantize": lambda p, o: AFFINE.dequantize(p, o).astype(mx.float16)},
        lambda suite, folder: suite.test_shapes(OPTIONS, 3),
    ),
    "experts share a scale": (
        {"quantize": first_expert},
        lambda suite, folder: suite.test_experts_are_weights_of_their_own(OPTIONS),
    ),
    "twice the weight": (
        {"dequantize": twice},
        lambda suite, folder: suite.test_error_is_bounded(OPTIONS, "normal", "float32"),
    ),
    "other parts every time": (
        {"quantize": drawn},
        lambda suite, folder: suite.test_touches_nothing_and_gives_the_same_every_time(OPTIONS),
    ),
    "the weight is changed": (
        {"quantize": kept},
        lambda suite, folder: suite.test_touches_nothing_and_gives_the_same_every_time(OPTIONS),
    ),
    "a product of another weight": (
        {"matmul": lambda x, p, o: 1.01 * AFFINE.matmul(x, p, o)},
        lambda suite, folder: suite.test_its_product_is_that_of_the_dequantized_weight(OPTIONS),
    ),
    "a product of another type": (
        {"matmul": wide},
        lambda suite, folder: suite.test_its_product_is_that_of_the_dequantized_weight(OPTIONS),
    ),
    "nothing is left alone": (
        {"quantize": lambda w, o: {"weight": w}},
        lambda suite, folder: suite.test_leaves_alone_what_does_not_fit(OPTIONS),
    ),
    "everything is left alone": (
        {"quantize": lambda w, o: None},
        lambda suite, folder: suite.test_comes_back_from_a_file(OPTIONS, "float16", folder),
    ),
}


@pytest.mark.parametrize(("functions", "check"), BROKEN.values(), ids=BROKEN)
def test_a_broken_quantizer_fails_the_suite(
    functions: dict[str, Any], check: Callable[[TestAffine, Path], None], tmp_path: Path
) -> None:
    suite = TestAffine()
    check(suite, tmp_path)
    suite.spec = dataclasses.replace(AFFINE, **functions)
    with pytest.raises(AssertionError):
        check(suite, tmp_path)
