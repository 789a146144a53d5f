"""LoRA layers in plain torch, float32: what the gradients of the ``lora`` adapter are held against.

It shares nothing with mlxlora: the update is spelt as the paper has it, a
matrix ``B A`` added to the weight, and torch differentiates it.
Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Layer:
    """An adapted linear.

    Attributes:
        weight: (outputs, inputs), frozen.
        bias: (outputs,), frozen, or None.
        lora_a: (inputs, R); the paper's A transposed.
        lora_b: (R, outputs); the paper's B transposed.
    """

    weight: np.ndarray
    bias: np.ndarray | None
    lora_a: np.ndarray
    lora_b: np.ndarray


@dataclass(frozen=True)
class Result:
    """Of the mean squared error of a stack of layers.

    Attributes:
        outputs: (rows, outputs of the last layer).
        loss: the mean of (outputs - target)².
        inputs: gradient with respect to the inputs (rows, inputs).
        layers: gradients with respect to (lora_a, lora_b) of each layer.
    """

    outputs: np.ndarray
    loss: float
    inputs: np.ndarray
    layers: list[tuple[np.ndarray, np.ndarray]]


def gradients(layers: Sequence[Layer], scale: float, inputs: np.ndarray, target: np.ndarray) -> Result:
    """Run ``inputs`` through the layers, with a SiLU between them, and differentiate the loss."""
    x = torch.tensor(inputs, requires_grad=True)
    pairs = [
        (torch.tensor(layer.lora_a, requires_grad=True), torch.tensor(layer.lora_b, requires_grad=True))
        for layer in layers
    ]
    hidden = x
    for number, (layer, (a, b)) in enumerate(zip(layers, pairs, strict=True)):
        if number:
            hidden = hidden * torch.sigmoid(hidden)
        weight = torch.tensor(layer.weight) + scale * b.T @ a.T
        bias = None if layer.bias is None else torch.tensor(layer.bias)
        hidden = torch.nn.functional.linear(hidden, weight, bias)
    loss = ((hidden - torch.tensor(target)) ** 2).mean()
    loss.backward()
    assert x.grad is not None
    found = []
    for a, b in pairs:
        assert a.grad is not None and b.grad is not None
        found.append((a.grad.numpy(), b.grad.numpy()))
    return Result(hidden.detach().numpy(), loss.item(), x.grad.numpy(), found)
