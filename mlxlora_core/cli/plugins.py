"""``mlxlora plugins``: the plugins that were found, and why some are not active."""

from __future__ import annotations

from mlxlora_core.cli import show
from mlxlora_core.cli.session import JSON_OPTION, verb
from mlxlora_core.errors import one_line
from mlxlora_core.plugins import Registry

#: verb below this one -> what its help says of it
BELOW = {
    "new": "Write a distribution with a plugin that works, to begin your own with.",
    "check": "Try plugins as their kinds promise, without a test of yours.",
    "docs": "Write the page of a plugin in Markdown: what it gives, its options, and how they are used.",
}


@verb(JSON_OPTION, tolerant=True, below=BELOW)
def command(registry: Registry, as_json: bool) -> None:
    """List plugins, and why those that are not active are not."""
    if as_json:
        show.as_json([show.plugin(plugin) for plugin in registry.plugins])
        return
    show.table(
        ("name", "distribution", "version", "origin", "status", "components"),
        [
            (
                p.name,
                p.distribution,
                p.version,
                p.origin,
                p.status,
                " ".join(f"{k}:{n}" for k, n in p.components),
            )
            for p in registry.plugins
        ],
    )
    for plugin in registry.plugins:
        if plugin.reason:
            show.result(f"{one_line(plugin.name)}: {plugin.status}: {plugin.reason}")
