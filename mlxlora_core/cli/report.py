"""``mlxlora report``: the page of a run, made again."""

from __future__ import annotations

from pathlib import Path

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.session import verb
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.defaults import DEFAULT_RECIPE
from mlxlora_core.runs.recipe_source import find_recipe, read
from mlxlora_core.runs.report import write_report
from mlxlora_core.runs.report.facts import read_facts


@verb(click.argument("run", required=False, type=declare.INPUT))
def command(registry: Registry, run: Path | None) -> None:
    """Write the report of a run folder again, also while the run is going on.

    RUN is a run folder, or the folder of checkpoints of a training; without
    one, the run folder of the demo. The report is report.html in it, and its
    path is printed.
    """
    folder = run or read(find_recipe(DEFAULT_RECIPE, registry), (), registry).folder
    facts = read_facts(folder)
    for fault in facts.faults:
        show.warning(f"left out of the report: {fault}")
    click.echo(write_report(folder, facts))
