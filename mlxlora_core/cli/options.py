"""``mlxlora options``."""

from __future__ import annotations

import click

from mlxlora_core.cli import show
from mlxlora_core.cli.session import JSON_OPTION, verb
from mlxlora_core.options import Option, explain, plain
from mlxlora_core.registry import KINDS, Registry


@verb(click.argument("kind", type=click.Choice(list(KINDS))), click.argument("name"), JSON_OPTION)
def command(registry: Registry, kind: str, name: str, as_json: bool) -> None:
    """Explain the options of one component."""
    component = registry.find(kind, name)
    known = explain(component.spec.options)
    if as_json:
        show.as_json([_record(option) for option in known])
        return
    click.echo(f"{kind} {component.id}: {component.spec.summary}")
    if not known:
        click.echo("It has no options.")
        return
    show.table(
        ("option", "type", "default", "allowed", "meaning"),
        [
            (
                o.name,
                o.type_name,
                "required" if o.required else _shown(o.default),
                o.allowed,
                f"{o.help} ({o.unit})" if o.unit else o.help,
            )
            for o in known
        ],
    )


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "empty"
    return "none" if default is None else str(default)


def _record(option: Option) -> dict[str, object]:
    return {
        "name": option.name,
        "type": option.type_name,
        "required": option.required,
        "default": None if option.required else plain(option.default),
        "allowed": option.allowed,
        "unit": option.unit,
        "help": option.help,
    }
