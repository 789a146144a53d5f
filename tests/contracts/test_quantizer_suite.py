"""The conformance suite over every quantizer that is registered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core import registry
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
