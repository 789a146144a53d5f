"""Dataset builder ``jsonl``: rows that one already has, in JSON Lines files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import DatasetBuilder, Rows, hookimpl, option


@dataclass(frozen=True)
class JsonlOptions:
    """Which files are read."""

    path: Path | None = option(
        None,
        help="a file, or a folder: one with train.jsonl, valid.jsonl or test.jsonl keeps its splits, "
        "of any other all .jsonl files are read",
    )
    files: tuple[Path, ...] = option((), help="files to read beside path")

    def __post_init__(self) -> None:
        if self.path is None and not self.files:
            raise ValueError("path or files is required: there is nothing to read")


def build(options: JsonlOptions) -> Rows:
    """The rows of all files, in the order of the files and of their lines.

    Raises:
        DataError: a file that cannot be read, bad lines (told as file:line), or no row at all.
    """
    from mlxlora_jsonl.files import build_rows

    return build_rows(options)


def inputs(options: JsonlOptions) -> Mapping[str, str]:
    """A digest of every file that ``build`` would read.

    Raises:
        DataError: a file or folder is missing.
    """
    from mlxlora_jsonl.files import file_states

    return file_states(options)


@hookimpl
def mlxlora_dataset_builders() -> list[DatasetBuilder]:
    """JSON Lines."""
    return [
        DatasetBuilder(
            name="jsonl",
            summary="Rows that you already have, in JSON Lines files",
            options=JsonlOptions,
            build=build,
            inputs=inputs,
        )
    ]
