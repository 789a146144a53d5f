"""``mlxlora adapters``: the adapter files that there are, and which bases they fit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.model import located
from mlxlora_core.cli.session import JSON_OPTION, start, verb
from mlxlora_core.plugins import Registry


@verb(
    click.argument("paths", nargs=-1, type=declare.INPUT, metavar="[PATH]..."),
    click.option(
        "--model",
        "models",
        type=declare.NAME_OR_PATH,
        multiple=True,
        help=f"Say whether each adapter fits this base: model folder, {declare.SOURCES}. May be repeated.",
    ),
    JSON_OPTION,
)
def command(registry: Registry, paths: tuple[Path, ...], models: tuple[str, ...], as_json: bool) -> None:
    """List adapter files, and which bases they fit.

    Each with its kind, rank, base, step and loss.

    PATH is an adapter file, the adapter folder of another tool, or a folder to
    look through, checkpoints in it included; the working folder, if none is
    named. An adapter fits a base that it was made for. "same linears" says that
    it could go on with --base-mismatch allow, or that it does not say its base.
    """
    start(registry)
    from mlxlora_core.model.listed_adapters import list_adapters, on_base
    from mlxlora_core.model.loading import outline

    found = list(list_adapters(paths or (Path(),), registry))
    for name in models:
        model, _ = outline(located(name).path, registry)
        found = [on_base(one, name, model, registry) for one in found]
    if as_json:
        show.as_json([asdict(one) for one in found])
        return
    headings = ("file", "adapter", "rank", "linears", "base", "step", "loss")
    rows = [
        (
            one.path,
            one.adapter or f"({one.fault})",
            *("-" if value is None else value for value in (one.rank, one.linears or None, one.base or None)),
            *("-" if value is None else value for value in (one.step, one.loss and f"{one.loss:.4f}")),
            *(one.fits.get(name, "-") for name in models),
        )
        for one in found
    ]
    if rows:
        show.table((*headings, *(f"fits {name}" for name in models)), rows)
    else:
        show.progress("there is no adapter file here")
