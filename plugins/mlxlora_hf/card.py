"""README.md of a model on the Hub: what it was made of, and how it was tuned."""

from __future__ import annotations

import json
import re

from mlxlora_core.api import ExportSource

_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(@[0-9a-f]{40})")


def model_card(source: ExportSource, library: str) -> str:
    """The text of a model card.

    Args:
        source: what is exported.
        library: that opens the model, as the Hub calls it.
    """
    found = _HUB.fullmatch(source.base)
    front = [f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- mlxlora"]
    front += [f"base_model: {json.dumps(found['repo'])}"] if found else []
    # Where a folder is on the machine that it was made on is nobody's business.
    base = found["repo"] if found else source.base.rpartition("/")[2]
    made = f"Made of `{base}` by mlxlora." if base else "Made by mlxlora."
    how = [source.card.strip()] if source.card.strip() else []
    return "\n\n".join(["\n".join(["---", *front, "---"]), "# Model", made, *how]) + "\n"
