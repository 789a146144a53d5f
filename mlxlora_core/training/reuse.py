"""Decides whether what enters the lowest adapted layer is kept, from model, data and settings alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxlora_core.errors import UsageError, listing
from mlxlora_core.model.dropout import using_keys
from mlxlora_core.model.language_model import LanguageModel, takes
from mlxlora_core.model.linears import layers_by_path
from mlxlora_core.training.batches import fixed_rows, steps_an_epoch
from mlxlora_core.training.examples import Example
from mlxlora_core.training.settings import TrainConfig

_TYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Reuse:
    """Which hidden states of the rows can be kept, and whether they are.

    Attributes:
        on: whether they are kept.
        why_not: why they are not, in words; empty if they are.
        possible: whether they could be.
        first: the layer whose input is kept: the lowest that a step has to compute.
        layers: the number of layers of the model.
        width: D.
        computed: type in which the hidden states are computed.
        stored: type in which they are kept.
        rows: split -> the rows of it that are read.
        times: how often a row is read on average, over the whole training.
        number_bytes: the size of all that is kept, in bytes.
    """

    on: bool
    why_not: str
    possible: bool
    first: int
    layers: int
    width: int
    computed: mx.Dtype
    stored: mx.Dtype
    rows: Mapping[str, Sequence[int]]
    times: float
    number_bytes: int

    @property
    def words(self) -> str:
        """One line on what is saved, or why nothing is."""
        if not self.on:
            return f"every step computes all {self.layers} layers: {self.why_not}"
        where = (
            f"enters layer {self.first + 1} of {self.layers}"
            if self.first < self.layers
            else f"leaves the last of {self.layers} layers"
        )
        times = f"{self.times:.0f}" if self.times >= 10 else f"{self.times:.1f}".removesuffix(".0")
        return (
            f"what {where} is kept: {self.first} of {self.layers} layers are computed once a row "
            f"and not {times} times"
        )


def decide(model: LanguageModel, config: TrainConfig, splits: Mapping[str, Sequence[Example]]) -> Reuse:
    """Decide whether hidden states are kept in a training.

    Args:
        model: with the adapter that trains.
        config: how to train.
        splits: ``train`` and, if there is one, ``valid``.

    Raises:
        UsageError: they must be kept by ``config``, but cannot be.
    """
    first, obstacle = lowest_layer(model)
    hidden = model.embed(mx.zeros((1, 1), mx.uint32))
    rows = _rows_read(config, splits)
    readings, count = _readings(config, splits, rows), sum(map(len, rows.values()))
    why_not = obstacle
    if config.reuse_prefix == "on" and obstacle:
        raise UsageError(f"reuse_prefix cannot be on: {obstacle}", fix="leave it at auto")
    if config.reuse_prefix == "off":
        why_not = "reuse_prefix is off"
    elif config.reuse_prefix == "auto" and not obstacle and readings <= count:
        why_not = f"{readings} rows are read in all, and there are {count}"
    stored = _TYPES.get(config.prefix_type, hidden.dtype)
    tokens = sum(len(splits[name][row].tokens) - 1 for name in rows for row in rows[name])
    return Reuse(
        on=not why_not,
        why_not=why_not,
        possible=not obstacle,
        first=first,
        layers=len(model.layers),
        width=hidden.shape[-1],
        computed=hidden.dtype,
        stored=stored,
        rows=rows,
        times=readings / count,
        number_bytes=tokens * hidden.shape[-1] * stored.size,
    )


def lowest_layer(model: LanguageModel) -> tuple[int, str]:
    """The lowest layer that every step has to compute, and why its input cannot be kept, or nothing."""
    if not takes(model, "first", "last"):
        return 0, "this architecture runs all of its layers or none"
    module: Any = model
    layer_of = layers_by_path(model)
    names = list(dict(tree_flatten(module.trainable_parameters())))
    above = f"{model.head_path}." if model.head_path else ""
    outside = [name for name in names if layer_of(name) is None and not (above and name.startswith(above))]
    if outside:
        return 0, f"{listing(sorted(outside), 1)} trains, which no layer has"
    first = min((layer for name in names if (layer := layer_of(name)) is not None), default=len(model.layers))
    if first == 0:
        return 0, "the lowest layer trains"
    if draws_below(model, first):
        return 0, f"below layer {first + 1} something is drawn at random"
    return first, ""


def draws_below(model: LanguageModel, first: int, by_row: bool = False) -> bool:
    """Whether layers below ``first`` draw random numbers in training, as dropout does; computes nothing.

    Args:
        model: the model to ask about.
        first: the lowest layer that is not looked at.
        by_row: whether to leave out numbers that are drawn by row.
    """
    state: Any = mx.random.state
    before, was_training = state[0], model.training
    model.train()
    with using_keys(mx.zeros((1, 2, 2), mx.uint32) if by_row else None):
        model.run(model.embed(mx.zeros((1, 2), mx.uint32)), last=first)
    model.train(was_training)
    return not mx.array_equal(before, state[0]).item()


def _rows_read(config: TrainConfig, splits: Mapping[str, Sequence[Example]]) -> dict[str, list[int]]:
    """Split -> the rows that a training reads, which need not be all of ``valid``."""
    read = {"train": list(range(len(splits["train"])))}
    if splits.get("valid"):
        parts = fixed_rows(splits["valid"], config.batch_size, config.val_batches)
        read["valid"] = sorted({row for part in parts for row in part})
    return read


def _readings(
    config: TrainConfig, splits: Mapping[str, Sequence[Example]], rows: Mapping[str, Sequence[int]]
) -> int:
    """How many rows a training reads in all of its steps and validations together."""
    count = len(splits["train"])
    epochs, rest = divmod(config.iters, steps_an_epoch(count, config.rows_a_step))
    validations = 1 + -(-config.iters // config.steps_per_eval)
    trained = epochs * count + min(rest * config.rows_a_step, count)
    return trained + validations * len(rows.get("valid", ()))
