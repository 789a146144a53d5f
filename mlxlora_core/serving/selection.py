"""The adapters that requests may ask for, and which of them the next product is computed with."""

from __future__ import annotations

from collections.abc import Sequence

from mlxlora_core.errors import UsageError, listing, nearest
from mlxlora_core.model.several import AdapterSet


class Selection:
    """Adapters on a model, of which each row of a batch takes its own.

    Args:
        adapters: on the model; None where it has none.
    """

    def __init__(self, adapters: AdapterSet | None) -> None:
        self._adapters = adapters
        self._selected: object = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters."""
        return () if self._adapters is None else tuple(self._adapters.adapted)

    def check(self, name: str | None) -> None:
        """Refuse the name of an adapter that there is not.

        Raises:
            UsageError: with those that there are.
        """
        if name is not None and name not in self.names:
            raise UsageError(
                f"there is no adapter '{name}', {nearest(name, self.names)}there is {listing(self.names)}"
            )

    def shares_batches(self, name: str | None) -> bool:
        """Whether rows with it are computed in the same products as rows with others."""
        return name is None or self._adapters is None or self._adapters.is_low_rank(name)

    def use(self, selected: str | Sequence[str | None] | None) -> None:
        """Compute what follows with an adapter, with one for each row of a batch, or with the base."""
        if self._adapters is None or selected == self._selected:
            return
        self._adapters.select(selected)
        self._selected = selected
