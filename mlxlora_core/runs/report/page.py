"""The page of a run: plain HTML that says everything, and charts over it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from mlxlora_core.errors import listing
from mlxlora_core.runs.report.answers import questions, verdict
from mlxlora_core.runs.report.curves import thinned
from mlxlora_core.runs.report.facts import Facts
from mlxlora_core.runs.report.html import Html, data, element, join
from mlxlora_core.runs.report.parts import in_nats
from mlxlora_core.runs.report.sections import dataset, origins, training, values

SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "report.js")
#: what every report holds, one of the two; the second stood in those of before
MARKS = (b'<meta name="generator" content="mlxlora">', " · mlxlora run</title>".encode())
LICENCES = ("vendor/d3.LICENSE", "vendor/plot.LICENSE")


def page(facts: Facts) -> str:
    """The whole file."""
    scripts = [Html(_asset(name)) for name in SCRIPTS]
    name = facts.record["recipe"]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(scripts)),
        element("meta", name="generator", content="mlxlora"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{name} · {_verb(facts)}"),
        element("style", Html(_asset("report.css"))),
    )
    parts = (
        (verdict, questions, training, dataset, values, origins)
        if facts.is_run
        else (training, values, origins)
    )
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
        element("p", _verb(facts), class_="over"),
        element("h1", record["recipe"]),
        element("p", _in_words(facts), class_="lead"),
        _progress(facts),
        _unread(facts),
    )


def _verb(facts: Facts) -> str:
    return "mlxlora run" if facts.is_run else "mlxlora train"


def _in_words(facts: Facts) -> Html | str:
    """What came of it, in a sentence or two."""
    if not facts.is_run:
        return _in_losses(facts)
    summary = facts.record.get("summary")
    if summary is None:
        return "This run has not come to its end."
    said: list[object] = []
    for split, loss in summary["losses"].items():
        if split == "test" or len(summary["losses"]) == 1:
            said += [f"Held-out loss ({split}) ", element("strong", _moved(loss)), ". "]
    memory = summary["questions"]["memory"]
    if memory["questions"]:
        marks = memory["first_sentence"]
        said += [
            "Of the questions about rows that it trained on, the tuned model answers ",
            element("strong", f"{marks['after']} of {memory['questions']}"),
            f" with the exact first sentence; the base answered {marks['before'] or 'none'}.",
        ]
    return join(*said) if said else "Nothing was held out and nothing asked."


def _in_losses(facts: Facts) -> str:
    """How the losses of a training that no run is around have moved."""
    said = [
        f"The {name} loss went from {in_nats(reports[0]['loss'])} to {in_nats(reports[-1]['loss'])}."
        for name, reports in (("training", facts.train), ("validation", facts.valid))
        if reports
    ]
    return " ".join(said) or "No step has been reported yet."


def _moved(loss: Mapping[str, Any]) -> str:
    """``fell by 12%``, of a loss before and after."""
    fell = loss["after"] < loss["before"]
    if loss["change"] is None or abs(loss["change"]) > 1:
        return f"{'fell' if fell else 'rose'} from {in_nats(loss['before'])} to {in_nats(loss['after'])}"
    return f"{'fell' if fell else 'rose'} by {abs(loss['change']):.0%}"


def _unread(facts: Facts) -> Html | None:
    """What is in the folder and not on the page."""
    if not facts.faults:
        return None
    return element(
        "div",
        element("p", "Some of the run folder could not be read and is not on this page:"),
        element("ul", *(element("li", fault) for fault in facts.faults)),
        class_="notice",
        role="status",
    )


def _progress(facts: Facts) -> Html | None:
    """Where a run that is not at its end stands."""
    if "summary" in facts.record or (not facts.is_run and "train" in facts.results):
        return None
    stages = facts.record["inputs"]  # in the order in which they are done
    open_stages = [stage for stage in stages if stage not in facts.results]
    done = listing(stage for stage in stages if stage in facts.results)
    at_train = facts.train and open_stages[:1] == ["train"]
    place = f" (step {facts.train[-1]['step']} of {facts.steps})" if at_train else ""
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
        "steps": facts.steps,
        "warmup": facts.train_settings.get("warmup", 0),
        "train": list(thinned(facts.train)),
        "valid": list(thinned(facts.valid, ("loss",))),
        "ends": ends,
        "lengths": train.get("lengths"),
        "limit": train.get("max_seq_length"),
    }
