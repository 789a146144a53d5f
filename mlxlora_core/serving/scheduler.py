"""What is done in each step: which prompts are read, which texts continued. No thread in here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlxlora_core.errors import MlxloraError, ResourceError
from mlxlora_core.machine.limits import exhausted
from mlxlora_core.machine.memory import free_memory_bytes
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.memory import SHORTER, sizes_of
from mlxlora_core.model.ragged_cache import room_for
from mlxlora_core.serving.job import Job
from mlxlora_core.serving.lanes import Batch, Lane, OneByOne
from mlxlora_core.serving.metrics import Metrics
from mlxlora_core.serving.prefixes import Prefixes
from mlxlora_core.serving.selection import Selection
from mlxlora_core.serving.widths import widths_alike

# Rows of a batch. Up to 16 rows of packed weights are multiplied in one way, so that batches of 1, 2, 4 and 8
# give the same bits, and one text alone has the speed of a row: 53 ms a token of 135 M at 4 bits on 2 cores,
# where 8 rows take 91 and 16 take 152. Where 16 have bits of their own, or of their place in the batch, as
# under OpenBLAS's kernels for Haswell, fewer may have the same.
_ROWS = (16, 8, 4)

# Of free memory, what keys and values may take where nobody says, and of that what is kept of prompts.
_CACHE_SHARE, _PREFIX_SHARE = 0.5, 0.25


@dataclass(frozen=True)
class Limits:
    """How much is done at once.

    Attributes:
        places: requests that are read and continued at the same time.
        queue: requests that may wait for a place.
        part_tokens: tokens of a prompt that are read at a time.
        step_tokens: tokens of prompts after which a step reads no further part but of the oldest; half
            of what parts of all places come to has a prompt of one part read within two steps.
        cache_bytes: that keys and values may take; None for half of the memory that is free.
    """

    places: int = 16
    queue: int = 64
    part_tokens: int = 128
    step_tokens: int = 1024
    cache_bytes: int | None = None


class Scheduler:
    """The requests that a model serves, brought forward step by step, in one thread.

    What a request gets depends on it alone: its prompt is read in parts that begin at multiples of
    ``part_tokens``, by itself, and its text continued in batches of widths that give its row the same
    bits whoever its neighbours are; where there are no such widths, one by one.

    Memory for keys and values is reserved as a text grows. A text that would need so much more that not
    all could come to their ends is put aside until others have ended: whatever has a place can end.

    Args:
        model: with its adapters; evaluated.
        selection: of the adapters.
        limits: how much is done at once.

    Attributes:
        metrics: what was done.
        widths: rows that a batch may have; nothing where texts are continued one by one.
    """

    def __init__(self, model: LanguageModel, selection: Selection, limits: Limits) -> None:
        model.eval()
        self._model, self._selection, self._limits = model, selection, limits
        self.metrics = Metrics()
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._aside: list[Job] = []  # until there is memory for what comes next of them
        self.widths = _widths(model, selection, limits.places) if model.ragged else ()
        self._alone = OneByOne(model, selection)
        self._batches: list[Batch] = []
        if self.widths:
            count = -(-limits.places // self.widths[-1])
            self._batches = [Batch(model, selection, self.widths) for _ in range(count)]
        self._sizes = sizes_of(model)
        free = free_memory_bytes() or 1 << 30
        self.cache_bytes = limits.cache_bytes or int(_CACHE_SHARE * free)
        self._work_bytes = free - self.cache_bytes
        self._prefixes = Prefixes(limits.part_tokens, int(_PREFIX_SHARE * self.cache_bytes))
        self.cache_bytes -= self._prefixes.most_bytes

    # --- what there is to do ---

    @property
    def waiting(self) -> int:
        """Requests without a place."""
        return len(self._waiting)

    @property
    def running(self) -> list[Job]:
        """Requests that have one."""
        return [*self._reading, *self._aside, *(job for lane in self._lanes() for job in lane.jobs)]

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self.running)

    def need_bytes(self, job: Job) -> int:
        """What keys and values of a request may come to.

        Raises:
            ResourceError: more than all requests together may have.
        """
        need = self._most_bytes(job)
        if need > self.cache_bytes:
            raise ResourceError(
                f"a prompt of {len(job.request.prompt)} tokens and {job.max_tokens} after it need "
                f"{need >> 20} MB of keys and values, {self.cache_bytes >> 20} MB can be had",
                fix=f"ask for fewer tokens, {SHORTER}",
            )
        return need

    def has_room(self, job: Job) -> bool:
        """Whether keys and values of a request fit beside what the reading of its prompt takes."""
        count, rows = len(job.request.prompt), max(self.widths, default=1)
        reading = self._sizes.layer_bytes(1, min(count, self._limits.part_tokens), count)
        work = max(reading, self._sizes.logits_bytes(rows))
        return self._most_bytes(job) <= self.cache_bytes and work <= self._work_bytes

    def _most_bytes(self, job: Job) -> int:
        """What keys and values of a request may come to."""
        return self._sizes.cache_bytes(room_for(len(job.request.prompt) + job.max_tokens))

    def add(self, job: Job) -> None:
        """Let a request wait for a place."""
        self.metrics.requests += 1
        self._waiting.append(job)

    def plain_metrics(self) -> dict[str, float]:
        """What was done and is, in plain numbers."""
        now = {
            "waiting": len(self._waiting),
            "reading": len(self._reading),
            "aside": len(self._aside),
            "running": len(self.running),
            "places": self._limits.places,
            "reserved_bytes": self._reserved(),
            "cache_bytes": self.cache_bytes,
            "prefix_bytes": self._prefixes.held_bytes,
            "active_bytes": mx.get_active_memory(),
        }
        return {**self.metrics.plain(), **now}

    # --- steps ---

    def step(self) -> None:
        """Take in what waits, read a part of each prompt, and continue each text by a token."""
        self._drop()
        self._admit()
        self.metrics.steps += 1
        self._read()
        for lane in self._lanes():
            self._continue(lane)

    def end_all(self, finish: str) -> None:
        """End every request."""
        for job in [*self._waiting, *self.running]:
            job.end(finish)
        self._drop()

    def _drop(self) -> None:
        """Let go of requests that were ended or given up."""
        for job in [*self._waiting, *self.running]:
            why = job.given_up()
            if job.finish is None and why is not None:
                job.end(why)
        self._waiting = deque(self._left(self._waiting))
        self._reading = list(self._left(self._reading))
        self._aside = list(self._left(self._aside))
        for lane in self._lanes():
            self._clear(lane)

    def _left(self, jobs: deque[Job] | list[Job]) -> Iterator[Job]:
        """Those that have not ended; the others are counted."""
        for job in jobs:
            if job.finish is None:
                yield job
            else:
                self.metrics.ended(job, time.monotonic())

    def _clear(self, lane: Lane) -> None:
        for job in lane.jobs:
            if job.finish is not None:
                lane.remove(job)
                self.metrics.ended(job, time.monotonic())

    def _reserved(self) -> int:
        return sum(job.reserved for job in self.running)

    def _can_end(self) -> bool:
        """Whether all that have a place can end one after the other, each with all that it may come to need.

        Source: Dijkstra 1965, "Cooperating sequential processes" (EWD 123), section 6.
        """
        free = self.cache_bytes - self._reserved()
        for job in sorted(self.running, key=lambda job: job.most - job.reserved):
            if job.most - job.reserved > free:
                return False
            free += job.reserved
        return True

    def _grow(self, job: Job) -> bool:
        """Reserve what the next step of a text takes, if all can end then; whether that is so."""
        before = job.reserved
        job.reserved = max(before, self._sizes.cache_bytes(room_for(len(job.tokens))))
        if job.reserved == before or self._can_end():
            return True
        job.reserved = before
        return False

    def _admit(self) -> None:
        """Give places to those that wait, in the order in which they came, as far as there is memory."""
        for job in list(self._aside):
            if self._grow(job):
                self._aside.remove(job)
                self._place(job)
        while self._waiting and not self._aside and len(self.running) < self._limits.places:
            job = self._waiting[0]
            job.most = self.need_bytes(job)
            job.reserved = self._sizes.cache_bytes(room_for(len(job.request.prompt) + 1))
            self._reading.append(job)
            if not self._can_end():
                self._reading.pop()
                return
            self._waiting.popleft()
            job.cache = self._model.make_cache()
            job.read = job.cached = self._prefixes.begin(job.request.adapter, job.request.prompt, job.cache)
            self.metrics.cached_tokens += job.cached

    def _read(self) -> None:
        """Read a part of each prompt until the step has read enough, the shortest first.

        The one that came first is read in every step, or prompts that come later could hold it up forever.
        """
        left, first = self._limits.step_tokens, self._reading[:1]
        for job in sorted(self._reading, key=lambda job: len(job.request.prompt) - job.read):
            if left <= 0 and job not in first:
                continue
            before = job.read
            try:
                self._read_part(job)
            except Exception as fault:  # one request must not end the others
                job.fail(_as_error(fault))
            left -= max(1, job.read - before)
            if job.finish is not None or job.read == len(job.request.prompt):
                self._reading.remove(job)
                self._place(job)

    def _read_part(self, job: Job) -> None:
        """Read the next part of a prompt; of the last one a token is drawn."""
        prompt, part = job.request.prompt, self._limits.part_tokens
        tokens = prompt[job.read : job.read + part]
        self._selection.use(job.request.adapter)
        hidden = self._model.run(self._model.embed(mx.array([tokens])), cache=job.cache)
        mx.eval(hidden)
        job.read += len(tokens)
        self.metrics.prompt_tokens += len(tokens)
        self._prefixes.keep(job.request.adapter, prompt, job.cache, job.read)
        if job.read == len(prompt):
            job.draw(self._model.head(hidden[:, -1]).astype(mx.float32))

    def _place(self, job: Job) -> None:
        """Let a text whose prompt was read be continued, unless it has ended."""
        if job.finish is not None:
            self.metrics.ended(job, time.monotonic())
            return
        lane: Lane = self._alone
        if self._batches and self._selection.shares_batches(job.request.adapter):
            lane = next(batch for batch in self._batches if batch.room)
        lane.add(job)

    def _continue(self, lane: Lane) -> None:
        """Continue the texts of a lane; all end where that fails, and it is empty then."""
        for job in lane.jobs:
            if not self._grow(job):
                lane.put_aside(job)
                self._aside.append(job)
        self.metrics.rows += len(lane.jobs)
        try:
            lane.step()
        except Exception as fault:  # the engine goes on with other requests
            for job in lane.jobs:
                job.fail(_as_error(fault))
        self._clear(lane)

    def _lanes(self) -> list[Lane]:
        return [*self._batches, self._alone]


def _widths(model: LanguageModel, selection: Selection, places: int) -> tuple[int, ...]:
    """Rows that batches have, up to the most of which fewer have the same bits."""
    found: tuple[int, ...] = ()
    for widest in _ROWS:
        if len(found) <= 1 and (widest < places or widest == _ROWS[0]):
            found = max(found, widths_alike(model, selection, min(widest, places)), key=len)
    return found


def _as_error(fault: Exception) -> MlxloraError:
    """A fault as an error that a caller can be told, caused by it."""
    if isinstance(fault, MlxloraError):
        return fault
    error = exhausted(fault) or MlxloraError(f"the model could not go on: {fault}")
    error.__cause__ = fault
    return error
