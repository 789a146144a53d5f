"""``mlxlora plugins new``: a distribution with a plugin that works."""

from __future__ import annotations

from pathlib import Path

import click

from mlxlora_core.cli import declare
from mlxlora_core.cli.groups import CONTEXT
from mlxlora_core.cli.session import DEBUG_OPTION, Verb
from mlxlora_core.plugins import KINDS


@click.command("new", cls=Verb, context_settings=CONTEXT)
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name")
@click.option(
    "--folder", type=declare.OUTPUT_FOLDER, help="Where to write it, a folder that is not there or empty."
)
@DEBUG_OPTION
def command(kind: str, name: str, folder: Path | None) -> None:
    """Write a distribution with a plugin that works, to begin your own with."""
