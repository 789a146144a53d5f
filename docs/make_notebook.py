"""Write docs/python.ipynb from docs/python.md: ``python docs/make_notebook.py [--check]``.

Each block of Python is a cell to run, and what stands between them is a cell of
text. With ``--check`` nothing is written; the exit code is 1 when the notebook
is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("python.md")
NOTEBOOK = PAGE.with_suffix(".ipynb")
#: what the page says of the notebook, which the notebook leaves out
_ABOUT_NOTEBOOK = " This page\nas a notebook: [python.ipynb](python.ipynb)."
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text() -> str:
    """The whole notebook, in version 4.5 of the format."""
    page = PAGE.read_text("utf-8")
    if _ABOUT_NOTEBOOK not in page:
        raise ValueError(f"{PAGE} does not say {_ABOUT_NOTEBOOK!r}")
    parts = _BLOCK.split(page.replace(_ABOUT_NOTEBOOK, ""))
    cells = [
        _cell(number, "code" if number % 2 else "markdown", part.strip("\n"))
        for number, part in enumerate(parts)
        if part.strip()
    ]
    notebook = {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, kind: str, source: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return {**cell, "source": source.splitlines(keepends=True)}


def main() -> int:
    """Write the notebook, or say whether it is up to date."""
    made = text()
    if "--check" in sys.argv[1:]:
        return int(not NOTEBOOK.is_file() or NOTEBOOK.read_text("utf-8") != made)
    NOTEBOOK.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
