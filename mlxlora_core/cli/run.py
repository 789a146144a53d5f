"""``mlxlora run``: a whole recipe, stage by stage."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from typing import Any

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.command_line import question_command, resume_command
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, hold, joined, start, verb
from mlxlora_core.cli.watch import DEFAULT_PORT, watched
from mlxlora_core.distributed.environment import rank
from mlxlora_core.errors import one_line
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.defaults import DEFAULT_RECIPE
from mlxlora_core.plugins.progress import progress_shown
from mlxlora_core.runs import pipeline
from mlxlora_core.runs.base import pinned
from mlxlora_core.runs.events import Event, RunStarted, StageDone, StageStarted
from mlxlora_core.runs.folder import REPORT, RunFolder
from mlxlora_core.runs.grading import describe_change, describe_rows
from mlxlora_core.runs.observing import ObserverFailed
from mlxlora_core.runs.plan import plan
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.recipe_source import find_recipe, read
from mlxlora_core.runs.samplers import check_samplers, prepare_evaluators
from mlxlora_core.runs.stages import STAGES
from mlxlora_core.training.events import Note

SHOWN_ANSWERS = 5  # the report has them all
LINE = 100  # columns of what --dry-run shows


@verb(
    click.argument("recipe", required=False, metavar="[RECIPE]", type=declare.NAME_OR_PATH),
    click.option(
        "--dry-run", is_flag=True, help="Show every value, where it comes from, and what would be done."
    ),
    click.option(
        "--watch", is_flag=True, help="Serve a page on this machine that shows the run as it grows."
    ),
    click.option(
        "--watch-port",
        type=click.IntRange(0, 65535),
        default=DEFAULT_PORT,
        show_default=True,
        help="Port of that page; 0 takes one that is free.",
    ),
    SETS_OPTION,
    JSON_OPTION,
    ranked=True,
)
def command(
    registry: Registry,
    recipe: str | None,
    dry_run: bool,
    watch: bool,
    watch_port: int,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Do a whole recipe: convert, build data, train, evaluate and answer.

    RECIPE is a file, or the name of a recipe that a plugin brings (see:
    mlxlora components recipe); without one, the demo. Whatever is done already
    for the same inputs is skipped.
    """
    resolved = read(find_recipe(recipe or DEFAULT_RECIPE, registry), sets, registry)
    prepare_evaluators(resolved.evaluator)
    if dry_run:
        check_samplers(resolved.sampler)
        _dry_run(pinned(resolved, fetch=False)[0], as_json)
        return
    leads = rank() == 0  # which alone writes
    started = time.perf_counter()
    with joined() as (group, seen):
        if leads:
            hold(resolved.folder)
        if leads and watch:
            click.get_current_context().with_resource(watched(resolved.folder, watch_port))
        runtimes = start(registry)
        check_samplers(resolved.sampler)
        if leads:
            work = pipeline.run(
                resolved,
                registry,
                runtimes,
                resume_command(resume=False),
                watched=watch,
                group=group,
                watch=seen,
            )
            _follow(work)
        else:
            for _ in pipeline.assist(resolved, registry, runtimes, group, seen):
                pass
    if not leads:
        return
    record = RunFolder(resolved.folder).record
    if as_json:
        show.as_json(record)
    else:
        _summary(resolved, record)
        show.result(f"{resolved.folder / REPORT} shows the run; {time.perf_counter() - started:.1f} s")
        plugins = click.get_current_context().params["plugins"]
        show.result(f"To ask the tuned model:\n  {question_command(resolved, plugins)}")


def _follow(events: Iterator[Event]) -> None:
    """Show the events of a run on stderr."""
    words = {stage.name: stage.words for stage in STAGES}
    place = ""
    with show.Bar() as bar, progress_shown(bar.move):
        display = show.training(bar)
        for event in events:
            if isinstance(event, RunStarted):
                for note in event.notes:
                    bar.say(note)
            elif isinstance(event, StageStarted):
                place = f"[{event.stage}]"
                bar.say(f"{place} {'done already' if event.skipped else '…'}")
                if not event.skipped:
                    bar.wait(event.stage)
            elif isinstance(event, StageDone):
                bar.end()
                for line in words[event.stage](event.result):
                    bar.say(f"{place} {line}")
            elif isinstance(event, Note):
                bar.say(f"{place} {event.text}")
            elif isinstance(event, ObserverFailed):
                show.warning(event.text)
            else:
                display(event)


def _dry_run(recipe: Recipe, as_json: bool) -> None:
    values, todo = recipe.values(), plan(recipe)
    if as_json:
        show.as_json({"recipe": values, "origins": dict(recipe.origins), "stages": todo})
        return
    show.table(
        ("value", "", "from"),
        [(name, _value(values, name), origin) for name, origin in sorted(recipe.origins.items())],
        width=LINE,
    )
    show.result()
    for stage, will in todo.items():
        show.result(f"{stage}: {'would be done' if will else 'done already'}")


def _value(values: dict[str, Any], name: str) -> str:
    section, _, key = name.partition(".")
    table = values.get(section, {})
    value = table.get(key, table.get("options", {}).get(key))
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _summary(recipe: Recipe, record: dict[str, Any]) -> None:
    """What a run is done for: losses and answers, before and after; memory told apart from the rest."""
    before, after = (record["stages"][stage]["result"] for stage in ("before", "after"))
    summary = record["summary"]
    for split, loss in summary["losses"].items():
        show.result(
            f"{describe_rows(split)}, {after['losses'][split]['tokens']} tokens): {loss['before']:.4f} -> "
            f"{loss['after']:.4f} nats a token ({describe_change(loss['change'])})"
        )
    for name, score in summary.get("scores", {}).items():
        rows = f"{score['rows']} test row{'s'[: score['rows'] - 1]}"
        show.result(f"{name} on {rows}: {score['before']:.4f} -> {score['after']:.4f}")
    for test, meaning in (
        ("memory", "about training rows (memory)"),
        ("held_out", "about held-out rows (generalises)"),
    ):
        asked = summary["questions"][test]
        if asked["questions"]:
            sentence, exact, count = asked["first_sentence"], asked["exact"], asked["questions"]
            show.result(
                f"{count} question{'s'[: count - 1]} {meaning}: first sentence exact {sentence['before']} -> "
                f"{sentence['after']}, whole answer exact {exact['before']} -> {exact['after']}"
            )
    if not after["answers"]:
        return
    pairs = list(zip(before["answers"], after["answers"], strict=True))
    if any(new["expected"] is not None for _, new in pairs):
        show.result()
        show.table(
            ("question", "row", "before", "after"),
            [(_short(new["prompt"]), new["split"] or "none", _mark(old), _mark(new)) for old, new in pairs],
        )
        show.result("\u2713 first sentence exact, \u2713\u2713 whole answer exact")
    asked = [pair for pair in pairs if pair[1]["expected"] is None] or pairs[:1]
    for old, new in asked[:SHOWN_ANSWERS]:
        show.result()
        show.result(one_line(old["prompt"]))
        show.result(f"  before: {_indented(old['text'])}")
        show.result(f"  after:  {_indented(new['text'])}")
    show.result()
    if len(asked) > SHOWN_ANSWERS:
        show.result(f"{len(asked) - SHOWN_ANSWERS} more answers are in the report")


def _short(prompt: str) -> str:
    """A question on one line of at most 60 characters."""
    return textwrap.shorten(prompt, 60, placeholder="\u2026")


def _mark(answer: dict[str, Any]) -> str:
    if answer["expected"] is None:
        return "-"
    return "\u2713\u2713" if answer["exact"] else "\u2713" if answer["first_sentence"] else "\u2717"


def _indented(text: str) -> str:
    """An answer on lines of its own, control characters made visible."""
    return "\n          ".join(one_line(line) for line in text.strip().split("\n")) or "(nothing)"
