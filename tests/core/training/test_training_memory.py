"""What a training is said to need, against what MLX counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.model import adapters, loading
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.sections import Quantization, configure
from mlxlora_core.training.examples import Example, Examples
from mlxlora_core.training.loop import train
from mlxlora_core.training.memory import training_bytes
from mlxlora_core.training.settings import TrainConfig


def examples(rows: int, tokens: int) -> Examples:
    draw = np.random.default_rng(0)
    mask = np.arange(tokens) > 0
    return Examples(
        tuple(Example(draw.integers(3, 300, tokens).astype(np.uint32), mask) for _ in range(rows))
    )


@pytest.mark.parametrize(
    ("dim", "layers", "adapted", "rows", "tokens", "bits", "targets"),
    [
        (64, 2, -1, 4, 64, None, ("all-linear",)),
        (128, 4, -1, 4, 128, None, ("wq", "wv")),
        (128, 12, 1, 4, 64, None, ("all-linear",)),
        (128, 4, -1, 4, 128, 4, ("all-linear",)),
        (128, 4, -1, 2, 512, None, ("all-linear",)),
        (128, 2, -1, 24, 32, None, ("all-linear",)),
        (256, 4, -1, 2, 64, 8, ("all-linear",)),
    ],
)
def test_training_takes_what_was_estimated_within_a_factor_of_two(
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
    registry: Registry,
    dim: int,
    layers: int,
    adapted: int,
    rows: int,
    tokens: int,
    bits: int | None,
    targets: tuple[str, ...],
) -> None:
    """Measured by MLX's own count of the most that it held."""
    affine = registry.find("quantizer", "affine")
    choice = Choice(affine, affine.spec.options(group_size=32, bits=bits or 4))
    quantization = Quantization(choice) if bits else None
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dim=dim, n_layers=layers)
    result_of(convert(checkpoint, tmp_path / "model", registry, dtype="float32", quantization=quantization))
    model = loading.load(tmp_path / "model", registry)
    lora = registry.find("adapter", "lora")
    adapters.attach(model, *configure(lora, {"layers": adapted, "targets": targets}), 0)
    data = examples(rows, tokens)
    estimate = training_bytes(model, data, batch_size=rows)
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    config: Any = TrainConfig(iters=2, batch_size=rows)
    for _ in train(model.language_model, data.examples, (), config, 0):
        pass
    taken = mx.get_peak_memory() - held
    assert estimate / 2 < taken < estimate * 2, f"estimated {estimate}, taken {taken}"
