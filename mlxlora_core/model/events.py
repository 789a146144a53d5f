"""What work on model folders tells while it goes on: events, of which the last is the result."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class SpaceNeeded:
    """Before any work: what the disk must hold and what is free there, in words."""

    text: str


@dataclass(frozen=True)
class TensorConverted:
    """A tensor was read, converted and written.

    Attributes:
        name: of the tensor in the model.
        done: tensors so far.
        count: of all tensors.
    """

    name: str
    done: int
    count: int


def result_of(events: Iterable[SpaceNeeded | TensorConverted | T]) -> T:
    """Let the work be done, and take its result: the last event."""
    (result,) = deque(events, maxlen=1)
    assert not isinstance(result, SpaceNeeded | TensorConverted), "the result comes last"
    return result
