"""``report.html``: what a run has come to, in one file that needs nothing beside it.

It is made from the run folder alone, at any time: also while a run is going on
and after one that was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mlxlora_core.errors import ModelError
from mlxlora_core.files import durable
from mlxlora_core.files.input_file import read_whole
from mlxlora_core.files.targets import is_written
from mlxlora_core.runs.folder import REPORT
from mlxlora_core.runs.report.facts import Facts, read_facts
from mlxlora_core.runs.report.page import MARKS, page

BINS = 40  # of a histogram at most
_PAGE_BYTES = 1 << 30


def write_report(folder: Path, facts: Facts | None = None) -> Path:
    """Write ``report.html`` into a run folder; its path.

    Args:
        folder: of a run.
        facts: what is in it, where that was read already.

    Raises:
        DataError: as :func:`~mlxlora_core.runs.report.facts.read_facts`.
        SafetyError: a page that mlxlora has not written is there.
        ResourceError: it cannot be written.
    """
    path = folder / REPORT
    is_written(path, is_report)
    durable.write_text(path, page(read_facts(folder) if facts is None else facts))
    return path


def is_report(path: Path) -> bool:
    """Whether a file is a report, by what stands in it."""
    try:
        content = read_whole(path, _PAGE_BYTES)
    except ModelError:
        return False
    return any(mark in content for mark in MARKS)


def length_counts(lengths: Sequence[int]) -> dict[str, Any]:
    """The histogram of row lengths that a report draws.

    Args:
        lengths: tokens of each row, of which there is one at least.

    Returns:
        ``rows`` (how many rows are i to i + 1 times ``bin_tokens`` long, counted
        from i = 0, the upper end not included), ``median`` and ``longest``.
    """
    longest = max(lengths)
    sizes = (step * 10**power for power in range(19) for step in (1, 2, 5))
    size = next(size for size in sizes if longest // size < BINS)
    rows = [0] * (longest // size + 1)
    for length in lengths:
        rows[length // size] += 1
    return {"bin_tokens": size, "rows": rows, "median": median(lengths), "longest": longest}
