"""``prompts -> their texts``, many at once, in the thread of whoever asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlxlora_core.errors import MlxloraError
from mlxlora_core.model.generate import Segment, follow, require_fit, whole
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.memory import room_for_prompt
from mlxlora_core.plugins import Component
from mlxlora_core.serving.job import Job
from mlxlora_core.serving.request import Delta, Request
from mlxlora_core.serving.scheduler import Limits, Scheduler
from mlxlora_core.serving.selection import Selection
from mlxlora_core.serving.stream import Stream
from mlxlora_core.values import Tokenizer


def follow_all(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Iterable[Sequence[int]],
    samplers: Sequence[tuple[Component, Any]],
    *,
    num_tokens: int,
    seed: int,
    limits: Limits | None = None,
) -> Iterator[Segment]:
    """The whole text behind each of many prompts, in their order, as each gets it with nobody else.

    Texts share steps where that changes no bit of them. Where it would, and where keys and values of one
    need more memory than those of all may have, a text is continued as
    :func:`~mlxlora_core.model.generate.follow` does.

    Args:
        model: with or without an adapter on it, which all rows of a batch are computed with.
        tokenizer: of the model.
        prompts: ids of each, one at least, taken as there are places for them.
        samplers: how tokens of each are drawn, each text by samplers of its own.
        num_tokens: of each text at most.
        seed: of each text.
        limits: how much is done at once.

    Raises:
        PromptTooLong: a prompt does not fit into the model's context.
        MlxloraError: as ``follow`` raises, once the texts before it are told.
    """
    scheduler: Scheduler | None = None
    jobs: deque[Job] = deque()
    for prompt in prompts:
        require_fit(model, len(prompt))
        scheduler = scheduler or Scheduler(model, Selection(None), limits or Limits())
        asked = Request(prompt, samplers=samplers, seed=seed, max_tokens=num_tokens)
        job = Job(asked, Stream(), tokenizer, model.context_tokens)
        if scheduler.widths and scheduler.has_room(job):
            jobs.append(job)
            scheduler.add(job)
            yield from _told(scheduler, jobs, scheduler.widths[-1] - 1)  # a second batch would be half empty
        else:
            yield from _told(scheduler, jobs, 0)
            part, _ = room_for_prompt(model, len(prompt), num_tokens)
            rest = (model, tokenizer, prompt, samplers)
            yield whole(follow(*rest, num_tokens=num_tokens, seed=seed, part_tokens=part))
    if scheduler is not None:
        yield from _told(scheduler, jobs, 0)


def _told(scheduler: Scheduler, jobs: deque[Job], most: int) -> Iterator[Segment]:
    """The texts that end, in their order, until no more than so many have not."""
    while scheduler.waiting + len(scheduler.running) > most:
        scheduler.step()
        while jobs and jobs[0].finish is not None:
            yield _text(jobs.popleft())


def _text(job: Job) -> Segment:
    """The text of a job that has ended.

    Raises:
        MlxloraError: it has ended in one.
    """
    parts: list[Delta] = []
    while not parts or parts[-1].finish is None:
        parts.append(job.stream.get())
    error = parts[-1].error
    if error is not None:
        # Whose fault it is shows in the exception itself, and not in what a caller far away is told.
        raise error.__cause__ if type(error) is MlxloraError and error.__cause__ else error
    return Segment("".join(part.text for part in parts), job.finish)
