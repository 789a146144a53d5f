"""Several adapters on one base: switched, mixed by weights, or chosen for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.errors import UsageError, listing, nearest
from mlxlora_core.model import adapters
from mlxlora_core.model.adapters import Adapted, AdapterFile
from mlxlora_core.model.fused_parameters import fused_bias, fused_weight
from mlxlora_core.model.linears import is_linear, replace_modules
from mlxlora_core.model.loading import Model
from mlxlora_core.model.stacked_updates import StackedUpdates, Update, mixed
from mlxlora_core.plugins import Component, Registry
from mlxlora_core.values import LowRank

#: name -> the adapter's share of the change, 1 for all of it
Weights = Mapping[str, float]


@dataclass(frozen=True)
class Selected:
    """What the next batches are computed with.

    Attributes:
        weights: name -> share of each adapter's change, for all rows; nothing for the base alone.
        rows: for each row of a batch the adapter that it is computed with, or None for the base
            alone; nothing where all rows are computed alike.
    """

    weights: Weights
    rows: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class AdapterShare:
    """An adapter in a file, and how much of its change is meant.

    Attributes:
        file: the file, and what the caller insists on.
        share: 1 for all of it.
    """

    file: AdapterFile
    share: float = 1.0


def shares_of(files: Sequence[AdapterFile], weights: Sequence[float]) -> list[AdapterShare]:
    """Adapter files, each with its share of the change; 1 each where no weights are given.

    Raises:
        UsageError: as many weights as files are wanted, or none; one is no finite number.
    """
    odd = [weight for weight in weights if not _is_number(weight)]
    if odd:
        raise UsageError(f"the weight of an adapter is {odd[0]!r}, wanted 0 or a number from 1e-37 to 1e38")
    if weights and len(weights) != len(files):
        raise UsageError(f"{len(weights)} weights are given for {len(files)} adapter files")
    return [AdapterShare(*pair) for pair in zip(files, weights or [1.0] * len(files), strict=True)]


class AdapterSet:
    """Adapters on one model, each under a name; none is in use before it is selected.

    A low-rank adapter of a linear is computed beside others in two products for the whole
    batch, whatever the rows choose; one of another kind for its own rows alone. Its factors
    are copied for that when rows choose it first.

    Args:
        model: changed in place, with no adapter on it.

    Attributes:
        adapted: name -> what was loaded.
        model: that they are on.
    """

    def __init__(self, model: Model) -> None:
        self.adapted: dict[str, Adapted] = {}
        self.model = model
        self._places: dict[str, _Place] = {}
        self._state = _State()

    def load(self, name: str, file: AdapterFile, registry: Registry) -> Adapted:
        """Read the adapter in a file beside those that are there.

        Raises:
            UsageError: the name is taken, or empty.
            MlxloraError: as :func:`~mlxlora_core.model.adapters.load`; the model is as it was.
        """
        if not name or name in self.adapted:
            raise UsageError(f"adapter name {name!r} is {'taken' if name else 'empty'}", fix="give another")
        replace_modules(self.model.module, {path: place.linear for path, place in self._places.items()})
        try:
            adapted = adapters.load_file(file, self.model, registry)
            modules = dict(self.model.module.named_modules())
            for path in adapted.paths:
                wrapped: Any = modules[path]
                place = self._places.setdefault(path, _Place(wrapped.linear))
                place.held[name] = _Held(adapted.choice.component, wrapped)
            self.adapted[name] = adapted
        finally:
            replace_modules(
                self.model.module,
                {path: _module(place, self._state) for path, place in self._places.items()},
            )
        self._state.change(self._state.selected)
        return adapted

    def evaluate(self) -> None:
        """Compute here what is still to be read or computed of the adapters, for another thread cannot."""
        mx.eval([held.module for place in self._places.values() for held in place.held.values()])

    def take_off(self) -> None:
        """Leave the model as it was before the first adapter."""
        replace_modules(self.model.module, {path: place.linear for path, place in self._places.items()})
        self._places.clear()
        self.adapted.clear()
        self._state.change(Selected({}))

    def load_shares(self, shares: Sequence[AdapterShare], registry: Registry) -> list[str]:
        """Read adapters, select their shares, and give what there is to tell of their files.

        Raises:
            MlxloraError: as :meth:`load` and :meth:`select`.
        """
        adapted = [self.load(str(n), share.file, registry) for n, share in enumerate(shares)]
        self.select({str(n): share.share for n, share in enumerate(shares)})
        return [note for each in adapted for note in each.notes]

    def select(self, selected: str | Weights | Sequence[str | None] | None) -> None:
        """What the next batches are computed with.

        Args:
            selected: a name; name -> share of its change, to mix several; for each row of a batch a
                name or None; None for the base alone.

        Raises:
            UsageError: a name that there is not, or a share that is no finite number.
        """
        if selected is None or isinstance(selected, str):
            found = Selected({} if selected is None else {selected: 1.0})
        elif isinstance(selected, Mapping):
            found = Selected(dict(selected))
        else:
            found = Selected({}, tuple(selected))
        for name in (*found.weights, *(row for row in found.rows if row is not None)):
            if name not in self.adapted:
                known = sorted(self.adapted)
                there = f"{nearest(str(name), known)}there is {listing(known)}" if known else "there is none"
                raise UsageError(f"no adapter {name!r} is on the model ({there})")
        odd = [name for name, share in found.weights.items() if not _is_number(share)]
        if odd:
            raise UsageError(f"the share of {listing(odd)} is {found.weights[odd[0]]!r}, wanted a number")
        self._state.change(found)

    @property
    def selected(self) -> Selected:
        """What batches are computed with now."""
        return self._state.selected

    def paths(self) -> tuple[str, ...]:
        """The linears that any of them changes."""
        return tuple(self._places)

    def fused_weight(self, path: str, before: mx.array) -> mx.array:
        """The weight of a linear with the selected shares of all changes in it.

        Args:
            path: one of :meth:`paths`.
            before: the linear's own weight, float32.
        """
        return self._fused(path, before, fused_weight)

    def fused_bias(self, path: str, before: mx.array) -> mx.array:
        """The bias of a linear with the selected shares of all changes in it, in the type of ``before``."""
        return self._fused(path, before.astype(mx.float32), fused_bias).astype(before.dtype)

    def _fused(
        self, path: str, before: mx.array, fuse: Callable[[Component, nn.Module, mx.array], mx.array]
    ) -> mx.array:
        """A parameter of a linear with the selected shares of what ``fuse`` makes of it for each adapter."""
        after = before
        for name, share in self.selected.weights.items():
            held = self._places[path].held.get(name)
            if held is not None:
                fused = fuse(held.component, held.module, before)
                # Alone and whole, it is taken as the adapter gives it.
                alone = share == 1 and len(self.selected.weights) == 1
                after = fused if alone else after + share * (fused - before)
        return after

    def is_low_rank(self, name: str) -> bool:
        """Whether all that an adapter changes are low-rank updates of linears.

        Each row of a batch is then computed in products that all rows share, whatever the others choose.
        """
        held = (place.held[name] for place in self._places.values() if name in place.held)
        return all(each.is_low_rank() for each in held)

    def linear(self, path: str) -> nn.Module:
        """The linear at one of :meth:`paths`, without any adapter."""
        return self._places[path].linear


# --- modules ------------------------------------------------------------------


class _Switched(nn.Module):
    """What stands in a model for a linear or an embedding with several adapters on it.

    Args:
        place: the linear and its adapters.
        state: what is selected, shared by all places.
    """

    def __init__(self, place: _Place, state: _State) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.linear = place.linear
        self._place, self._state = place, state


class SwitchedLinear(_Switched):
    """A linear with several adapters on it, of which the selection says what is computed."""

    def __call__(self, x: mx.array, indices: mx.array | None = None) -> mx.array:
        """Outputs (B, ..., outputs) of inputs (B, ..., inputs).

        Raises:
            UsageError: adapters are selected for another number of rows than B.
        """
        if indices is None:
            return self._place.outputs(self._state, x, lambda module, rows: module(x[rows]))
        return self._place.outputs(self._state, x, lambda module, rows: module(x[rows], indices[rows]))


class SwitchedEmbedding(_Switched):
    """An embedding with several adapters on it, of which the selection says what is computed."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """Embeddings (B, T, D) of token ids (B, T)."""
        return self._place.outputs(self._state, tokens, lambda module, rows: module(tokens[rows]))

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (B, ..., V) of hidden states (B, ..., D)."""
        return self._place.outputs(self._state, x, lambda module, rows: module.as_linear(x[rows]))


#: what a module gives for some rows of a batch
_Run = Callable[[Any, Any], mx.array]
_ALL = slice(None)


@dataclass(frozen=True)
class _Held:
    """An adapter of one linear. No module itself, so that the linear stands in the model only once."""

    component: Component
    module: Any

    def is_low_rank(self) -> bool:
        """Whether its change is a low-rank update of a linear."""
        return self.component.spec.low_rank is not None and is_linear(self.module.linear)

    def low_rank(self) -> LowRank:
        """Its update, where that is a low-rank one."""
        return self.component.checked("low_rank", self.component.spec.low_rank(self.module), LowRank)


class _State:
    """What is selected, shared by all places; ``version`` grows when it changes."""

    def __init__(self) -> None:
        self.selected, self.version = Selected({}), 0

    def change(self, selected: Selected) -> None:
        self.selected, self.version = selected, self.version + 1


class _Place:
    """A linear and its adapters, and what the selection makes of them."""

    def __init__(self, linear: nn.Module) -> None:
        self.linear, self.held = linear, dict[str, _Held]()
        self._version = -1
        self._alone: nn.Module | None = None
        self._update: Update | None = None
        self._others: list[tuple[float, nn.Module, Any]] = []
        self._stack = StackedUpdates(lambda name: self.held[name].low_rank())

    def outputs(self, state: _State, x: mx.array, run: _Run) -> mx.array:
        """What ``run`` gives for the linear, with what is selected in it.

        Args:
            state: what is selected.
            x: the batch, (B, ...).
            run: called with a module and some rows of the batch.
        """
        rows = state.selected.rows
        if rows and len(rows) != x.shape[0]:
            raise UsageError(f"adapters are selected for {len(rows)} rows, this batch has {x.shape[0]}")
        if self._version != state.version:
            self._prepare(state.selected)
            self._version = state.version
        if self._alone is not None:
            return run(self._alone, _ALL)
        base = run(self.linear, _ALL)
        y = base if self._update is None else self._update(x, base)
        for share, module, chosen in self._others:
            change = share * (run(module, chosen) - base[chosen])
            y = y.at[chosen].add(change.astype(y.dtype))
        return y

    def _prepare(self, selected: Selected) -> None:
        """Take apart what is selected: one adapter as it is, low-rank updates, and others."""
        weights = {name: share for name, share in selected.weights.items() if name in self.held}
        self._alone, self._update, self._others = None, None, []
        if [*selected.weights.values()] == [1]:
            self._alone = next((self.held[name].module for name in weights), self.linear)
            return
        chosen = dict.fromkeys((*weights, *(row for row in selected.rows if row in self.held)))
        updates = [name for name in chosen if self.held[name].is_low_rank()]
        if updates and weights:
            self._update = mixed([(weights[name], self.held[name].low_rank()) for name in updates])
        elif updates:
            self._update = self._stack.by_row([row if row in updates else None for row in selected.rows])
        for name in (name for name in chosen if name not in updates):
            wanted = [row for row, each in enumerate(selected.rows) if each == name]
            place = mx.array(wanted) if wanted else _ALL
            self._others.append((weights.get(name, 1.0), self.held[name].module, place))


def _module(place: _Place, state: _State) -> nn.Module:
    """What stands in the model for a linear or embedding with its adapters."""
    return SwitchedLinear(place, state) if is_linear(place.linear) else SwitchedEmbedding(place, state)


def _is_number(share: Any) -> bool:
    """Whether it is a number that float32 holds."""
    plain = isinstance(share, int | float) and not isinstance(share, bool)
    return plain and (share == 0 or 1e-37 <= abs(share) <= 1e38)
