"""``mlxlora plugins check``: the conformance suites over plugins, without a test file of their author's."""

from __future__ import annotations

from collections.abc import Sequence

import click

from mlxlora_core.cli.groups import CONTEXT
from mlxlora_core.cli.session import DEBUG_OPTION, JSON_OPTION, Verb


@click.command("check", cls=Verb, context_settings=CONTEXT)
@click.argument("targets", nargs=-1, metavar="[NAME|PATH]...")
@JSON_OPTION
@DEBUG_OPTION
def command(targets: Sequence[str], as_json: bool) -> None:
    """Try plugins as their kinds promise, without a test of yours."""
