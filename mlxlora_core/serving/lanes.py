"""How texts are continued by a token each: many in one batch, or one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import mlx.core as mx

from mlxlora_core.model.cache import KVCache
from mlxlora_core.model.generate import forward
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.ragged_cache import RaggedRows
from mlxlora_core.serving.job import Job
from mlxlora_core.serving.selection import Selection
from mlxlora_core.values import Cache


class Lane(ABC):
    """Texts that are continued in the same way.

    Args:
        model: of them all.
        selection: of the adapters on it.
    """

    def __init__(self, model: LanguageModel, selection: Selection) -> None:
        self._model, self._selection = model, selection

    @property
    @abstractmethod
    def jobs(self) -> Sequence[Job]:
        """Those that are in it."""

    @abstractmethod
    def add(self, job: Job) -> None:
        """Take in a request whose prompt was read."""

    @abstractmethod
    def remove(self, job: Job) -> None:
        """Let go of a request."""

    def put_aside(self, job: Job) -> None:
        """Let go of a request that is taken in again later, with its keys and values in its own cache."""
        self.remove(job)

    @abstractmethod
    def step(self) -> None:
        """Read the last token of each text, and draw the next."""


class Batch(Lane):
    """Texts that are continued together in one batch of a fixed number of rows.

    Every product has as many rows, whoever they belong to, those that nobody needs among them: how
    numbers are summed depends on the number of rows, and texts must not depend on their neighbours.

    Args:
        widths: numbers of rows that a batch may have, ascending, which all give a row the same bits.
    """

    def __init__(self, model: LanguageModel, selection: Selection, widths: Sequence[int]) -> None:
        super().__init__(model, selection)
        self._widths = widths
        self._rows = RaggedRows(len(model.layers))
        self._jobs: dict[int, Job] = {}
        self._count = 0

    @property
    def jobs(self) -> Sequence[Job]:
        """Those that are in it."""
        return list(self._jobs.values())

    @property
    def room(self) -> int:
        """How many more it takes."""
        return self._widths[-1] - len(self._jobs)

    def add(self, job: Job) -> None:
        """Take in a request, and its keys and values."""
        self._count += 1
        self._rows.add(self._count, [entry.held() for entry in job.cache if isinstance(entry, KVCache)])
        self._jobs[self._count] = job
        job.cache = ()

    def remove(self, job: Job) -> None:
        """Let go of a request, and of its keys and values."""
        row = self._row(job)
        del self._jobs[row]
        self._rows.remove(row)

    def put_aside(self, job: Job) -> None:
        """Let go of a request that is taken in again later, with its keys and values in its own cache."""
        job.cache = self._model.make_cache()
        for entry, held in zip(job.cache, self._rows.held(self._row(job)), strict=True):
            entry.update(*held)
        mx.eval([entry.held() for entry in job.cache if isinstance(entry, KVCache)])
        self.remove(job)

    def _row(self, job: Job) -> int:
        return next(row for row, each in self._jobs.items() if each is job)

    def step(self) -> None:
        """Read the last token of each text, and draw the next."""
        if not self._jobs:
            return
        width = next(width for width in self._widths if width >= len(self._jobs))
        order, entries = self._rows.step(width)
        jobs, spare = [self._jobs[row] for row in order], width - len(order)
        self._selection.use((*(job.request.adapter for job in jobs), *[None] * spare))
        tokens = mx.array([*([job.tokens[-1]] for job in jobs), *[[0]] * spare])
        logits = logits_of_rows(self._model, tokens, entries)
        mx.eval(logits)
        for place, job in enumerate(jobs):
            job.draw(logits[place : place + 1])


class OneByOne(Lane):
    """Texts that are continued one after another, each as if it were alone."""

    def __init__(self, model: LanguageModel, selection: Selection) -> None:
        super().__init__(model, selection)
        self._jobs: list[Job] = []

    @property
    def jobs(self) -> Sequence[Job]:
        """Those that are in it."""
        return list(self._jobs)

    def add(self, job: Job) -> None:
        """Take in a request, which goes on with its own cache."""
        self._jobs.append(job)

    def remove(self, job: Job) -> None:
        """Let go of a request."""
        self._jobs.remove(job)

    def step(self) -> None:
        """Read the last token of each text, and draw the next."""
        for job in self._jobs:
            self._selection.use(job.request.adapter)
            job.draw(forward(self._model, job.tokens[-1:], job.cache))


def logits_of_rows(model: LanguageModel, tokens: mx.array, entries: Sequence[Cache] | None) -> mx.array:
    """Logits (B, V), float32, after ids (B, 1) went into the caches of the layers, or into none."""
    hidden = model.run(model.embed(tokens), cache=entries)
    return model.head(hidden[:, -1]).astype(mx.float32)
