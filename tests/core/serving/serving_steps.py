"""What the tests of serving do with a model: step a scheduler by hand, and read what was told."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.model import adapters, loading
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.several import AdapterSet
from mlxlora_core.plugins import Component, Registry
from mlxlora_core.plugins.sections import configure
from mlxlora_core.serving.job import Job
from mlxlora_core.serving.request import Delta, Request
from mlxlora_core.serving.scheduler import Limits, Scheduler
from mlxlora_core.serving.selection import Selection
from mlxlora_core.serving.stream import Stream
from mlxlora_core.values import Tokenizer

#: name -> (kind, options): of several ranks, on several linears, one that is no low-rank update
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("lora", {"rank": 2}),
    "large": ("lora", {"rank": 7, "targets": ["wq", "wo", "w2"]}),
    "top": ("lora", {"rank": 3, "layers": 1}),
    "turned": ("dora", {"rank": 2}),
}


@dataclass
class Served:
    """A model and its adapters, as an engine takes them."""

    model: LanguageModel
    tokenizer: Tokenizer
    adapters: AdapterSet | None


def greedy(registry: Registry) -> list[tuple[Component, Any]]:
    """The samplers of a text of the most likely tokens."""
    component = registry.find("sampler", "greedy")
    return [(component, component.spec.options())]


def written_adapter(base: Path, path: Path, registry: Registry, kind: str, options: dict[str, Any]) -> Path:
    """A file of an adapter with random values."""
    model = loading.load(base, registry)
    adapted = adapters.attach(model, *configure(registry.find("adapter", kind), options), 0)
    key = mx.random.key(len(path.stem))
    values = {
        name: tensor + 0.2 * mx.random.normal(tensor.shape, key=key)
        for name, tensor in adapters.trainable(model.module).items()
    }
    model.module.load_weights(list(values.items()), strict=False)
    adapters.save(path, model, adapted)
    return path


class Steps:
    """A scheduler that is stepped by hand, and its requests."""

    def __init__(self, served: Served, **limits: Any) -> None:
        settings = {"cache_bytes": 1 << 28, **limits}
        self.served = served
        self.scheduler = Scheduler(served.model, Selection(served.adapters), Limits(**settings))

    def submit(self, request: Request) -> Job:
        """A request that waits for a place."""
        job = Job(request, Stream(), self.served.tokenizer, self.served.model.context_tokens)
        self.scheduler.add(job)
        return job

    def run(self, most: int = 10_000) -> int:
        """Step until nothing is left to do, and tell how many steps that took."""
        for count in range(most):
            if not self.scheduler.busy:
                return count
            self.scheduler.step()
        raise AssertionError(f"{most} steps were not enough")


def told(job: Job) -> list[Delta]:
    """All that the caller of a job was told."""
    parts = []
    while True:
        try:
            parts.append(job.stream.get(timeout=0))
        except (TimeoutError, EOFError):
            return parts


def ids_of(parts: Sequence[Delta]) -> list[int]:
    """The ids of all tokens."""
    return [token.id for part in parts for token in part.tokens]


# --- requests that are served alone and among others ---

NAMES = (None, *ADAPTERS)


def prompts(draw: random.Random, count: int) -> list[list[int]]:
    """Prompts of many lengths, some of which begin alike."""
    alike = [draw.randrange(3, 320) for _ in range(70)]
    return [
        alike[: draw.randrange(0, 70)] + [draw.randrange(3, 320) for _ in range(draw.randrange(1, 60))]
        for _ in range(count)
    ]


def requests(registry: Registry, count: int, seed: int) -> list[Request]:
    """Requests under all adapters, half of them with the most likely tokens and half with others."""
    draw = random.Random(seed)
    return [
        Request(
            prompt,
            adapter=NAMES[number % len(NAMES)],
            samplers=greedy(registry) if number % 2 else (),
            seed=number,
            max_tokens=draw.randrange(1, 40),
            logprobs=2,
        )
        for number, prompt in enumerate(prompts(draw, count))
    ]


def alone(served: Served, request: Request, **limits: Any) -> list[Delta]:
    """What a request gets with nobody else."""
    steps = Steps(served, **limits)
    job = steps.submit(request)
    steps.run()
    return told(job)


def among(served: Served, asked: list[Request], seed: int, **limits: Any) -> list[list[Delta]]:
    """What requests get that come at any time while others are served, and others are ended."""
    steps, draw = Steps(served, **limits), random.Random(seed)
    waiting, jobs = list(asked), dict[int, Job]()
    spare: list[Job] = []
    while waiting or steps.scheduler.busy:
        while waiting and draw.random() < 0.5:
            request = waiting.pop(0)
            jobs[id(request)] = steps.submit(request)
            if draw.random() < 0.3:  # somebody who leaves again
                spare.append(steps.submit(request))
        if spare and draw.random() < 0.1:
            spare.pop().stream.cancel()
        steps.scheduler.step()
    return [told(jobs[id(request)]) for request in asked]


def same(got: list[Delta], want: list[Delta]) -> bool:
    """Whether text, tokens and log-probabilities are the same to the last bit, and so is the end."""
    return (
        "".join(part.text for part in got) == "".join(part.text for part in want)
        and [token for part in got for token in part.tokens]
        == [token for part in want for token in part.tokens]
        and got[-1].finish == want[-1].finish
    )
