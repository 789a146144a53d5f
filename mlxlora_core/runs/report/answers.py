"""What a run has come to: memory and generalisation, side by side and never mixed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from mlxlora_core.runs.grading import change, describe_change
from mlxlora_core.runs.report.facts import Facts
from mlxlora_core.runs.report.html import Html, element
from mlxlora_core.runs.report.parts import counted, in_nats, note, table

TITLES = {"train": "training row", "valid": "held-out row", "test": "held-out row"}


def verdict(facts: Facts) -> Html:
    """Memory and generalisation, side by side and never mixed."""
    return element(
        "section",
        element("h2", "What came of it", class_="hidden"),
        element("div", _carried_over(facts), _by_heart(facts), class_="pair"),
        aria_label="What came of it",
    )


def _carried_over(facts: Facts) -> Html:
    before, after = facts.results.get("before"), facts.results.get("after")
    rows = []
    for split, loss in (before or {"losses": {}})["losses"].items():
        was, now = loss["loss"], after["losses"].get(split, {}).get("loss") if after else None
        moved = "" if now is None else describe_change(change(was, now)).replace("-", "\u2212")
        rows.append((split, in_nats(was), "…" if now is None else in_nats(now), moved))
    held_out = _asked(facts, "held_out", "held-out rows")
    return element(
        "div",
        element("h3", "Does it generalise?", element("span", "held-out rows", class_="tag general")),
        note(_held_out(facts)),
        table("Loss in nats a counted token", ("rows", "before", "after", "change"), rows, numbers=(1, 2, 3))
        if rows
        else element("p", "Nothing measured yet." if before is None else "Nothing was held out."),
        _scores(facts),
        held_out,
        class_="card",
    )


def _scores(facts: Facts) -> Html | None:
    """What evaluators say of the answers to the test rows, before and after."""
    before, after = (facts.results.get(stage, {}).get("scores", {}) for stage in ("before", "after"))
    if not before:
        return None
    rows = [
        (name, f"{score['score']:.4f}", f"{after[name]['score']:.4f}" if name in after else "…")
        for name, score in before.items()
    ]
    count = counted(next(iter(before.values()))["rows"], "test row")
    caption = f"Scores of the answers to {count}, from 0 to 1"
    return table(caption, ("evaluator", "before", "after"), rows, numbers=(1, 2))


def _held_out(facts: Facts) -> str:
    both = facts.results.get("data", {"rows_in_two_splits": 0})["rows_in_two_splits"]
    if both:
        return f"Figures of rows held out, but for {counted(both, 'row')} that the source has in two splits."
    return "Figures of rows that it was never trained on."


def _by_heart(facts: Facts) -> Html:
    words = _asked(facts, "memory", "training rows")
    loss = in_nats(facts.train[-1]["loss"]) if facts.train else None
    return element(
        "div",
        element("h3", "What does it remember?", element("span", "training rows", class_="tag memory")),
        note("Figures of rows that it was trained on: memory, not understanding."),
        words or element("p", "No question about a training row was asked."),
        element("p", "Training loss at the last report: ", element("b", loss), " nats a counted token.")
        if loss
        else None,
        class_="card",
    )


def _asked(facts: Facts, test: str, rows: str) -> Html | None:
    summary = facts.record.get("summary")
    if summary is None or not summary["questions"][test]["questions"]:
        return None
    marks = summary["questions"][test]
    count = marks["questions"]
    lines = [
        (what, f"{marks[key]['before']} of {count}", f"{marks[key]['after']} of {count}")
        for key, what in (("first_sentence", "first sentence exact"), ("exact", "whole answer exact"))
    ]
    caption = f"{counted(count, 'question')} about {rows}"
    return table(caption, ("answers", "before", "after"), lines, numbers=(1, 2))


def questions(facts: Facts) -> Html | None:
    """Each question with both answers; the first one open."""
    before = facts.results.get("before", {"answers": []})["answers"]
    if not before:
        return None
    after = {answer["prompt"]: answer for answer in facts.results.get("after", {"answers": []})["answers"]}
    asked = [_question(old, after.get(old["prompt"]), first=i == 0) for i, old in enumerate(before)]
    return element(
        "section",
        element("h2", "Questions and answers"),
        note(
            _mark(True),
            " the first sentence is exactly that of the row; ",
            _mark(True, whole=True),
            " the whole answer is, and it stopped there. ",
            element("span", "Tinted", class_="same"),
            " text is word for word what the row says, as far as it goes.",
        ),
        element("div", *asked, class_="questions"),
    )


def _question(before: Mapping[str, Any], after: Mapping[str, Any] | None, *, first: bool) -> Html:
    split = before["split"]
    kind = {"train": "memory", None: "none"}.get(split, "general")
    wanted = before["expected"]
    row = None
    if wanted is not None and not (after and after["exact"]):
        row = element(
            "div", element("h3", f"What the {split} row says"), _said(wanted, None), class_="answer wanted"
        )
    return element(
        "details",
        element(
            "summary",
            element("span", before["prompt"].strip(), class_="prompt", dir="auto"),
            element("span", TITLES.get(split, "no row"), class_=f"tag {kind}"),
            element(
                "span",
                element("span", "before ", _judgement(before)),
                element("span", "after ", _judgement(after)),
                class_="marks",
            ),
        ),
        element("div", _answer("Before", before), _answer("After", after), row, class_="answers"),
        open=first,
    )


def _judgement(answer: Mapping[str, Any] | None) -> Html:
    if answer is None:
        return element("span", "…", title="not asked yet")
    if answer["expected"] is None:
        return element("span", "?", title="no row to hold it against")
    return _mark(answer["first_sentence"], whole=answer["exact"])


def _mark(right: bool, *, whole: bool = False) -> Html:
    if whole:
        return element("span", "✓✓", class_="yes", title="whole answer exact")
    return element(
        "span",
        "✓" if right else "✗",
        class_="yes" if right else "no",
        title="first sentence exact" if right else "first sentence not exact",
    )


def _answer(title: str, answer: Mapping[str, Any] | None) -> Html:
    if answer is None:
        return element("div", element("h3", title), note("Not asked yet."), class_="answer")
    return element(
        "div",
        element("h3", title, " ", _judgement(answer)),
        _said(answer["text"], answer["expected"]),
        None if answer["ended"] else note("Cut at the limit on its tokens."),
        class_="answer",
    )


def _said(text: str, wanted: str | None) -> Html:
    """A text; what it begins with in common with ``wanted`` is tinted."""
    pairs = zip(text, wanted or "", strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    lead = len(text) - len(text.lstrip())
    tinted = element("span", text[lead:same], class_="same") if same > lead else None
    rest = text[max(same, lead) :].rstrip()
    if tinted is None and not rest:
        return note("(nothing)")
    return element("pre", tinted, rest, dir="auto")
