"""``submit -> stream``: requests from any thread, served in the engine's own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping

import mlx.core as mx

from mlxlora_core.errors import UsageError
from mlxlora_core.model.generate import require_fit
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import parameters
from mlxlora_core.model.several import AdapterSet
from mlxlora_core.model.stop_texts import checked_stops
from mlxlora_core.serving.job import Job
from mlxlora_core.serving.request import CANCELLED, QueueFull, Request, Stopping
from mlxlora_core.serving.scheduler import Limits, Scheduler
from mlxlora_core.serving.selection import Selection
from mlxlora_core.serving.stream import Stream
from mlxlora_core.values import Tokenizer

#: of a request for log-probabilities, how many most likely tokens may be told
MOST_LOGPROBS = 20


class Engine:
    """One model, and many requests at once, whose texts share steps.

    MLX binds what it computes to threads, so that all of it is done in one of the engine's own.

    Args:
        model: with the linears that the adapters are on; nobody else uses it from now on.
        tokenizer: of the model.
        adapters: on the model; None where it has none.
        limits: how much is done at once.

    Attributes:
        names: of the adapters.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        adapters: AdapterSet | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._model, self._tokenizer, self._limits = model, tokenizer, limits or Limits()
        self._selection = Selection(adapters)
        self.names = self._selection.names
        self._changed = threading.Condition()
        self._submitted: deque[Job] = deque()
        self._stopping: float | None = None  # until when
        self._scheduler: Scheduler | None = None
        self._fault: Exception | None = None
        self._ready = threading.Event()
        self._refused = 0
        mx.eval(parameters(model))
        if adapters is not None:
            adapters.evaluate()
        self._thread = threading.Thread(target=self._work, name="mlxlora engine", daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> tuple[int, ...]:
        """Wait until requests are served.

        Returns:
            Rows that a batch may have; nothing where texts are continued one by one.

        Raises:
            MlxloraError: the engine could not begin.
        """
        self._ready.wait()
        if self._scheduler is None:
            raise self._fault or Stopping("the engine has stopped")
        return self._scheduler.widths

    def submit(self, request: Request) -> Stream:
        """Let a request wait for a place; what it gets comes through the stream.

        Raises:
            UsageError: a request that makes no sense, or does not fit into the model's context.
            ResourceError: it does not fit into memory.
            QueueFull: as many wait as may.
            Stopping: the engine takes no more.
        """
        self.wait_until_ready()
        assert self._scheduler is not None
        self._check(request)
        stream = Stream(self._wake)
        job = Job(request, stream, self._tokenizer, self._model.context_tokens)
        self._scheduler.need_bytes(job)
        with self._changed:
            if self._stopping is not None or not self._thread.is_alive():
                raise Stopping("the engine takes no more requests: it is stopping")
            waiting = len(self._submitted) + self._scheduler.waiting
            idle = max(0, self._limits.places - len(self._scheduler.running))
            if waiting - idle >= self._limits.queue:
                self._refused += 1
                raise QueueFull(f"{waiting} requests wait, which is as many as may", fix="try again later")
            self._submitted.append(job)
            self._changed.notify_all()
        return stream

    @property
    def state(self) -> str:
        """``ok``; ``starting``, ``stopping``; or ``failed``, where nothing is served any more."""
        if self.stopping:
            return "stopping"
        if not self._thread.is_alive():
            return "failed"
        return "ok" if self._scheduler is not None else "starting"

    @property
    def stopping(self) -> bool:
        """Whether no more requests are taken."""
        return self._stopping is not None

    def metrics(self) -> Mapping[str, float]:
        """What was done and is, in plain numbers; empty before the engine is ready."""
        if self._scheduler is None:
            return {}
        with self._changed:
            found = self._scheduler.plain_metrics()
            return {
                **found,
                "waiting": found["waiting"] + len(self._submitted),
                "refused": self._refused,
            }

    def stop(self, seconds: float = 0.0) -> None:
        """Take no more requests, finish those that there are within so many seconds, and end the others."""
        with self._changed:
            self._stopping = time.monotonic() + seconds
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *fault: object) -> None:
        self.stop()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _check(self, request: Request) -> None:
        """Refuse a request that makes no sense."""
        limit, size = self._model.context_tokens, self._tokenizer.vocab_size
        prompt, count = request.prompt, request.max_tokens
        if not prompt or not all(type(token) is int and 0 <= token < size for token in prompt):
            raise UsageError(f"a prompt is token ids from 0 to {size - 1}, one at least")
        require_fit(self._model, len(prompt))
        if (count is None and limit is None) or (count is not None and count < 1):
            raise UsageError(f"max_tokens is {count}, wanted 1 or more")
        if not 0 <= request.seed < 2**32:
            raise UsageError(f"seed is {request.seed}, wanted 0 to {2**32 - 1}")
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
            raise UsageError(f"logprobs is {request.logprobs}, wanted 0 to {MOST_LOGPROBS}")
        checked_stops(request.stop)
        self._selection.check(request.adapter)

    # --- in the engine's thread ---

    def _work(self) -> None:
        try:
            self._scheduler = Scheduler(self._model, self._selection, self._limits)
        except Exception as fault:
            self._fault = fault
            return
        finally:
            self._ready.set()
        while self._next(self._scheduler):
            self._scheduler.step()
        self._scheduler.end_all(CANCELLED)

    def _next(self, scheduler: Scheduler) -> bool:
        """Wait until there is something to do, and take in what was submitted; whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._submitted or scheduler.busy or self._stopping is not None)
            while self._submitted:
                scheduler.add(self._submitted.popleft())
        if self._stopping is None:
            return True
        return scheduler.busy and time.monotonic() < self._stopping
