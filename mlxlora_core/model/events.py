"""The events of work on model folders, such as a conversion; the last one is the result."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mlxlora_core.errors import listing

T = TypeVar("T")


@dataclass(frozen=True)
class SpaceNeeded:
    """Before any work: what the disk must hold and what is free there, in words."""

    text: str


@dataclass(frozen=True)
class TensorWritten:
    """A tensor was read, made what it is to be, and written.

    Attributes:
        name: of the tensor in the model.
        done: tensors so far.
        count: of all tensors.
    """

    name: str
    done: int
    count: int


def result_of(events: Iterable[SpaceNeeded | TensorWritten | T]) -> T:
    """Let the work be done, and take its result: the last event."""
    (result,) = deque(events, maxlen=1)
    assert not isinstance(result, SpaceNeeded | TensorWritten), "the result comes last"
    return result


def describe_conversion(result: Mapping[str, Any]) -> list[str]:
    """A conversion in lines for a person, from the values of its report."""
    size = f"{result['parameters'] / 1e6:.3f} M parameters, {result['bytes'] / 1e6:.1f} MB"
    lines = [
        f"{result['loader']} -> {result['architecture']}: {size}, "
        f"{result['bits_per_weight']:.2f} bits a weight"
    ]
    if result["quantized"] or result["left_dense"]:
        lines.append(
            f"{result['quantized']} linears quantized, relative error {result['relative_error']:.2%}"
        )
    lines += left_out(result["left_out"])
    if result["padding"]:
        more = f"{result['padding']} more id{'s' * (result['padding'] != 1)}"
        lines.append(f"the vocabulary has {more} than the tokenizer has pieces: no text, and never drawn")
    lines += result.get("notes", ())  # a run.json of before has none
    if result["left_dense"]:
        lines.append(f"left dense by the quantizer: {listing(result['left_dense'])}")
    return lines


def left_out(names: Collection[str]) -> list[str]:
    """What is said of tensors of a checkpoint that a model has no use for: a line, or none."""
    return [f"left out, the model has no use for it: {listing(names)}"] if names else []
