"""Dataset builder ``manuals``: rows from reStructuredText and Markdown, with their code blocks.

This module is light: it declares what there is, and the parsers are imported
by the function that is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import DatasetBuilder, Rows, hookimpl, option

mlxlora_api = 2


@dataclass(frozen=True)
class ManualsOptions:
    """Where the manuals are, and what a row is made of."""

    path: Path = option(help="a file, or a folder that is searched for *.rst, *.md and *.markdown")
    form: str = option(
        "prompt",
        help="section as one text; titles and section; or what leads to a code block and the code",
        choices=("text", "prompt", "code"),
    )
    languages: tuple[str, ...] = option((), help="languages of the code blocks that make rows; none is all")
    limit: int = option(4000, help="longest section or code block", unit="characters", minimum=1)


def build(options: ManualsOptions) -> Rows:
    """See :func:`mlxlora_manuals.rows.rows`."""
    from mlxlora_manuals import rows

    return rows.rows(options.path, options.form, options.languages, options.limit)


def inputs(options: ManualsOptions) -> Mapping[str, str]:
    """See :func:`mlxlora_manuals.files.stamps`."""
    from mlxlora_manuals import files

    return files.stamps(options.path)


@hookimpl
def mlxlora_dataset_builders() -> Iterable[DatasetBuilder]:
    """Rows from manuals."""
    summary = "sections and code blocks of reStructuredText and Markdown files"
    return [
        DatasetBuilder(name="manuals", summary=summary, options=ManualsOptions, build=build, inputs=inputs)
    ]
