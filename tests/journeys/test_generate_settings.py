"""How ``generate`` draws tokens and where its texts end: on the command line and in Python."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlxlora_core

Command = Callable[..., Any]

PROMPT = "A layer"


def said(mlxlora: Command, model: Path, *more: object) -> dict[str, Any]:
    """What --json tells of a text."""
    done = mlxlora("generate", "--model", model, "-p", PROMPT, "-n", 24, *more, "--json")
    assert done.code == 0, done.err
    result: dict[str, Any] = json.loads(done.out)
    return result


@pytest.mark.parametrize(
    ("settings", "chain"),
    [
        (["--top-p", 0.6], ["--sampler", "top-p", "--set", "sampler.p=0.6"]),
        (["--top-k", 5, "--temp", 2], ["--sampler", "top-k", "--set", "sampler.k=5", "--temp", 2]),
        (
            ["--min-p", 0.2, "--presence-penalty", 1.5, "--temp", 1.3],
            [
                *("--sampler", "presence-penalty,min-p", "--temp", 1.3),
                *("--set", "sampler.penalty=1.5", "--set", "sampler.p=0.2"),
            ],
        ),
        (
            ["--repetition-penalty", 1.4, "--temp", 0],
            ["--sampler", "repetition-penalty,temperature", "--set", "sampler.penalty=1.4", "--temp", 0],
        ),
        (["--top-p", 0.6], ["--sampler", "top-p", "--top-p", 0.6]),
    ],
)
def test_settings_are_short_for_samplers(
    mlxlora: Command, tiny_model: Path, settings: list[object], chain: list[object]
) -> None:
    short, long = said(mlxlora, tiny_model, *settings), said(mlxlora, tiny_model, *chain)
    assert short["text"] == long["text"] != said(mlxlora, tiny_model)["text"]


def test_python_says_the_same(mlxlora: Command, tiny_model: Path) -> None:
    flags = ("--top-k", 30, "--top-p", 0.9, "--min-p", 0.01, "--frequency-penalty", 0.7, "--temp", 1.1)
    plain = said(mlxlora, tiny_model, *flags)
    stop = plain["text"][8:11]
    verb = said(mlxlora, tiny_model, *flags, "--stop", "never\n", "--stop", stop)
    model = mlxlora_core.load(tiny_model)
    settings: dict[str, Any] = {
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "frequency_penalty": 0.7,
        "temp": 1.1,
    }
    *_, last = segments = list(
        mlxlora_core.stream(model, PROMPT, num_tokens=24, stop=["never\n", stop], **settings)
    )
    text = "".join(segment.text for segment in segments)
    assert text == verb["text"] == plain["text"][: plain["text"].index(stop)]
    assert (last.finish, last.stop) == (verb["finish"], verb["stop"]) == ("stop", stop)
    assert last.spent is not None and last.spent.tokens == verb["tokens"] < plain["tokens"]
    assert mlxlora_core.generate(model, PROMPT, num_tokens=24, stop=stop, **settings) == text


def test_it_says_what_a_text_took_and_why_it_ended(mlxlora: Command, tiny_model: Path) -> None:
    told = said(mlxlora, tiny_model)
    assert told["finish"] == "length" and told["stop"] is None and told["tokens"] == 24
    assert told["prompt_tokens"] > 1 and 0 < told["first_seconds"] <= told["seconds"]
    assert told["tokens_per_second"] > 0
    stop = told["text"][4:6]
    done = mlxlora("generate", "--model", tiny_model, "-p", PROMPT, "-n", 24, "--stop", stop)
    assert done.out == told["text"][: told["text"].index(stop)] + "\n"
    assert re.search(
        rf"\d+ tokens? in \S+ s, the first after \S+ s, \S+ tokens/s; ended before {stop!r}", done.err
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--sampler", "greedy", "--top-p", 0.5],
            "--top-p belongs to the sampler top-p, but --sampler names greedy",
        ),
        (["--top-p", 2], "sampler 'top-p' option 'p': must be more than 0 and at most 1, got 2.0"),
        (["--top-k", "many"], "sampler 'top-k' option 'k': wanted"),
        (["--presence-penalty", "nan"], "sampler 'presence-penalty' option 'penalty'"),
        (["--stop", ""], "a text to stop at is ''"),
    ],
)
def test_what_makes_no_sense_is_told_before_the_model_is_read(
    mlxlora: Command, tmp_path: Path, options: list[object], words: str
) -> None:
    done = mlxlora("generate", "--model", tmp_path / "absent", "-p", PROMPT, *options)
    assert done.code == 2 and words in done.error
