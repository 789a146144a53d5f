"""The page of a run: plain HTML that says everything, and charts over it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from mlxlora_core.errors import listing
from mlxlora_core.runs.report.answers import questions, verdict
from mlxlora_core.runs.report.facts import Facts
from mlxlora_core.runs.report.html import Html, data, element, join
from mlxlora_core.runs.report.sections import dataset, origins, training, values

SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "report.js")
LICENCES = ("vendor/d3.LICENSE", "vendor/plot.LICENSE")


def page(facts: Facts) -> str:
    """The whole file."""
    scripts = [Html(_asset(name)) for name in SCRIPTS]
    name = facts.record["recipe"]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(scripts)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{name} · mlxlora run"),
        element("style", Html(_asset("report.css"))),
    )
    parts = (verdict, questions, training, dataset, values, origins)
    body = element(
        "body",
        element("main", _head(facts), *(part(facts) for part in parts), _foot(facts)),
        element("script", data(_drawn(facts)), type="application/json", id="figures"),
        *(element("script", script) for script in scripts),
    )
    licences = "".join(f"<!--\n{_asset(name)}-->\n" for name in LICENCES)
    return f"<!DOCTYPE html>\n{licences}{element('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return files("mlxlora_core.runs.report").joinpath(name).read_text("utf-8")


def _policy(scripts: Iterable[str]) -> str:
    """Nothing is fetched, and no script runs but those of this page."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


# --- the top ------------------------------------------------------------------


def _head(facts: Facts) -> Html:
    record = facts.record
    return element(
        "header",
        element("p", "mlxlora run", class_="over"),
        element("h1", record["recipe"]),
        element("p", _in_words(facts), class_="lead"),
        _progress(facts),
    )


def _in_words(facts: Facts) -> Html | str:
    """What came of it, in a sentence or two."""
    summary = facts.record.get("summary")
    if summary is None:
        return "This run has not come to its end."
    said: list[object] = []
    for split, loss in summary["losses"].items():
        if split == "test" or len(summary["losses"]) == 1:
            moved = "fell" if loss["change"] < 0 else "rose"
            said += [
                f"Held-out loss ({split}) ",
                element("strong", f"{moved} by {abs(loss['change']):.0%}"),
                ". ",
            ]
    memory = summary["questions"]["memory"]
    if memory["questions"]:
        marks = memory["first_sentence"]
        said += [
            "Of the questions about rows that it trained on, the tuned model answers ",
            element("strong", f"{marks['after']} of {memory['questions']}"),
            f" with the exact first sentence; the base answered {marks['before'] or 'none'}.",
        ]
    return join(*said) if said else "Nothing was held out and nothing asked."


def _progress(facts: Facts) -> Html | None:
    """Where a run that is not at its end stands."""
    if "summary" in facts.record:
        return None
    stages = facts.record["inputs"]  # in the order in which they are done
    open_stages = [stage for stage in stages if stage not in facts.results]
    done = listing(stage for stage in stages if stage in facts.results)
    steps = facts.recipe["train"]["iters"]
    at_train = facts.train and open_stages[:1] == ["train"]
    place = f" (step {facts.train[-1]['step']} of {steps})" if at_train else ""
    text = (
        f"Done: {done}. To be done: {listing(open_stages)}{place}. This page is made of what is there so far."
    )
    return element("p", text, class_="notice", role="status")


def _foot(facts: Facts) -> Html:
    return element(
        "footer",
        element(
            "p",
            f"Made by mlxlora {facts.record['mlxlora']} from the run folder. Nothing is fetched or sent. "
            "Charts: Observable Plot and D3 (ISC licence, in this file).",
        ),
    )


def _drawn(facts: Facts) -> dict[str, Any]:
    """What the charts are drawn from; numbers and names of splits, nothing else."""
    train = facts.results.get("train", {})
    ends = [
        {"split": split, stage: facts.results[stage]["losses"][split]["loss"]}
        for stage in ("before", "after")
        if stage in facts.results
        for split in facts.results[stage]["losses"]
    ]
    return {
        "steps": facts.recipe["train"]["iters"],
        "warmup": facts.recipe["train"].get("warmup", 0),
        "train": [dict(report) for report in facts.train],
        "valid": [dict(report) for report in facts.valid],
        "ends": ends,
        "lengths": train.get("lengths"),
        "limit": train.get("max_seq_length"),
    }
