"""Groups of commands: each stands in a module of its own, which is imported when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports the one that is called.

    Args:
        summaries: command -> what the group's help says of it, in the order of the listing.
        modules: where the modules of the commands are, of which each is called by the name behind it.
    """

    def __init__(self, *arguments: Any, summaries: Mapping[str, str], modules: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.summaries, self.modules = summaries, modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order in which a newcomer meets them."""
        return list(self.summaries)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of that name."""
        if name not in self.summaries:
            return None
        command: click.Command = importlib.import_module(f"{self.modules}{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.summaries.items()))
