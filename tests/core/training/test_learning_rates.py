"""Parameters whose learning rate is a multiple of that of all (optimizer.py), against groups of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core.errors import PluginError
from mlxlora_core.model import adapters, loading
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.plugins.sections import configure
from mlxlora_core.training.optimizer import Groups, factors_of, make
from mlxlora_core.training.settings import TrainConfig

RATES = (0.01, 0.02, 0.005, 0.005)  # of each step
DECAY = 0.3
SHAPES = {"lora_a": (24, 3), "lora_b": (3, 40)}
PATHS = ("layers.0.wq", "layers.1.wq", "layers.1.wv")


def theirs(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(groups)
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=DECAY)
    return torch.optim.Muon(groups, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_steps_of_lora_plus_are_those_of_torch(stand_in: Callable[..., Any], name: str) -> None:
    draw = np.random.default_rng(0)
    start = {
        f"{path}.{part}": draw.normal(size=shape).astype(np.float32)
        for path in PATHS
        for part, shape in SHAPES.items()
    }
    factors = {f"{path}.lora_b": 16.0 for path in PATHS[:2]} | {f"{PATHS[2]}.lora_b": 4.0}
    config = TrainConfig(optimizer=name, learning_rate=RATES[0], weight_decay=DECAY)
    optimizer = make(config, stand_in(), factors)
    assert isinstance(optimizer, Groups)
    ours: Any = tree_unflatten([(key, mx.array(value)) for key, value in start.items()])
    optimizer.init(ours)
    parameters = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in start.items()}
    groups = [{"params": [p], "lr": 1.0, "factor": factors.get(key, 1.0)} for key, p in parameters.items()]
    reference = theirs(name, groups)
    for rate in RATES:
        gradients = {key: draw.normal(size=value.shape).astype(np.float32) for key, value in start.items()}
        optimizer.learning_rate = rate
        assert float(optimizer.learning_rate) == pytest.approx(rate)
        ours = optimizer.apply_gradients(
            tree_unflatten([(k, mx.array(g)) for k, g in gradients.items()]), ours
        )
        for group in reference.param_groups:
            group["lr"] = rate * group["factor"]
        for key, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[key])
        reference.step()
    for key, value in tree_flatten(ours):
        moved = parameters[key].detach().numpy() - start[key]
        # torch takes the Newton-Schulz steps of Muon in bfloat16.
        slack = 0.02 * abs(moved).max() if name == "muon" else 1e-4 * abs(moved).max()
        np.testing.assert_allclose(np.array(value) - start[key], moved, atol=slack, err_msg=key)


def test_without_factors_the_optimizer_and_its_state_are_as_ever(stand_in: Callable[..., Any]) -> None:
    for name in ("adam", "adamw", "muon"):
        config = TrainConfig(optimizer=name)
        plain, same = make(config, stand_in()), make(config, stand_in(), {"x": 1.0})
        assert type(plain) is type(same) and not isinstance(plain, Groups)


def test_the_factors_are_those_of_the_options_at_each_path(
    model_folder: Callable[..., Path], registry: Registry
) -> None:
    model = loading.load(model_folder(), registry)
    plus = registry.find("adapter", "lora-plus")
    values = {"rank": 2, "ratio": 8, "overrides": "wv: ratio=2"}
    adapted = adapters.attach(model, *configure(plus, values), 0)
    assert factors_of(model, adapted) == {
        f"layers.{layer}.attention.{name}.lora_b": ratio
        for layer in range(2)
        for name, ratio in (("wq", 8.0), ("wv", 2.0))
    }


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ([], "list"),
        ({"lora_b": 0}, "0 for lora_b"),
        ({"lora_b": 10**400}, "inf for lora_b"),
        ({"lora_b": "4"}, "'4' for lora_b"),
        ({"lora_c": 2.0}, r"layers.0.attention.wq.lora_c, .*wanted names of parameters that train"),
    ],
)
def test_what_an_adapter_says_of_learning_rates_is_checked(
    model_folder: Callable[..., Path], registry: Registry, given: Any, got: str
) -> None:
    model = loading.load(model_folder(), registry)
    plus = registry.find("adapter", "lora-plus")
    fields: Mapping[str, Any] = {**vars(plus.spec), "learning_rates": lambda options: given}
    component = Component("adapter", type(plus.spec)(**fields), plus.plugin)
    choice, config = configure(component, {"rank": 2})
    adapted = adapters.attach(model, Choice(component, choice.options), config, 0)
    with pytest.raises(PluginError, match=f"learning_rates gives {got}"):
        factors_of(model, adapted)
