"""What the suites put where a plugin would stand: a component without a registry, a quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlxlora_core.options import NoOptions
from mlxlora_core.plugins import Choice, Component, Plugin
from mlxlora_core.specs import Quantizer, Spec


def choice(kind: str, spec: Spec, options: Any) -> Choice:
    """A spec with its options, as it is held after it has found the plugin."""
    plugin = Plugin("tested", "tested", "0", "file", "tested", components=((kind, spec.name),))
    return Choice(Component(kind, spec, plugin), options)


def _quantize(weight: mx.array, options: NoOptions) -> dict[str, mx.array]:
    step = mx.abs(weight).max(axis=(-2, -1), keepdims=True).astype(mx.float32) / 127
    return {"whole": mx.round(weight / step).astype(mx.int8), "step": step}


def _quantize_rows(weight: mx.array, options: NoOptions) -> dict[str, mx.array]:
    step = mx.abs(weight).max(axis=-1, keepdims=True).astype(mx.float32) / 127
    return {"whole": mx.round(weight / step).astype(mx.int8), "step": step}


def _dequantize(parts: Mapping[str, mx.array], options: NoOptions) -> mx.array:
    return parts["whole"].astype(mx.float32) * parts["step"]


#: a quantizer that no adapter can know: whole numbers and one scale
ROUNDING = Quantizer(
    name="rounding",
    summary="whole numbers and one scale",
    parts=("whole", "step"),
    quantize=_quantize,
    dequantize=_dequantize,
)

#: the same with a scale a row, so that it packs embeddings too
ROUNDING_ROWS = replace(ROUNDING, summary="whole numbers and a scale a row", quantize=_quantize_rows)
