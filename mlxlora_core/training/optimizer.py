"""The optimizers (Adam, AdamW, Muon with AdamW for all but matrices), and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers

from mlxlora_core.errors import listing
from mlxlora_core.model import adapters
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins.checks import as_float
from mlxlora_core.training.settings import TrainConfig


def make(
    config: TrainConfig, model: LanguageModel, factors: Mapping[str, float] = MappingProxyType({})
) -> Any:
    """The optimizer that a config names.

    Args:
        config: names it and its settings.
        model: the model to train.
        factors: parameter -> factor on its learning rate; 1 for all that are not named.
    """
    groups = sorted({1.0, *factors.values()})
    if len(groups) == 1:
        return _plain(config, model)
    return Groups({factor: _plain(config, model) for factor in groups}, factors)


def _plain(config: TrainConfig, model: LanguageModel) -> Any:
    """An optimizer with one learning rate.

    Adam is Kingma and Ba 2015, arXiv:1412.6980, algorithm 1; AdamW is Loshchilov
    and Hutter 2019, arXiv:1711.05101, algorithm 2. Under ``muon`` the embedding, the
    output head and all vectors get AdamW, with the same learning rate.
    """
    if config.optimizer == "adam":
        return optimizers.Adam(learning_rate=config.learning_rate, bias_correction=True)
    adamw = optimizers.AdamW(
        learning_rate=config.learning_rate, weight_decay=config.weight_decay, bias_correction=True
    )
    if config.optimizer == "adamw":
        return adamw

    def hidden(_name: str, weight: mx.array) -> bool:
        return weight.ndim == 2 and model.vocab_size not in weight.shape

    muon = Muon(learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    return optimizers.MultiOptimizer([muon, adamw], [hidden])


def factors_of(model: Model, adapted: adapters.Adapted) -> dict[str, float]:
    """Parameter -> factor on its learning rate, for those to which the adapter gives one.

    Raises:
        PluginError: the adapter gives something else.
    """
    component = adapted.choice.component
    factors: dict[str, float] = {}
    if component.spec.learning_rates is None:
        return factors
    for path, options in adapted.options.items():
        given = component.checked("learning_rates", component.spec.learning_rates(options), dict)
        for name, factor in given.items():
            number = as_float(factor) if isinstance(factor, int | float) else math.nan
            if not 0 < number < math.inf:
                got = f"{number:g}" if isinstance(factor, int | float) else repr(factor)
                raise component.breach("learning_rates", f"{got} for {name}", "a number above 0")
            factors[f"{path}.{name}"] = number
    unknown = sorted(factors.keys() - adapters.trainable(model.module).keys())
    if unknown:
        raise component.breach("learning_rates", listing(unknown), "names of parameters that train")
    return factors


class Groups(optimizers.MultiOptimizer):
    """Groups of parameters, each with its own optimizer, whose learning rate is a multiple of the common one.

    Weight decay that is scaled by the learning rate is scaled by that of the group, as in the parameter
    groups of torch.

    Args:
        by_factor: factor on the learning rate -> the optimizer of the parameters that have it.
        factors: parameter -> factor; 1 for all that are not named.
    """

    def __init__(self, by_factor: Mapping[float, Any], factors: Mapping[str, float]) -> None:
        def holds(factor: float) -> Callable[[str, mx.array], bool]:
            return lambda name, _: factors.get(name, 1.0) == factor

        super().__init__(list(by_factor.values()), [holds(factor) for factor in list(by_factor)[:-1]])
        self._factors = list(by_factor)

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the parameters whose factor is 1."""
        return self.optimizers[self._factors.index(1.0)].learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float | mx.array) -> None:
        """Set it, and those of the other groups with it."""
        for optimizer, factor in zip(self.optimizers, self._factors, strict=True):
            optimizer.learning_rate = rate * factor


class Muon(optimizers.Optimizer):
    """Momentum, orthogonalized by Newton-Schulz steps (Jordan et al. 2024, "Muon").

    It has decoupled weight decay, and scales the orthogonal matrix by 0.2 · sqrt(max(rows, columns)), so
    that updates are as large as AdamW's at the same learning rate (Liu et al. 2025, arXiv:2502.16982,
    equation 4).
    """

    # The quintic 3.4445 x - 4.7750 x³ + 2.0315 x⁵ brings singular values near 1 in five steps.
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    STEPS = 5
    MOMENTUM = 0.95

    def __init__(self, learning_rate: float, weight_decay: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self._maybe_schedule("learning_rate", learning_rate)
        self.weight_decay = weight_decay

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Start with a momentum of zeros."""
        state["v"] = mx.zeros_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """The matrix after one update with Nesterov momentum."""
        state["v"] = self.MOMENTUM * state["v"] + (1 - self.MOMENTUM) * gradient
        ahead = self.MOMENTUM * state["v"] + (1 - self.MOMENTUM) * gradient
        size = 0.2 * math.sqrt(max(parameter.shape))
        decayed = parameter * (1 - self.learning_rate * self.weight_decay)
        updated: mx.array = decayed - self.learning_rate * size * orthogonal(ahead)
        return updated


def orthogonal(matrix: mx.array) -> mx.array:
    """The nearest matrix (M, N) with singular values of about 1 (0.7 to 1.2), by Newton-Schulz steps."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (mx.linalg.norm(x) + 1e-7)
    a, b, c = Muon.COEFFICIENTS
    for _ in range(Muon.STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.T if tall else x


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of the update ``step``, counted from 1.

    It rises linearly over the warm-up, to the peak at its last step. Then it is constant, or a half cosine
    that would reach ``min_learning_rate`` one step after the last one, so that even with a minimum of 0
    every step trains (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5).
    """
    if step < config.warmup:
        return config.learning_rate * step / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    peak = max(config.warmup, 1)
    done = (step - peak) / (config.iters + 1 - peak)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))
