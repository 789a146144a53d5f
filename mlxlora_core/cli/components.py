"""``mlxlora components``: what the plugins give, by kind."""

from __future__ import annotations

import click

from mlxlora_core.cli import show
from mlxlora_core.cli.session import JSON_OPTION, verb
from mlxlora_core.options import explain
from mlxlora_core.plugins import KINDS, Registry
from mlxlora_core.plugins.sections import config_of


@verb(click.argument("kind", required=False, type=click.Choice(list(KINDS))), JSON_OPTION)
def command(registry: Registry, kind: str | None, as_json: bool) -> None:
    """List what the plugins give, by kind.

    The full id PLUGIN:NAME is understood wherever a name is, and settles a name
    that two plugins give. --json names its options too, and what its section
    of a recipe holds beside them.
    """
    found = [c for c in registry.components if kind in (None, c.kind)]
    found.sort(key=lambda c: (list(KINDS).index(c.kind), c.spec.name))
    if as_json:
        show.as_json(
            [
                {
                    "kind": c.kind,
                    "name": c.spec.name,
                    "id": c.id,
                    "plugin": c.plugin.name,
                    "summary": c.spec.summary,
                    "options": [known.name for known in explain(c.spec.options)],
                    "section": [known.name for known in explain(config_of(c.kind))],
                }
                for c in found
            ]
        )
        return
    show.table(
        ("kind", "name", "plugin", "summary"),
        [(c.kind, c.spec.name, c.plugin, c.spec.summary) for c in found],
    )
