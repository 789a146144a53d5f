"""What enters the lowest adapted layer, computed once for each row and reused.

The layers below are frozen and nothing in them is random, so their output depends only on the row:
later steps and validations start from what was kept. Known from small networks: Matsutani et al.
2024, arXiv:2410.21073.

The data alone decides in which order and in which batches the rows are read, so that a resumed
training computes the same numbers again. Several ranks share the work: each computes every
``size``-th group of rows, and all of them keep all rows, since a rank gets other rows in every
epoch. Sending a token's few kilobytes takes far less time than computing it on each rank.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.errors import UsageError
from mlxlora_core.files.tensor_checks import type_name
from mlxlora_core.machine.limits import readable_bytes
from mlxlora_core.machine.memory import free_memory_bytes
from mlxlora_core.model.language_model import LanguageModel, takes
from mlxlora_core.model.loading import Model
from mlxlora_core.model.memory import Sizes, reused_bytes
from mlxlora_core.training.batches import Batch, Collator, make_batch
from mlxlora_core.training.events import Advanced
from mlxlora_core.training.examples import Example, Examples
from mlxlora_core.training.loss import nats
from mlxlora_core.training.parallel import side_by_side
from mlxlora_core.training.reuse import Reuse, decide
from mlxlora_core.training.row_store import Numbers, RowStore, Stored
from mlxlora_core.training.settings import TrainConfig

#: the most tokens that are read at a time, unless a single row has more
TOKENS = 2048

_SHARE = 0.25  # of the free memory; the most that is kept in it unless the user says otherwise
_LOST = "; every step that reads them computes all layers"

# numpy has no bfloat16
_WORDS = {2: np.uint16, 4: np.uint32}
_MLX_WORDS = {2: mx.uint16, 4: mx.uint32}


@dataclass
class _Group:
    """Rows that are read together, and again together if they are lost.

    Attributes:
        split: that they belong to.
        rows: their indices.
        place: where they are stored; None if there is no room.
        renewed: whether they have been lost once before.
    """

    split: str
    rows: Sequence[int]
    place: Stored | None = None
    renewed: bool = False


class Prefix:
    """The kept hidden states of the rows of a training: the input of layer ``reuse.first``.

    Args:
        model: with the adapter that trains.
        splits: ``train`` and, if there is one, ``valid``.
        reuse: which hidden states are kept, and whether.
        belongs: what else the numbers depend on: the fingerprint of the base, versions of plugins.
        folder: the folder to put files in; None is a temporary one.
        memory_mb: the most that is kept in memory; None is a quarter of what is free for this rank.
        group: the ranks that share the work.

    Attributes:
        reuse: as given; resuming a training may switch it on or off.
    """

    def __init__(
        self,
        model: LanguageModel,
        splits: Mapping[str, Sequence[Example]],
        reuse: Reuse,
        belongs: Sequence[str] = (),
        folder: Path | None = None,
        memory_mb: int | None = None,
        group: Group = ALONE,
    ) -> None:
        self._group = group
        self.reuse, self._model, self._splits = reuse, model, splits
        self._packing = takes(model, "lengths")
        self._belongs, self._folder = "\n".join(belongs), folder
        self._budget: int | None = None if memory_mb is None else memory_mb * 10**6
        self._store: RowStore | None = None
        self._where: dict[tuple[str, int], tuple[_Group, int]] = {}
        self._notes: list[str] = []

    def collator(self, split: str) -> Collator:
        """Makes batches of the rows of a split, with their kept hidden states."""
        return Collator(self._splits[split], entering=partial(self.entering, split), first=self.reuse.first)

    def budget_memory(self, need: int) -> int:
        """Decide how much to keep in memory beside work that needs ``need`` bytes; returns how many."""
        if self._budget is None:
            free = free_memory_bytes()
            if free is not None:
                self._budget = max(0, min(int(_SHARE * free), free - need - reused_bytes(need)))
        total = self.reuse.number_bytes if self.reuse.on else 0
        return total if self._budget is None else min(total, self._budget)

    def filling_bytes(self, sizes: Sizes) -> int:
        """The most memory that filling takes, beside what is kept, in bytes."""
        if not self.reuse.on:
            return 0
        groups = (self._tokens(split, rows) for split, rows in self._parts())
        ranks = self._group.size if self._group.size > 1 else 0  # each receives all parts, and copies them
        return max(
            2 * len(tokens) * max(tokens) * sizes.dim * sizes.number_bytes
            + sizes.layer_bytes(len(tokens), max(tokens), max(tokens))
            + 2 * ranks * sum(tokens) * self.reuse.width * self.reuse.stored.size
            for tokens in groups
        )

    def check_rows(self) -> None:
        """Switch off if a row's hidden states depend on the width of its batch.

        The shortest row, alone and padded like the longest, shows that.
        """
        if not self.reuse.on:
            return
        split, chosen = next(iter(self.reuse.rows.items()))
        rows = sorted(chosen, key=lambda row: len(self._splits[split][row].tokens))
        short, count = make_batch(self._splits[split], rows[:1]), self._tokens(split, rows[:1])[0]
        padded = mx.pad(short.inputs, [(0, 0), (0, self._tokens(split, rows[-1:])[0] - count)])
        alone, beside = (
            self._below(replace(short, inputs=inputs))[0, :count].astype(mx.float32)
            for inputs in (short.inputs, padded)
        )
        off = mx.abs(alone - beside).mean() / mx.maximum(mx.abs(alone).mean(), 1e-30)
        if not (off <= (1e-3 if self.reuse.computed == mx.float32 else 0.05)).item():
            why = "what a row becomes depends on the length of those beside it"
            self.reuse = replace(self.reuse, on=False, possible=False, why_not=why)

    @property
    def words(self) -> str:
        """One line on what is saved and what that takes, or why nothing is."""
        if not self.reuse.on:
            return self.reuse.words
        total = self.reuse.number_bytes
        memory = total if self._budget is None else min(total, self._budget)
        said = [f"{readable_bytes(memory)} in memory"] if memory else []
        if total > memory:
            place = f"in {self._folder}" if self._folder is not None else "in a temporary folder"
            said.append(f"{readable_bytes(total - memory)} in files {place} until the end")
        return f"{self.reuse.words}; it takes {' and '.join(said)}"

    def go_on(self, on: bool) -> None:
        """Switch on or off, as the training that is resumed was started."""
        if on != self.reuse.on and self.reuse.possible:
            self.reuse = replace(self.reuse, on=on, why_not="" if on else "it was begun so")

    def fill(self) -> Iterator[Advanced]:
        """Compute the hidden states to keep; yields progress after each group of rows.

        Raises:
            UsageError: they cannot be kept in the type that was asked for.
        """
        if not self.reuse.on:
            return
        machines = self._group.machines
        ranks_here = machines.count(machines[self._group.rank])
        self._store = RowStore(self._budget, self._folder, ranks_here)
        what = f"what enters layer {self.reuse.first + 1}"
        count, done = sum(map(len, self.reuse.rows.values())), 0
        groups = self._parts()
        while parts := list(islice(groups, self._group.size)):
            for (split, rows), numbers in zip(parts, self._shared_out(parts), strict=True):
                group = _Group(split, rows)
                if not self._store.fault:
                    group.place = self._store.keep(self._key(group), numbers)
                self._where |= {(split, row): (group, index) for index, row in enumerate(rows)}
                done += len(rows)
            yield Advanced(what, done, count)
        if self._store.fault:
            lost = sum(group.place is None for group, _ in self._where.values())
            self._notes.append(f"warning: {lost} of {count} rows have no room ({self._store.fault}){_LOST}")

    def entering(self, split: str, rows: Sequence[int], batch: Batch) -> mx.array | None:
        """The input (B, T, D) of layer :attr:`Reuse.first` for a batch; None if a row is lost.

        Args:
            split: that the rows belong to.
            rows: of the batch, in order.
            batch: gives the layout: its ``inputs`` are (B, T).
        """
        words = _WORDS[self.reuse.stored.size]
        whole = np.zeros((batch.inputs.size, self.reuse.width), words)
        for start, row in zip(batch.starts, rows, strict=False):
            found = self._read(split, row)
            if found is None:
                return None
            whole[start : start + len(found)] = found
        whole = whole.reshape(*batch.inputs.shape, -1)
        whole[len(rows) :] = whole[:1]  # rows that only fill the shape repeat the first, as in the inputs
        return mx.array(whole).view(self.reuse.stored).astype(self.reuse.computed)

    def notes(self) -> list[str]:
        """New notes for the user since the last call."""
        told, self._notes = self._notes, []
        return told

    def close(self) -> None:
        """Free the memory and delete the files."""
        self._where.clear()
        if self._store is not None:
            self._store.close()

    def _parts(self) -> Iterator[tuple[str, Sequence[int]]]:
        """(split, rows) of each group of rows to read together, the longest rows first."""
        for split, chosen in self.reuse.rows.items():
            rows = sorted(chosen, key=lambda row: len(self._splits[split][row].tokens), reverse=True)
            while rows:
                tokens = self._tokens(split, rows)
                fit = bisect_right(list(accumulate(tokens)), TOKENS) if self._packing else TOKENS // tokens[0]
                count = max(1, fit)
                yield split, rows[:count]
                rows = rows[count:]

    def _shared_out(self, parts: Sequence[tuple[str, Sequence[int]]]) -> list[Sequence[Numbers]]:
        """The numbers of at most one group of rows per rank; each rank computes its group for all of them."""
        if self._group.size == 1:  # compute nothing that there is no room for
            return [() if self._store and self._store.fault else self._compute(*part) for part in parts]
        own = [self._compute(*part) for part in parts[self._group.rank : self._group.rank + 1]]
        given = self._group.share(b"".join(row.tobytes() for rows in own for row in rows))
        shared: list[Sequence[Numbers]] = []
        for part, content in zip(parts, given, strict=False):
            numbers = np.frombuffer(content, _WORDS[self.reuse.stored.size]).reshape(-1, self.reuse.width)
            shared.append(np.split(numbers, list(accumulate(self._tokens(*part)))[:-1]))
        return shared

    def _tokens(self, split: str, rows: Sequence[int]) -> list[int]:
        return [len(self._splits[split][row].tokens) - 1 for row in rows]

    def _compute(self, split: str, rows: Sequence[int]) -> list[Numbers]:
        """The input of the layer for each of some rows, (T, D), as unsigned words of the stored type."""
        parts: list[Sequence[int]] = []

        def collate(part: Sequence[int]) -> Batch:
            parts.append(part)
            return make_batch(self._splits[split], part, self._packing)

        found: dict[int, Numbers] = {}
        computed = side_by_side(self._below, collate, rows, self._tokens(split, rows))
        for part, (batch, hidden) in zip(parts, computed, strict=True):
            stored = self._stored(hidden).reshape(-1, self.reuse.width)
            words = np.array(stored.view(_MLX_WORDS[stored.dtype.size]))
            counts = self._tokens(split, part)
            places = zip(part, batch.starts, counts, strict=True)
            found |= {row: words[start : start + count] for row, start, count in places}
        return [np.ascontiguousarray(found[row]) for row in rows]

    def difference(self, batch: Batch) -> str:
        """How much keeping half precision changes the loss of a batch, in words."""
        exact = nats(self._model, replace(batch, hidden=None, first=0)).item() / batch.counted_tokens
        changed = nats(self._model, batch).item() / batch.counted_tokens - exact
        kept = str(self.reuse.stored).removeprefix("mlx.core.")
        return f"{kept} changes the loss of the first batch, {exact:.4f}, by {changed:+.1e}"

    def _below(self, batch: Batch) -> mx.array:
        lengths: dict[str, Any] = {"lengths": batch.lengths} if batch.lengths else {}
        return self._model.run(self._model.embed(batch.inputs), last=self.reuse.first, **lengths)

    def _stored(self, hidden: mx.array) -> mx.array:
        """Hidden states in the type in which they are kept.

        Raises:
            UsageError: its range is too small.
        """
        stored = hidden.astype(self.reuse.stored)
        if stored.dtype != hidden.dtype and not mx.isfinite(stored).all() and mx.isfinite(hidden).all():
            kind, most = type_name(self.reuse.stored), mx.abs(hidden).max().item()
            raise UsageError(
                f"prefix_type {kind} cannot hold what enters layer {self.reuse.first + 1} (up to {most:.3g})",
                fix="use bfloat16, or compute",
            )
        return stored

    def _read(self, split: str, row: int) -> Numbers | None:
        """The kept numbers of a row, or None."""
        group, index = self._where.get((split, row), (None, 0))
        if group is None or group.place is None or self._store is None:
            return None
        found = self._store.read(group.place, index)
        return self._renewed(self._store, group, index) if found is None else found

    def _renewed(self, store: RowStore, group: _Group, index: int) -> Numbers | None:
        """A row of a group whose file is damaged, after computing the group again; None the second time."""
        what = f"warning: a file of {len(group.rows)} {group.split} rows does not hold what was written"
        group.place = None
        if not group.renewed and not store.fault:
            group.renewed = True
            rows = self._compute(group.split, group.rows)
            group.place = store.keep(self._key(group), rows)
            self._notes.append(what + ("; it is made again" if group.place else f" ({store.fault}){_LOST}"))
            return rows[index]
        self._notes.append(f"{what}{_LOST}")
        return None

    def _key(self, group: _Group) -> bytes:
        """A digest that identifies the numbers of a group."""
        reuse = self.reuse
        digest = hashlib.sha256(f"{self._belongs}\n{reuse.first} {reuse.computed} {reuse.stored}\n".encode())
        for row in group.rows:
            tokens = self._splits[group.split][row].tokens
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
        return digest.digest()


def prefix_of(
    model: Model,
    splits: Mapping[str, Examples],
    config: TrainConfig,
    folder: Path | None = None,
    group: Group = ALONE,
) -> Prefix:
    """The :class:`Prefix` of a training, switched on if its hidden states are to be kept.

    Args:
        model: with the adapter that trains.
        splits: ``train`` and, if there is one, ``valid``.
        config: how to train.
        folder: as for :class:`Prefix`.
        group: as for :class:`Prefix`.

    Raises:
        UsageError: they must be kept by ``config``, but cannot be.
    """
    examples = {name: split.examples for name, split in splits.items()}
    reuse = decide(model.language_model, config, examples)
    components = [model.architecture, *([model.quantization.component] if model.quantization else [])]
    belongs = [model.fingerprint, version("mlx"), *(str(component.plugin) for component in components)]
    return Prefix(model.language_model, examples, reuse, belongs, folder, config.prefix_memory_mb, group)
