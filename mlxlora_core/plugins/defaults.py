"""The components that are used where none is named."""

from __future__ import annotations

DEFAULT_ADAPTER = "lora"

DEFAULT_QUANTIZER = "affine"

DEFAULT_SAMPLER = "temperature"

DEFAULT_RECIPE = "demo"
