"""What enters the lowest adapted layer, computed once for each row and kept.

The layers below it are frozen and nothing in them is random, so that their
output depends on the row alone: later steps and validations begin where it
was kept. Known from small networks: Matsutani et al. 2024, arXiv:2410.21073.

The rows are read in an order and in batches that the data alone decides, so that
a training that is resumed fills the same numbers in again. Several ranks share them out: each
computes every so-many-th group of rows, and all of them keep all, since rows go from rank to rank
with every epoch. A token takes a few kilobytes on the way, and computing it on each rank far longer.
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
from mlxlora_core.training.kept import Kept, Numbers, Place
from mlxlora_core.training.loss import nats
from mlxlora_core.training.parallel import side_by_side
from mlxlora_core.training.reuse import Reuse, decide
from mlxlora_core.training.settings import TrainConfig

#: tokens that are read at a time at most, unless a row has more
TOKENS = 2048

_SHARE = 0.25  # of the memory that is free, what is kept takes at most unless somebody says otherwise
_LOST = "; every step that reads them computes all layers"

# numpy has no bfloat16
_WORDS = {2: np.uint16, 4: np.uint32}
_MLX_WORDS = {2: mx.uint16, 4: mx.uint32}


@dataclass
class _Group:
    """Rows that are read together, and are read together again where they are lost.

    Attributes:
        split: whose rows.
        rows: which.
        place: where they are; None where there is no room.
        renewed: whether they were lost once before.
    """

    split: str
    rows: Sequence[int]
    place: Place | None = None
    renewed: bool = False


class Prefix:
    """What enters a layer, for the rows of a training.

    Args:
        model: with the adapter that trains.
        splits: ``train`` and, where there is one, ``valid``.
        reuse: what is kept of them, and whether.
        belongs: what else the numbers depend on: fingerprint of the base, versions of plugins.
        folder: below which files go; None is a temporary place.
        memory_mb: what is kept in memory at most; None is a quarter of what is free for this rank.
        group: the ranks that share the work.

    Attributes:
        reuse: as given; a training that is resumed may change whether.
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
        self._kept: Kept | None = None
        self._where: dict[tuple[str, int], tuple[_Group, int]] = {}
        self._notes: list[str] = []

    def collator(self, split: str) -> Collator:
        """Makes batches of the rows of a split, with what was kept of them."""
        return Collator(self._splits[split], entering=partial(self.entering, split), first=self.reuse.first)

    def settle(self, need: int) -> int:
        """Settle how much is kept in memory beside work that needs ``need`` bytes; how much that will be."""
        if self._budget is None:
            free = free_memory_bytes()
            if free is not None:
                self._budget = max(0, min(int(_SHARE * free), free - need - reused_bytes(need)))
        total = self.reuse.number_bytes if self.reuse.on else 0
        return total if self._budget is None else min(total, self._budget)

    def filling_bytes(self, sizes: Sizes) -> int:
        """What filling takes at once beside what is kept, at most."""
        if not self.reuse.on:
            return 0
        groups = (self._tokens(split, rows) for split, rows in self._parts())
        ranks = self._group.size if self._group.size > 1 else 0  # what each gives comes to all, and is copied
        return max(
            2 * len(tokens) * max(tokens) * sizes.dim * sizes.number_bytes
            + sizes.layer_bytes(len(tokens), max(tokens), max(tokens))
            + 2 * ranks * sum(tokens) * self.reuse.width * self.reuse.stored.size
            for tokens in groups
        )

    def look(self) -> None:
        """Keep nothing where a row's states are not its own, such as those scaled for the width of a batch.

        The shortest row, padded like the longest, shows that.
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
        """What is saved and what that takes, or why nothing is, in a line."""
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
        """Keep, or do not, as a training was begun that goes on."""
        if on != self.reuse.on and self.reuse.possible:
            self.reuse = replace(self.reuse, on=on, why_not="" if on else "it was begun so")

    def fill(self) -> Iterator[Advanced]:
        """Compute what is to be kept; how far that is after each group of rows.

        Raises:
            UsageError: it cannot be kept in the type that was asked for.
        """
        if not self.reuse.on:
            return
        machines = self._group.machines
        self._kept = Kept(self._budget, self._folder, machines.count(machines[self._group.rank]))
        what = f"what enters layer {self.reuse.first + 1}"
        count, done = sum(map(len, self.reuse.rows.values())), 0
        groups = self._parts()
        while parts := list(islice(groups, self._group.size)):
            for (split, rows), numbers in zip(parts, self._shared_out(parts), strict=True):
                group = _Group(split, rows)
                if not self._kept.fault:
                    group.place = self._kept.keep(self._key(group), numbers)
                self._where |= {(split, row): (group, index) for index, row in enumerate(rows)}
                done += len(rows)
            yield Advanced(what, done, count)
        if self._kept.fault:
            lost = sum(group.place is None for group, _ in self._where.values())
            self._notes.append(f"warning: {lost} of {count} rows have no room ({self._kept.fault}){_LOST}")

    def entering(self, split: str, rows: Sequence[int], batch: Batch) -> mx.array | None:
        """What enters :attr:`Reuse.first` for a batch, in the layout of its inputs; None where a row is lost.

        Args:
            split: whose rows.
            rows: those of the batch, in its order.
            batch: whose ``inputs`` (B, T) it stands for.
        """
        words = _WORDS[self.reuse.stored.size]
        whole = np.zeros((batch.inputs.size, self.reuse.width), words)
        for start, row in zip(batch.starts, rows, strict=False):
            found = self._read(split, row)
            if found is None:
                return None
            whole[start : start + len(found)] = found
        whole = whole.reshape(*batch.inputs.shape, -1)
        whole[len(rows) :] = whole[:1]  # rows that only fill a shape, as its inputs do
        return mx.array(whole).view(self.reuse.stored).astype(self.reuse.computed)

    def notes(self) -> list[str]:
        """What there is to tell since this was asked last."""
        told, self._notes = self._notes, []
        return told

    def close(self) -> None:
        """Give back memory and files."""
        self._where.clear()
        if self._kept is not None:
            self._kept.close()

    def _parts(self) -> Iterator[tuple[str, Sequence[int]]]:
        """The rows in groups that are read together, each with its split: the longest first."""
        for split, chosen in self.reuse.rows.items():
            rows = sorted(chosen, key=lambda row: len(self._splits[split][row].tokens), reverse=True)
            while rows:
                tokens = self._tokens(split, rows)
                fit = bisect_right(list(accumulate(tokens)), TOKENS) if self._packing else TOKENS // tokens[0]
                count = max(1, fit)
                yield split, rows[:count]
                rows = rows[count:]

    def _shared_out(self, parts: Sequence[tuple[str, Sequence[int]]]) -> list[Sequence[Numbers]]:
        """The numbers of groups of rows, one for each rank at most, which computes it for all."""
        if self._group.size == 1:  # nothing is computed for which there is no room
            return [() if self._kept and self._kept.fault else self._compute(*part) for part in parts]
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
        """What enters the layer for rows, each (T, D), as words of the type that is stored."""
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
        """What it changes of the loss of a batch that states are kept in half precision, in words."""
        exact = nats(self._model, replace(batch, hidden=None, first=0)).item() / batch.counted_tokens
        changed = nats(self._model, batch).item() / batch.counted_tokens - exact
        kept = str(self.reuse.stored).removeprefix("mlx.core.")
        return f"{kept} changes the loss of the first batch, {exact:.4f}, by {changed:+.1e}"

    def _below(self, batch: Batch) -> mx.array:
        lengths: dict[str, Any] = {"lengths": batch.lengths} if batch.lengths else {}
        return self._model.run(self._model.embed(batch.inputs), last=self.reuse.first, **lengths)

    def _stored(self, hidden: mx.array) -> mx.array:
        """Hidden states in the type that they are kept in.

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
        """What was kept of a row."""
        group, index = self._where.get((split, row), (None, 0))
        if group is None or group.place is None or self._kept is None:
            return None
        found = self._kept.read(group.place, index)
        return self._renewed(self._kept, group, index) if found is None else found

    def _renewed(self, kept: Kept, group: _Group, index: int) -> Numbers | None:
        """A row of a group whose file is damaged, computed as it was at first; none the second time."""
        what = f"warning: a file of {len(group.rows)} {group.split} rows does not hold what was written"
        group.place = None
        if not group.renewed and not kept.fault:
            group.renewed = True
            rows = self._compute(group.split, group.rows)
            group.place = kept.keep(self._key(group), rows)
            self._notes.append(what + ("; it is made again" if group.place else f" ({kept.fault}){_LOST}"))
            return rows[index]
        self._notes.append(f"{what}{_LOST}")
        return None

    def _key(self, group: _Group) -> bytes:
        """What tells the numbers of a group from all others."""
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
    """What can be kept of the rows of a training, and whether it is.

    Args:
        model: with the adapter that trains.
        splits: ``train`` and, where there is one, ``valid``.
        config: how it trains.
        folder: as :class:`Prefix` has it.
        group: as :class:`Prefix` has it.

    Raises:
        UsageError: it is to be kept, and cannot be.
    """
    examples = {name: split.examples for name, split in splits.items()}
    reuse = decide(model.language_model, config, examples)
    components = [model.architecture, *([model.quantization.component] if model.quantization else [])]
    belongs = [model.fingerprint, version("mlx"), *(str(component.plugin) for component in components)]
    return Prefix(model.language_model, examples, reuse, belongs, folder, config.prefix_memory_mb, group)
