"""What a request gets does not depend on who else is served."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from serving_steps import ADAPTERS, Served, Steps, greedy, ids_of, told

from mlxlora_core.plugins import Registry
from mlxlora_core.serving.job import Job
from mlxlora_core.serving.request import Delta, Request

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


@pytest.mark.parametrize("limits", [{}, {"part_tokens": 16, "step_tokens": 32, "places": 5}])
def test_a_request_gets_the_same_alone_and_among_sixteen_others(
    served: Served, registry: Registry, limits: dict[str, Any]
) -> None:
    asked = requests(registry, 17, seed=1)
    got = among(served, asked, seed=2, **limits)
    for number, request in enumerate(asked):
        assert same(got[number], alone(served, request, **limits)), f"request {number}"
    assert len({tuple(ids_of(parts)) for parts in got}) > 10, "or all texts are alike, and this shows little"


def test_so_it_does_with_packed_weights(make_served: Callable[..., Served], registry: Registry) -> None:
    served = make_served(("small", "large", "top"), bits=4)
    asked = [request for request in requests(registry, 17, seed=3) if request.adapter != "turned"]
    got = among(served, asked, seed=4)
    for number, request in enumerate(asked):
        assert same(got[number], alone(served, request)), f"request {number}"


def test_what_is_kept_of_other_prompts_changes_nothing(served: Served, registry: Registry) -> None:
    prompt = [5 + number % 300 for number in range(90)]
    request = Request(prompt, adapter="small", samplers=greedy(registry), max_tokens=12, logprobs=1)
    want = alone(served, request, part_tokens=16)
    steps = Steps(served, part_tokens=16)
    first = steps.submit(Request(prompt[:70], adapter="small", max_tokens=1))
    other = steps.submit(Request(prompt, adapter="large", max_tokens=1))
    steps.run()
    again = steps.submit(request)
    steps.run()
    got = told(again)
    assert same(got, want)
    usage = got[-1].usage
    assert usage is not None and usage.cached_tokens == 64
    for job in (first, other):
        usage = told(job)[-1].usage
        assert usage is not None and usage.cached_tokens == 0, "an adapter shares nothing with another"


def test_a_seed_decides_what_is_drawn(served: Served) -> None:
    texts = [ids_of(alone(served, Request([5, 6, 7], seed=seed, max_tokens=20))) for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
