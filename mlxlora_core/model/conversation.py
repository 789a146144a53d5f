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
    """Questions and answers; what was computed of them is kept for the next question.

    Args:
        adapters: on the model that is talked to.

    Attributes:
        adapter: the name of that which answers, or None for the base alone.
        system: the message in front, or nothing.
        turns: messages of ``user`` and ``assistant`` in turn.
    """

    def __init__(self, adapters: AdapterSet, adapter: str | None = None, system: str = "") -> None:
        self.adapter, self.system = adapter, system
        self.turns: list[dict[str, str]] = []
        self._adapters = adapters
        self._caches: dict[str | None, PromptCache] = {}

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, where there is one, and the turns."""
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
        """The answer to a question, which goes on from what was computed of the turns before.

        An answer that is left in the middle, by closing this iterator, is a turn as far as it has
        come; where nothing has, the question was never asked.

        Args:
            question: what the user says.
            samplers: how tokens are drawn, as for :func:`~mlxlora_core.model.generate.generate`.
            num_tokens: how many at most.
            seed: of the random keys.
            stop: texts before which the answer ends.

        Yields:
            Segments, without text between the parts in which what is new is read.

        Raises:
            UsageError: the tokenizer's form cannot say it, or it does not fit into the context.
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
        """Begin anew, behind the same system message."""
        self.turns = []


def _later(segment: Segment, seconds: float) -> Segment:
    """A segment whose text took so much more before its first token."""
    spent = segment.spent
    if spent is None:
        return segment
    longer = {name: getattr(spent, name) + seconds for name in ("first_seconds", "seconds")}
    return replace(segment, spent=replace(spent, **longer))
