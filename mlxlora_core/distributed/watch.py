"""The ranks watch one another: one that is lost ends all of them, with one line that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxlora_core.distributed.group import Group


class Watch:
    """What the other ranks are told of this one; :func:`watching` makes it."""

    def phase(self, words: str) -> None:
        """Say what this rank does from here on, such as ``step 12``: it is told when the rank is lost."""

    def leave(self, fault: BaseException) -> None:
        """Say that this rank ends by a fault, so that the others end too and tell why."""


def meet() -> None:
    """Find the other ranks, before MLX is asked to join them; nothing where there are none.

    Raises:
        RankError: one of them has not come in time.
    """


@contextmanager
def watching(group: Group) -> Iterator[Watch]:
    """Watch the other ranks until the block ends, and let them watch this one.

    Raises:
        RankError: the connection to another rank broke in the block.
    """
    yield Watch()
