"""What is done in which step, and what is left when requests have gone."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from serving_steps import Served, Steps, alone, greedy, ids_of, same, told

from mlxlora_core.errors import DivergedError, PluginError, ResourceError
from mlxlora_core.model.generate import decode, generate, whole
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.plugins import Component, Plugin, Registry
from mlxlora_core.serving.job import most_likely
from mlxlora_core.serving.request import Request
from mlxlora_core.specs import Sampler

EOS = 2


def sampler(transform: Any) -> list[tuple[Component, Any]]:
    """A sampler of somebody who gives ``transform``."""
    spec = Sampler(name="mine", summary="s", build=lambda options: transform)
    return [(Component("sampler", spec, Plugin("box", "box", "1", "installed", "box")), None)]


def scripted(ids: Sequence[int]) -> list[tuple[Component, Any]]:
    """A sampler that leaves these ids, one after the other."""
    rest = iter(ids)

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == next(rest), 0.0, mx.full(logits.shape, -mx.inf))

    return sampler(transform)


def unending() -> list[tuple[Component, Any]]:
    """A sampler that leaves every token but the end."""
    return sampler(lambda logits, tokens: mx.where(mx.arange(logits.shape[-1]) == EOS, -mx.inf, logits))


def test_the_text_is_what_generate_gives(served: Served, registry: Registry) -> None:
    assert served.adapters is not None
    prompt = "A: the adapter scales"
    for name in (None, "large", "turned"):
        served.adapters.select(name)
        settings = {"num_tokens": 25, "seed": 0}
        want = whole(generate(served.model, served.tokenizer, prompt, greedy(registry), **settings))
        steps = Steps(served)
        ids = served.tokenizer.encode(prompt)
        job = steps.submit(Request(ids, adapter=name, samplers=greedy(registry), max_tokens=25))
        steps.run()
        parts = told(job)
        assert "".join(part.text for part in parts) == want.text
        assert parts[-1].finish == want.finish


def test_a_sampler_that_asks_is_given_the_tokenizer_of_the_model(served: Served) -> None:
    seen: list[Any] = []

    def build(options: Any, tokenizer: Any) -> Any:
        seen.append(tokenizer)
        return lambda logits, tokens: logits

    spec = Sampler(name="asks", summary="s", build=build)
    asks = Component("sampler", spec, Plugin("box", "box", "1", "installed", "box"))
    steps = Steps(served)
    job = steps.submit(Request([5, 6], samplers=[(asks, None)], max_tokens=2))
    steps.run()
    assert seen == [served.tokenizer] and told(job)[-1].finish == "length"


# --- steps --------------------------------------------------------------------


def test_a_request_that_comes_later_has_its_first_token_within_two_steps(served: Served) -> None:
    steps = Steps(served)
    others = [steps.submit(Request([5, 6, 7 + n], max_tokens=60)) for n in range(15)]
    for _ in range(10):
        steps.scheduler.step()
    drawn = [job.drawn for job in others]
    late = steps.submit(Request([9, 8, 7], max_tokens=5))
    for count in (1, 2):
        steps.scheduler.step()
        assert [job.drawn - before for job, before in zip(others, drawn, strict=True)] == [count] * 15
    assert late.drawn > 0


def test_a_long_prompt_is_read_beside_texts_that_go_on(served: Served) -> None:
    steps = Steps(served, part_tokens=16, step_tokens=32)
    other = steps.submit(Request([5, 6], max_tokens=30))
    steps.scheduler.step()
    long = steps.submit(Request([5] * 100, max_tokens=3))
    short = steps.submit(Request([6, 7], max_tokens=3))
    seen = []
    for _ in range(7):
        before = other.drawn
        steps.scheduler.step()
        seen.append((long.read, short.drawn > 0))
        assert other.drawn == before + 1
    assert seen[0] == (16, True), "the prompt behind the long one is not held up"
    assert [read for read, _ in seen] == [16, 32, 48, 64, 80, 96, 100]


def test_first_tokens_come_in_the_order_of_the_requests(served: Served) -> None:
    steps = Steps(served, places=3)
    jobs = [steps.submit(Request([5, 6 + n], max_tokens=4)) for n in range(10)]
    steps.run()
    firsts = [job.first for job in jobs]
    assert firsts == sorted(firsts) and all(firsts)


def test_no_more_run_at_once_than_there_are_places(served: Served) -> None:
    steps = Steps(served, places=3)
    for n in range(8):
        steps.submit(Request([5, 6 + n], max_tokens=2 + n))
    while steps.scheduler.busy:
        steps.scheduler.step()
        assert len(steps.scheduler.running) <= 3


# --- ends ---------------------------------------------------------------------


def test_each_way_to_end_is_told(
    served: Served, tokenizer: CheckedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 64
    monkeypatch.setattr(served.model, "context_tokens", limit)
    eos = next(iter(tokenizer.stops))
    letters = tokenizer.encode("scales the weights", bos=False)
    steps = Steps(served)
    asked = {
        "stop": Request([5], samplers=scripted([*letters, eos]), max_tokens=50),
        "length": Request([5], max_tokens=3),
        "context": Request([5] * (limit - 4), samplers=scripted([50] * 9)),
        "cancelled": Request([5], samplers=scripted([50] * 90), max_tokens=80),
        "timeout": Request([5], samplers=scripted([50] * 90), max_tokens=80, deadline=1e-9),
    }
    jobs = {name: steps.submit(request) for name, request in asked.items()}
    halted = steps.submit(Request([5], samplers=scripted([*letters, eos]), stop=["weigh"], max_tokens=50))
    jobs["cancelled"].stream.cancel()
    steps.run()
    parts = {name: told(job) for name, job in jobs.items()}
    assert {name: each[-1].finish for name, each in parts.items()} == {name: name for name in asked}
    usage = parts["stop"][-1].usage
    assert usage is not None and usage.completion_tokens == len(letters)
    assert len(ids_of(parts["context"])) == 4
    ended = told(halted)
    assert ended[-1].finish == "stop"
    assert "".join(part.text for part in ended) == " scales the "


def test_a_deadline_ends_what_runs_and_what_waits(served: Served) -> None:
    steps = Steps(served, places=1)
    running = steps.submit(Request([5], samplers=scripted([50] * 90), max_tokens=80, deadline=0.2))
    waiting = steps.submit(Request([5], max_tokens=80, deadline=0.2))
    steps.scheduler.step()
    time.sleep(0.25)
    steps.scheduler.step()
    assert not steps.scheduler.busy
    assert told(running)[-1].finish == told(waiting)[-1].finish == "timeout"
    assert waiting.drawn == 0 < running.drawn


def test_an_error_ends_one_request_and_no_other(served: Served) -> None:
    def nothing(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        return mx.full(logits.shape, -mx.inf) if len(tokens) > 4 else logits

    steps = Steps(served)
    bad = steps.submit(Request([5, 6], samplers=sampler(nothing), max_tokens=9))
    good = steps.submit(Request([5, 6], max_tokens=9, samplers=scripted([50] * 9)))
    steps.run()
    last = told(bad)[-1]
    assert last.finish == "error" and isinstance(last.error, PluginError)
    assert ids_of(told(good)) == [50] * 9


def test_a_batch_that_fails_ends_its_requests_and_the_next_are_served(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(served)
    one = steps.submit(Request([5, 6], max_tokens=9))
    steps.scheduler.step()

    def fails(*arguments: Any, **named: Any) -> None:
        raise DivergedError("no")

    with monkeypatch.context() as changed:
        changed.setattr("mlxlora_core.serving.lanes.logits_of_rows", fails)
        steps.run()
    assert isinstance(told(one)[-1].error, DivergedError)
    two = steps.submit(Request([5, 6], max_tokens=9))
    steps.run()
    assert told(two)[-1].finish in ("length", "stop")


@pytest.mark.parametrize("count", [0, 1, 4, 20, 500, 900])
def test_the_most_likely_are_those_of_a_stable_sort(count: int) -> None:
    draw = np.random.default_rng(count)
    for values in (draw.normal(size=500), draw.integers(0, 9, 500) * 1.0, np.full(500, -np.inf)):
        want = sorted(range(500), key=lambda token: (-values[token], token))[:count]
        assert most_likely(values, count).tolist() == want


def test_logprobs_are_those_of_the_logits(served: Served, registry: Registry) -> None:
    assert served.adapters is not None
    steps = Steps(served)
    job = steps.submit(Request([5, 6, 7], samplers=greedy(registry), max_tokens=4, logprobs=3))
    steps.run()
    tokens = [token for part in told(job) for token in part.tokens]
    served.adapters.select(None)
    ids = mx.array([[5, 6, 7, *(token.id for token in tokens)]])
    logits = served.model(ids)[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for place, token in enumerate(tokens):
        want = logprobs[2 + place]
        assert token.logprob == pytest.approx(float(want[token.id]), abs=1e-4)
        assert token.top[0] == (token.id, token.logprob)
        assert [i for i, _ in token.top] == mx.argsort(-want)[:3].tolist()


# --- the first token ----------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 128])
def test_a_free_place_gives_a_first_token_within_two_steps(served: Served, tokens: int) -> None:
    """Whatever else there is to do: 15 places are taken by texts, and by prompts that take many steps."""
    for reading in (0, 8, 15):
        steps = Steps(served)
        for n in range(15 - reading):
            steps.submit(Request([5, n], samplers=unending(), max_tokens=900))
        steps.scheduler.step()
        for n in range(reading):
            steps.submit(Request([5 + n] * 2000, max_tokens=1))
        leaving = steps.submit(Request([6], samplers=unending(), max_tokens=900))
        waiting = steps.submit(Request([7] * tokens, max_tokens=1))
        for _ in range(3):
            steps.scheduler.step()
        assert waiting.drawn == 0
        leaving.stream.cancel()
        for _ in range(2):
            steps.scheduler.step()
        assert waiting.drawn == 1


def test_so_do_prompts_of_one_part_that_come_to_all_places_at_once(served: Served) -> None:
    steps = Steps(served)
    jobs = [steps.submit(Request([5 + n] * 128, max_tokens=3)) for n in range(16)]
    for _ in range(2):
        steps.scheduler.step()
    assert all(job.drawn for job in jobs)


def test_short_prompts_do_not_hold_up_a_long_one_forever(served: Served) -> None:
    steps = Steps(served, part_tokens=16, step_tokens=16, places=4)
    long = steps.submit(Request([5] * 160, max_tokens=1))
    for n in range(10):
        for m in range(3):
            steps.submit(Request([7 + n, 7 + m] * 8, max_tokens=1))
        steps.scheduler.step()
    assert long.finish is not None


# --- memory -------------------------------------------------------------------


def test_a_request_that_never_fits_is_refused_in_one_line(served: Served) -> None:
    steps = Steps(served, cache_bytes=1000)
    with pytest.raises(ResourceError, match=r"^a prompt of 2 tokens and 5 after it need") as caught:
        steps.submit(Request([5, 6], max_tokens=5))
        steps.scheduler.step()
    assert "\n" not in str(caught.value)


def test_requests_wait_for_memory(served: Served) -> None:
    steps = Steps(served)
    one = steps.submit(Request([5], max_tokens=4))
    need = steps.scheduler.need_bytes(one)
    steps.run()
    narrow = Steps(served, cache_bytes=int(2.5 * need / 0.75))
    jobs = [narrow.submit(Request([5, 6 + n], max_tokens=5)) for n in range(6)]
    most = 0
    while narrow.scheduler.busy:
        narrow.scheduler.step()
        most = max(most, len(narrow.scheduler.running))
    assert most == 2
    assert all(told(job)[-1].finish for job in jobs)


def test_what_has_a_place_can_end_though_memory_is_not_reserved_for_all_that_may_come(served: Served) -> None:
    asked = [Request([5, 6 + n], samplers=unending(), seed=n, max_tokens=300, logprobs=0) for n in range(6)]
    need = Steps(served).scheduler.need_bytes(Steps(served).submit(asked[0]))
    narrow = Steps(served, cache_bytes=int(2.5 * need / 0.75))
    jobs = [narrow.submit(request) for request in asked]
    scheduler, most, aside = narrow.scheduler, 0, 0
    for _ in range(3000):  # enough for one text after another
        if not scheduler.busy:
            break
        scheduler.step()
        metrics = scheduler.plain_metrics()
        assert metrics["reserved_bytes"] <= metrics["cache_bytes"]
        most, aside = max(most, len(scheduler.running)), max(aside, int(metrics["aside"]))
    assert not scheduler.busy, "none can go on"
    assert most > 2 and aside > 0, "all that may come fits twice"
    for request, job in zip(asked, jobs, strict=True):
        parts = told(job)
        assert parts[-1].finish == "length"
        assert same(parts, alone(served, request))


def test_who_is_put_aside_can_leave(served: Served) -> None:
    asked = [Request([5], samplers=unending(), seed=n, max_tokens=300) for n in range(4)]
    need = Steps(served).scheduler.need_bytes(Steps(served).submit(asked[0]))
    narrow = Steps(served, cache_bytes=int(1.9 * need / 0.75))
    jobs = [narrow.submit(request) for request in asked]
    while not narrow.scheduler.plain_metrics()["aside"]:
        narrow.scheduler.step()
    for job in jobs:
        job.stream.cancel()
    narrow.scheduler.step()
    assert not narrow.scheduler.busy
    assert narrow.scheduler.plain_metrics()["finished_cancelled"] == 4


def test_a_thousand_requests_that_leave_at_any_time_leave_nothing(served: Served) -> None:
    steps, draw = Steps(served, part_tokens=16, places=8, cache_bytes=1 << 22), random.Random(0)
    jobs, told_of, sizes = [], 0, []
    for number in range(1000):
        request = Request(
            [draw.randrange(3, 320) for _ in range(draw.randrange(1, 40))],
            adapter=draw.choice([None, "small", "large", "turned"]),
            seed=number,
            max_tokens=draw.randrange(1, 6),
            deadline=draw.choice([None, 0.005]),
        )
        jobs.append(steps.submit(request))
        if draw.random() < 0.4:
            draw.choice(jobs).stream.cancel()
        if number % 3 == 0:
            steps.scheduler.step()
        if len(jobs) > 20:
            told_of += sum(job.finish is not None for job in jobs)
            jobs = [job for job in jobs if job.finish is None]
        if number % 100 == 99:
            steps.run()
            gc.collect()
            sizes.append(mx.get_active_memory())
    steps.run()
    assert told_of + sum(job.finish is not None for job in jobs) == 1000
    metrics = steps.scheduler.plain_metrics()
    assert metrics["running"] == metrics["waiting"] == metrics["reserved_bytes"] == 0
    assert sum(value for name, value in metrics.items() if name.startswith("finished_")) == 1000
    assert metrics["prefix_bytes"] <= 1 << 20
    assert max(sizes[3:]) - min(sizes[3:]) < 1 << 16, sizes


# --- models -------------------------------------------------------------------


def test_a_model_that_knows_only_its_own_cache_is_served_one_text_after_another(
    stand_in: Callable[..., Any], tokenizer: CheckedTokenizer, registry: Registry
) -> None:
    model = stand_in(vocab_size=320)
    steps = Steps(Served(model, tokenizer, None), part_tokens=4)
    assert steps.scheduler.widths == ()
    prompts = [[5 + n] * (n + 1) for n in range(7)]
    jobs = [
        steps.submit(Request(p, samplers=greedy(registry), max_tokens=6 + n)) for n, p in enumerate(prompts)
    ]
    steps.run()
    for number, job in enumerate(jobs):

        def most_likely(logits: mx.array, tokens: Sequence[int]) -> int:
            return int(mx.argmax(logits[0]))

        limit = {"num_tokens": 6 + number, "stops": tokenizer.stops, "part_tokens": 4}
        assert ids_of(told(job)) == list(decode(model, prompts[number], most_likely, **limit))


@pytest.mark.parametrize(
    "shake",
    [
        lambda logits: logits * (1 + 1e-6 * mx.arange(len(logits))[:, None]),
        lambda logits: logits + 1e-3 * mx.max(logits, axis=0),
    ],
    ids=["place", "others"],
)
def test_where_rows_change_with_places_or_others_texts_are_continued_one_by_one(
    served: Served, monkeypatch: pytest.MonkeyPatch, shake: Callable[[mx.array], mx.array]
) -> None:
    from mlxlora_core.serving import lanes, widths

    monkeypatch.setattr(widths, "logits_of_rows", lambda *arguments: shake(lanes.logits_of_rows(*arguments)))
    steps = Steps(served)
    assert steps.scheduler.widths == ()
    job = steps.submit(replace(Request([5, 6]), max_tokens=3))
    steps.run()
    assert told(job)[-1].finish in ("length", "stop")
