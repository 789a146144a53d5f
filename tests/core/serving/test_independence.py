"""What a request gets does not depend on who else is served."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_steps import Served, Steps, alone, among, greedy, ids_of, requests, same, told

from mlxlora_core.plugins import Registry
from mlxlora_core.serving.request import Request


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


@pytest.mark.parametrize("bits", [None, 4])
def test_so_it_does_with_the_runtimes_of_this_machine(
    model_folder: Callable[..., Path],
    adapter_files: Callable[[Path], dict[str, Path]],
    bits: int | None,
) -> None:
    folder = model_folder(bits=bits)
    files = (f"{name}={path}" for name, path in adapter_files(folder).items())
    program = Path(__file__).with_name("independent.py")
    done = subprocess.run([sys.executable, program, folder, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["differ"] == [] and found["texts"] > 10, found
    assert found["widths"], found
