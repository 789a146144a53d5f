"""Rows as people hand them over: a dataset folder, a list, or a list for each split."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.errors import DataError, UsageError, listing, nearest
from mlxlora_core.training.dataset import SPLITS

#: a dataset folder, the rows of one split, or the rows of each
Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]


def sources(data: Rows, *splits: str) -> dict[str, Path | list[Mapping[str, Any]]]:
    """split -> where its rows come from; rows of one split are those of the first.

    Args:
        data: a dataset folder, of which all of these splits are read; rows; or the rows of
            each split, of which only the first must be there.
        splits: the splits that are asked for.

    Raises:
        UsageError: a name that is none of a split.
        DataError: nothing that rows could come from, or none for the first split.
    """
    _check_names(splits)
    if isinstance(data, str | os.PathLike):
        return {split: Path(data) / f"{split}.jsonl" for split in splits}
    if not isinstance(data, Mapping):
        return {splits[0]: _listed(data, splits[0])}
    _check_names(data)
    if splits[0] not in data:
        raise DataError(f"there are no {splits[0]} rows (there are {listing(data)})")
    return {split: _listed(data[split], split) for split in splits if split in data}


def _check_names(splits: Iterable[object]) -> None:
    for split in splits:
        if split not in SPLITS:
            raise UsageError(
                f"there is no split {split!r} ({nearest(str(split), SPLITS)}there is {listing(SPLITS)})"
            )


def _listed(rows: object, split: str) -> list[Mapping[str, Any]]:
    if isinstance(rows, Iterable) and not isinstance(rows, str | bytes | os.PathLike | Mapping):
        return list(rows)
    raise DataError(f"{split} rows: wanted a list of rows such as {{'text': …}}, got {type(rows).__name__}")
