"""``mlxlora data``: rows from a builder become a dataset folder."""

from __future__ import annotations

from pathlib import Path

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, hold, verb
from mlxlora_core.errors import UsageError
from mlxlora_core.options import explain
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.progress import progress_shown
from mlxlora_core.runs.recipe import choose, overrides
from mlxlora_core.training.dataset import build_dataset

SHOWN_SKIPPED = 10


@verb(
    click.option("--builder", required=True, help="Dataset builder."),
    click.option("--out", type=declare.OUTPUT_FOLDER, required=True, help="Folder to write."),
    click.option(
        "--package",
        "packages",
        multiple=True,
        help="Package to read, for builders that read packages. May be repeated.",
    ),
    declare.COLUMNS,
    click.option("--overwrite", is_flag=True, help="Replace a dataset folder that is there."),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    builder: str,
    out: Path,
    packages: tuple[str, ...],
    columns: tuple[str, ...],
    overwrite: bool,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Build a dataset folder with a dataset builder.

    It gets train.jsonl, valid.jsonl, test.jsonl, and dataset.json, which tells
    what was read, what was skipped and why. `--set KEY=VALUE` sets an option of
    the builder, or how rows are split.
    """
    values = _values(sets)
    if packages:
        _check_option(registry, builder, "packages", "--package")
        values["packages"] = packages
    if columns:
        _check_option(registry, builder, "columns", "--columns")
        values["columns"] = [f"{name}={column}" for name, column in declare.columns_from(columns).items()]
    chosen, config = choose("builder", builder, values, registry)
    hold(out)
    with show.Bar() as bar, progress_shown(bar.move):
        bar.wait("reading")
        record = build_dataset(chosen, config, out, overwrite=overwrite)
    if as_json:
        show.as_json(record)
        return
    counts = record["rows"]
    show.result(f"{out}: {counts['train']} train, {counts['valid']} valid, {counts['test']} test rows")
    for skipped in record["skipped"][:SHOWN_SKIPPED]:
        show.progress(f"skipped {skipped['source']}: {skipped['reason']}")
    if len(record["skipped"]) > SHOWN_SKIPPED:
        show.progress(f"{len(record['skipped']) - SHOWN_SKIPPED} more skipped, see {out / 'dataset.json'}")
    for line in record["findings"]:
        show.progress(line)
    if record["rows_in_two_splits"]:
        show.progress(f"warning: {record['rows_in_two_splits']} rows stand in more than one split")


def _values(sets: tuple[str, ...]) -> dict[str, object]:
    """``key=value`` of the builder; ``data.key=value`` as in a recipe is understood too."""
    full = [text if text.partition("=")[0].startswith("data.") else f"data.{text}" for text in sets]
    return dict(overrides(full).get("data", {}))


def _check_option(registry: Registry, builder: str, name: str, spelled: str) -> None:
    """Refuse what a builder has no option for."""
    options = registry.find("builder", builder).spec.options
    if name not in {known.name for known in explain(options)}:
        raise UsageError(f"{spelled}: builder '{builder}' reads no {name}", fix=f"leave {spelled} out")
