"""``mlxlora run``."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxlora_core.cli import show
from mlxlora_core.cli.convert import describe
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, hold, start, verb
from mlxlora_core.cli.train import resume_command
from mlxlora_core.errors import SettingsChanged, UsageError, listing, nearest, one_line
from mlxlora_core.registry import Registry
from mlxlora_core.registry.defaults import DEFAULT_RECIPE
from mlxlora_core.run.recipe import Recipe
from mlxlora_core.run.recipe_source import read

if TYPE_CHECKING:
    from mlxlora_core.run.pipeline import Event


@verb(
    click.argument("recipe", required=False, metavar="[RECIPE]"),
    click.option(
        "--dry-run", is_flag=True, help="Show every value, where it comes from, and what would be done."
    ),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry, recipe: str | None, dry_run: bool, sets: tuple[str, ...], as_json: bool
) -> None:
    """Do a whole recipe: convert, build data, train, evaluate and answer.

    RECIPE is a file, or the name of a recipe that a plugin brings (see:
    mlxlora components recipe); without one, the demo. Whatever is done already
    for the same inputs is skipped.
    """
    resolved = read(find_recipe(recipe or DEFAULT_RECIPE, registry), sets, registry)
    if dry_run:
        _dry_run(resolved, as_json)
        return
    hold(resolved.folder)
    notes = start(registry)
    from mlxlora_core.run import pipeline
    from mlxlora_core.run.folder import REPORT, RunFolder

    started = time.perf_counter()
    with ExitStack() as bar:
        display: Any = None
        for event in _events(pipeline.run(resolved, registry, notes, resume_command(resume=False))):
            if event == pipeline.StageStarted("train", skipped=False):
                display = bar.enter_context(show.training(resolved.train.iters))
            elif isinstance(event, pipeline.StageDone):
                bar.close()
            _show(event, display)
    record = RunFolder(resolved.folder).record
    if as_json:
        show.as_json(record)
    else:
        _summary(resolved, record)
        click.echo(f"{resolved.folder / REPORT} shows the run; {time.perf_counter() - started:.1f} s")


def _events(events: Iterator[Event]) -> Iterator[Event]:
    """The events of a run, with a table before the error that a change of settings is."""
    try:
        yield from events
    except SettingsChanged as fault:
        show.changes(fault.rows)
        raise


def find_recipe(name: str, registry: Registry) -> Path:
    """The recipe file that a path or a name stands for."""
    path = Path(name)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return path
    known = [component.spec.name for component in registry.of("recipe")]
    if name in known or ":" in name:
        shipped: Path = registry.find("recipe", name).spec.path
        return shipped
    raise UsageError(
        f"no recipe '{name}' ({nearest(name, known)}there is {listing(known)}, or name a .toml file)"
    )


def _dry_run(recipe: Recipe, as_json: bool) -> None:
    from mlxlora_core.run.plan import plan

    values, todo = recipe.values(), plan(recipe)
    if as_json:
        show.as_json({"recipe": values, "origins": dict(recipe.origins), "stages": todo})
        return
    show.table(
        ("value", "", "from"),
        [(name, _value(values, name), origin) for name, origin in sorted(recipe.origins.items())],
    )
    click.echo()
    for stage, will in todo.items():
        click.echo(f"{stage}: {'would be done' if will else 'done already'}")


def _value(values: dict[str, Any], name: str) -> str:
    section, _, key = name.partition(".")
    table = values.get(section, {})
    value = table.get(key, table.get("options", {}).get(key))
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _show(event: Event, display: Any) -> None:
    """One event of a run on stderr."""
    from mlxlora_core.run.pipeline import Note, RunStarted, StageDone, StageStarted

    if isinstance(event, RunStarted):
        for note in event.notes:
            show.progress(note)
    elif isinstance(event, Note):
        show.progress(f"[{event.stage}] {event.text}")
    elif isinstance(event, StageStarted):
        show.progress(f"[{event.stage}] {'done already' if event.skipped else '…'}")
    elif isinstance(event, StageDone):
        for line in _stage_lines(event.stage, dict(event.result)):
            show.progress(f"[{event.stage}] {line}")
    else:
        display(event)


def _stage_lines(stage: str, result: dict[str, Any]) -> list[str]:
    if stage == "model":
        return describe(result) if "loader" in result else [f"uses {result['folder']}"]
    if stage == "data":
        rows = result["rows"]
        skipped = f", {len(result['skipped'])} skipped" if result["skipped"] else ""
        return [f"{rows['train']} train, {rows['valid']} valid, {rows['test']} test rows{skipped}"]
    if stage == "train":
        cut = f"; {result['rows_cut']} rows were cut" if result["rows_cut"] else ""
        return [show.adapter_size(result, len(result["adapted"])) + cut]
    return [f"{split} loss {loss['loss']:.4f}" for split, loss in result["losses"].items()]


def _summary(recipe: Recipe, record: dict[str, Any]) -> None:
    """What a run is done for: losses and answers, before and after; memory told apart from the rest."""
    before, after = (record["stages"][stage]["result"] for stage in ("before", "after"))
    summary = record["summary"]
    for split, loss in summary["losses"].items():
        click.echo(
            f"held-out loss ({split}, {after['losses'][split]['tokens']} tokens): {loss['before']:.4f} -> "
            f"{loss['after']:.4f} nats a token ({loss['change']:+.1%})"
        )
    for test, meaning in (
        ("memory", "about training rows (memory)"),
        ("held_out", "about held-out rows (generalises)"),
    ):
        asked = summary["questions"][test]
        if asked["questions"]:
            sentence, exact, count = asked["first_sentence"], asked["exact"], asked["questions"]
            click.echo(
                f"{count} question{'s'[: count - 1]} {meaning}: first sentence exact {sentence['before']} -> "
                f"{sentence['after']}, whole answer exact {exact['before']} -> {exact['after']}"
            )
    if not after["answers"]:
        return
    pairs = list(zip(before["answers"], after["answers"], strict=True))
    if any(new["expected"] is not None for _, new in pairs):
        click.echo()
        show.table(
            ("question", "row", "before", "after"),
            [(_short(new["prompt"]), new["split"] or "none", _mark(old), _mark(new)) for old, new in pairs],
        )
        click.echo("\u2713 first sentence exact, \u2713\u2713 whole answer exact")
    old, new = pairs[0]
    click.echo()
    click.echo(one_line(old["prompt"]))
    click.echo(f"  before:{_indented(old['text'])}")
    click.echo(f"  after: {_indented(new['text'])}")
    click.echo()


def _short(prompt: str) -> str:
    """A question on one line of at most 60 characters."""
    return textwrap.shorten(prompt, 60, placeholder="\u2026")


def _mark(answer: dict[str, Any]) -> str:
    if answer["expected"] is None:
        return "-"
    return "\u2713\u2713" if answer["exact"] else "\u2713" if answer["first_sentence"] else "\u2717"


def _indented(text: str) -> str:
    """An answer on lines of its own, control characters made visible."""
    return "\n          ".join(one_line(line) for line in text.rstrip().split("\n"))
