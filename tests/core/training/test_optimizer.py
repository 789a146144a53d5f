from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core.training.optimizer import Muon, make, orthogonal
from mlxlora_core.training.settings import TrainConfig

Matrix = npt.NDArray[np.float64]


def newton_schulz(x: Matrix) -> Matrix:
    """Five quintic steps on the singular values alone, so that no matrix product of ours is copied."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return np.asarray(u * s @ vt)


@pytest.mark.parametrize("shape", [(12, 12), (12, 40), (40, 12), (1, 7)])
def test_orthogonal_is_newton_schulz_on_the_singular_values(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_allclose(np.array(orthogonal(mx.array(x, mx.float32))), newton_schulz(x), atol=2e-4)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_five_updates_of_muon_are_torch_s(shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(0)
    weight = draw.normal(size=shape).astype(np.float32)
    ours, parameters = Muon(0.01, weight_decay=0.1), {"w": mx.array(weight)}
    ours.init(parameters)
    theirs = torch.nn.Parameter(torch.tensor(weight))
    optimizer = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradient = draw.normal(size=shape).astype(np.float32)
        parameters = ours.apply_gradients({"w": mx.array(gradient)}, parameters)
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
    moved = theirs.detach().numpy() - weight
    # torch takes the Newton-Schulz steps in bfloat16.
    np.testing.assert_allclose(np.array(parameters["w"]) - weight, moved, atol=0.02 * abs(moved).max())


def test_muon_moves_hidden_matrices_and_adamw_the_rest(stand_in: Callable[..., Any]) -> None:
    model = stand_in()
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    config = TrainConfig(optimizer="muon", learning_rate=0.01, weight_decay=0.0)
    optimizer = make(config, model)
    optimizer.init(model.trainable_parameters())
    ones = {name: mx.ones(value.shape) for name, value in tree_flatten(model.parameters())}
    optimizer.update(model, tree_unflatten(list(ones.items())))
    after = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    for name, value in before.items():
        step = np.abs(after[name] - value)
        hidden = value.ndim == 2 and name not in ("embedding.weight", "output.weight")
        # All-equal gradients: AdamW moves each by the learning rate, Muon by a matrix of rank one.
        size = 0.01
        if hidden:
            gain = newton_schulz(np.ones(value.shape))[0, 0]
            size = 0.01 * 0.2 * math.sqrt(max(value.shape)) * gain
        np.testing.assert_allclose(step, size, rtol=2e-3, err_msg=name)
