"""A conversation with a model, with or without one of several adapters on it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any

from mlxlora_core.model.generate import Segment, fitting_ids, follow
from mlxlora_core.model.memory import room_for_prompt
from mlxlora_core.model.prompt_cache import PromptCache
from mlxlora_core.model.several import AdapterSet
from mlxlora_core.plugins import Component


class Conversation:
    """Questions and answers, with a cache that the next question reuses.

    Args:
        adapters: those on the model.

    Attributes:
        adapter: the name of the one that answers, or None for the base.
        system: the system message, or nothing.
        turns: alternating messages of ``user`` and ``assistant``.
    """

    def __init__(self, adapters: AdapterSet, adapter: str | None = None, system: str = "") -> None:
        self.adapter, self.system = adapter, system
        self.turns: list[dict[str, str]] = []
        self._adapters = adapters
        self._caches: dict[str | None, PromptCache] = {}

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, if there is one, and the turns."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(
        self,
        question: str,
        samplers: Iterable[tuple[Component, Any]],
        *,
        num_tokens: int,
        seed: int,
        stop: Sequence[str] = (),
    ) -> Generator[Segment, None, None]:
        """The answer to a question, reusing the cache of the turns before.

        If this iterator is closed early, the answer so far becomes the turn; if there is none yet, the
        question counts as never asked.

        Args:
            question: what the user says.
            samplers: how tokens are drawn, as for :func:`~mlxlora_core.model.generate.generate`.
            num_tokens: the most tokens to generate.
            seed: of the random keys.
            stop: texts before which the answer ends.

        Yields:
            Segments; first some without text, one after each part of the prompt is read.

        Raises:
            UsageError: the chat format cannot express it, or it does not fit into the context.
            MlxloraError: as :func:`~mlxlora_core.model.generate.generate`.
        """
        self._adapters.select(self.adapter)
        base, asked = self._adapters.model, {"role": "user", "content": question}
        started = time.perf_counter()
        ids = fitting_ids(base.language_model, base.tokenizer, [*self.messages, asked])
        part, _ = room_for_prompt(base.language_model, len(ids), num_tokens)
        kept = self._caches.setdefault(self.adapter, PromptCache())
        for _ in kept.read(base.language_model, ids, part):
            yield Segment("")
        before, answer = time.perf_counter() - started, {"role": "assistant", "content": ""}
        segments = follow(
            *(base.language_model, base.tokenizer, ids, samplers),
            num_tokens=num_tokens,
            seed=seed,
            stop=stop,
            kept=kept,
        )
        for segment in segments:
            if not self.turns or self.turns[-1] is not answer:
                self.turns += [asked, answer]
            answer["content"] += segment.text
            yield _later(segment, before)

    def forget(self) -> None:
        """Start over, with the same system message."""
        self.turns = []


def _later(segment: Segment, seconds: float) -> Segment:
    """A segment with so many seconds added to the time before its first token."""
    spent = segment.spent
    if spent is None:
        return segment
    longer = {name: getattr(spent, name) + seconds for name in ("first_seconds", "seconds")}
    return replace(segment, spent=replace(spent, **longer))
