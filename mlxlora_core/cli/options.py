"""``mlxlora options``: the options of one component."""

from __future__ import annotations

from collections.abc import Sequence

import click

from mlxlora_core.cli import show
from mlxlora_core.cli.session import JSON_OPTION, verb
from mlxlora_core.options import Option, explain, plain
from mlxlora_core.plugins import KINDS, Registry
from mlxlora_core.plugins.sections import config_of


@verb(click.argument("kind", type=click.Choice(list(KINDS))), click.argument("name"), JSON_OPTION)
def command(registry: Registry, kind: str, name: str, as_json: bool) -> None:
    """Explain the options of one component.

    What its section of a recipe holds beside them is explained too, such as
    the layers that an adapter goes to. `--set` takes either.
    """
    component = registry.find(kind, name)
    own, section = explain(component.spec.options), explain(config_of(kind))
    if as_json:
        records = [_record(option) | {"section": False} for option in own]
        show.as_json(records + [_record(option) | {"section": True} for option in section])
        return
    show.result(f"{kind} {component.id}: {component.spec.summary}")
    if own:
        _show("option", own)
    else:
        show.result("It has no options.")
    if section:
        show.result(f"In the section of every {kind}, beside use:")
        _show("key", section)


def _show(title: str, known: Sequence[Option]) -> None:
    show.table(
        (title, "type", "default", "allowed", "meaning"),
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
