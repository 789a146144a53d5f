"""``mlxlora plugins docs``: the page of a plugin."""

from __future__ import annotations

from pathlib import Path

import click

from mlxlora_core.cli import declare, plugin_page, show
from mlxlora_core.cli.session import verb
from mlxlora_core.errors import ModelError
from mlxlora_core.files import write_text
from mlxlora_core.files.input_file import read_whole
from mlxlora_core.files.targets import is_written
from mlxlora_core.plugins import Registry

_PAGE_BYTES = 1 << 24


@verb(
    click.argument("name"),
    click.option(
        "--output",
        type=declare.OUTPUT_FILE,
        help="File to write instead of stdout; one that this verb has written is replaced.",
    ),
)
def command(registry: Registry, name: str, output: Path | None) -> None:
    """Write the page of a plugin in Markdown: what it gives, its options, and how they are used.

    NAME is that of the plugin or of its distribution, as `mlxlora plugins` lists them.
    """
    text = plugin_page.page(plugin_page.find_plugin(name, registry), registry)
    if output is None:
        show.result(text, end="")
        return
    is_written(output, _is_page)
    write_text(output, text)
    show.result(output)


def _is_page(path: Path) -> bool:
    """Whether a file is a page that this verb has written, by how it ends."""
    try:
        lines = read_whole(path, _PAGE_BYTES).decode("utf-8", "replace").splitlines()
    except ModelError:
        return False
    return bool(lines) and lines[-1].startswith(plugin_page.MARK)
