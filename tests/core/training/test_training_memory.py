"""What a training is said to need, against what MLX counts."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.model import adapters, head_loss, loading
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of
from mlxlora_core.model.memory import measuring_bytes, sizes_of
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.sections import Quantization, configure
from mlxlora_core.training.evaluation import evaluate
from mlxlora_core.training.examples import Example, Examples
from mlxlora_core.training.loop import Training
from mlxlora_core.training.memory import training_bytes
from mlxlora_core.training.settings import TrainConfig

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")


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
    values = {"layers": adapted, "targets": targets}
    estimate, taken = measured(tmp_path / "model", registry, "lora", values, rows, tokens)
    assert estimate / 2 < taken < estimate * 2, f"estimated {estimate}, taken {taken}"


@pytest.mark.parametrize(
    ("name", "values", "bits"),
    [
        ("rslora", {"targets": ("all-linear",), "rank": 64}, None),
        ("lora-plus", {"targets": ("tok_embeddings", "lm_head")}, 4),
        ("lora", {"targets": ("lm_head",)}, None),
        ("lora", {"targets": ("embed_tokens",), "layers": 1}, None),
        ("dora", {"targets": ("all-linear",)}, 4),
        ("pissa", {"targets": ("all-linear",), "iterations": 2}, 4),
        ("ia3", {}, None),
        ("vera", {"targets": ("all-linear",)}, None),
    ],
)
def test_every_adapter_takes_what_was_estimated_within_a_factor_of_two(
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
    registry: Registry,
    name: str,
    values: dict[str, Any],
    bits: int | None,
) -> None:
    affine = registry.find("quantizer", "affine")
    choice = Choice(affine, affine.spec.options(group_size=32, bits=bits or 4))
    quantization = Quantization(choice) if bits else None
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dim=128, n_layers=4)
    result_of(convert(checkpoint, tmp_path / "model", registry, dtype="float32", quantization=quantization))
    estimate, taken = measured(tmp_path / "model", registry, name, values, rows=4, tokens=96)
    assert estimate / 2 < taken < estimate * 2, f"estimated {estimate}, taken {taken}"


@pytest.mark.parametrize(
    ("dim", "layers", "adapted", "rows", "tokens", "bits"),
    [
        (128, 12, -1, 4, 64, None),
        (128, 12, 6, 4, 128, None),
        *([(128, 8, -1, 2, 512, None), (256, 6, -1, 4, 96, 4)] if ALL else []),
    ],
)
def test_layers_computed_again_take_what_was_estimated_and_far_less(
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
    registry: Registry,
    dim: int,
    layers: int,
    adapted: int,
    rows: int,
    tokens: int,
    bits: int | None,
) -> None:
    affine = registry.find("quantizer", "affine")
    choice = Choice(affine, affine.spec.options(group_size=32, bits=bits or 4))
    quantization = Quantization(choice) if bits else None
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dim=dim, n_layers=layers)
    result_of(convert(checkpoint, tmp_path / "model", registry, dtype="float32", quantization=quantization))
    values = {"layers": adapted, "targets": ("all-linear",)}
    _, plain = measured(tmp_path / "model", registry, "lora", values, rows, tokens)
    estimate, taken = measured(tmp_path / "model", registry, "lora", values, rows, tokens, recompute=True)
    assert estimate / 1.5 < taken < estimate * 1.5, f"estimated {estimate}, taken {taken}"
    assert taken < 0.6 * plain


@pytest.mark.parametrize(("rows", "chunk"), [(4, 48), (1, 64), (24, 16)])
def test_chunks_of_logits_take_what_was_estimated(
    stand_in: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, rows: int, chunk: int
) -> None:
    """Of a model that is little more than a vocabulary; in training, and in measuring a loss."""
    words, tokens = 16_000, 2 * 512 // rows
    monkeypatch.setattr(head_loss, "CPU_CHUNK_BYTES", 4 * words * chunk)
    monkeypatch.setattr(head_loss, "GPU_CHUNK_BYTES", 4 * words * chunk)
    model, data = stand_in(vocab_size=words, width=32), examples(rows, tokens)
    model.freeze()
    model.layers[0].wq.unfreeze()
    whole: Any = SimpleNamespace(language_model=model, module=model)
    estimate = training_bytes(whole, data, batch_size=rows)
    taken = taken_by(lambda: [*Training(model, data.examples, (), TrainConfig(iters=2, batch_size=rows), 0)])
    assert estimate / 1.5 < taken < estimate * 1.5, f"estimated {estimate}, taken {taken}"
    assert taken < 5 * 4 * words * rows * tokens / 3
    estimate = measuring_bytes(sizes_of(model), rows, tokens)
    taken = taken_by(lambda: evaluate(model, data.examples, rows, -1, estimate))
    assert estimate / 1.5 < taken < estimate * 1.5, f"estimated {estimate}, taken {taken}"


def taken_by(work: Callable[[], object]) -> int:
    """The most that MLX holds in some work, beyond what it held before."""
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return mx.get_peak_memory() - held


def measured(
    folder: Path,
    registry: Registry,
    name: str,
    values: dict[str, Any],
    rows: int,
    tokens: int,
    recompute: bool = False,
) -> tuple[int, int]:
    """Bytes that a training is said to need, and the most that MLX counts."""
    model = loading.load(folder, registry)
    adapters.attach(model, *configure(registry.find("adapter", name), values), 0)
    data = examples(rows, tokens)
    estimate = training_bytes(model, data, batch_size=rows, recompute=recompute)
    config = TrainConfig(iters=2, batch_size=rows)
    training = Training(model.language_model, data.examples, (), config, 0, recompute=recompute)
    return estimate, taken_by(lambda: list(training))
