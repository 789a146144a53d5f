"""README.md of a model or an adapter, as the Hub reads it: what it was made of, and how it was tuned."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mlxlora_core.files.durable import write_text

_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(@[0-9a-f]{40})?")


def write_card(target: Path, title: str, base: str, library: str, how: str) -> None:
    """Write the model card of an export.

    Args:
        target: the folder.
        title: what it is, in a word.
        base: what it was made of: a path, or a name on the Hub. Of a path only the last name is told, for
            where a folder is on the machine that it was made on is nobody's business.
        library: that opens it, as the Hub calls it.
        how: lines of Markdown on how it was tuned, or nothing.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    found = _HUB.fullmatch(base) if not Path(base).exists() else None
    front = [f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- mlxlora"]
    front += [f"base_model: {json.dumps(found['repo'])}"] if found else []
    name = found["repo"] if found else base.rpartition("/")[2]
    made = f"Made of `{name}` by mlxlora." if name else "Made by mlxlora."
    parts = ["\n".join(["---", *front, "---"]), f"# {title}", made, *([how.strip()] if how.strip() else [])]
    write_text(target / "README.md", "\n\n".join(parts) + "\n")
