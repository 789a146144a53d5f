"""``mlxlora plugins new``: a distribution with a plugin that works."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.groups import CONTEXT
from mlxlora_core.cli.session import DEBUG_OPTION, Verb
from mlxlora_core.errors import UsageError
from mlxlora_core.files import durable
from mlxlora_core.plugins import KINDS
from mlxlora_core.plugins.plugin import normal_name

TEMPLATES = Path(__file__).with_name("templates")
ENDING = ".txt"  # of every template, so that nothing takes one for a module of ours

#: kind -> what the plugin does that is written, as its summary says it
SUMMARIES = {
    "loader": "folders with a description in JSON and weights.npz",
    "tokenizer": "one id a byte",
    "architecture": "a small transformer with rotary positions",
    "adapter": "one trained factor for each input of a frozen linear",
    "adapter-loader": "LoRA out of updates.npz",
    "quantizer": "8-bit whole numbers, one scale a row",
    "builder": "paragraphs of text files",
    "sampler": "tokens near the most likely one",
    "exporter": "plain numbers and a JSON index",
    "observer": "a line for each reported loss",
    "evaluator": "whether the last number is right",
    "command": "count the rows of a file",
    "runtime": "bounds the memory that MLX keeps for reuse",
    "recipe": "a small model learns plurals",
}
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*[a-z0-9]|[a-z0-9]")
_PREFIX = "mlxlora-"


@click.command("new", cls=Verb, context_settings=CONTEXT)
@click.argument("kind", type=click.Choice(list(KINDS)), metavar="KIND")
@click.argument("name")
@click.option(
    "--folder",
    type=declare.OUTPUT_FOLDER,
    help="Folder to write, which must not be there. [default: mlxlora-NAME]",
)
@DEBUG_OPTION
def command(kind: str, name: str, folder: Path | None) -> None:
    """Write a distribution with a plugin that works, to begin your own with.

    KIND is one of loader, tokenizer, architecture, adapter, adapter-loader, quantizer,
    builder, sampler, exporter, observer, evaluator, command, runtime and recipe. NAME is
    that of the component; the distribution is called mlxlora-NAME.
    """
    name = name.removeprefix(_PREFIX)
    if not _NAME.fullmatch(name) or name == "none":
        raise UsageError(f"name {name!r}: wanted lower case letters, digits and hyphens", where="NAME")
    target = folder if folder is not None else Path(f"{_PREFIX}{name}")
    files = dict(distribution(kind, name))
    with durable.new_folder(target) as made:
        for path, text in files.items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            durable.write_text(made / path, text)
    for path in sorted(files):
        show.result(target / path)
    show.progress(f"try it: mlxlora plugins check {shlex.quote(str(target))}")


def distribution(kind: str, name: str) -> Iterator[tuple[str, str]]:
    """(path, text) of each file of a distribution.

    Args:
        kind: of the component.
        name: of the component.
    """
    words = {
        "PLUGIN_DISTRIBUTION": f"{_PREFIX}{name}",
        "PLUGIN_MODULE": _module(name),
        "PLUGIN_NAME": name,
        "PLUGIN_KIND": kind,
        "PLUGIN_SUMMARY": SUMMARIES[kind],
        "PLUGIN_USE": (TEMPLATES / kind / f"use.md{ENDING}").read_text("utf-8").rstrip(),
    }
    common = dict(_read("distribution"))
    own = {_placed(path, name): text for path, text in _read(kind) if path != "use.md"}
    words["PLUGIN_FILES"] = "".join(f"| `{path}` | {_phrase(text)} |\n" for path, text in sorted(own.items()))
    for path, text in {**common, **own}.items():
        yield path, _filled(text, words)


def _read(folder: str) -> Iterator[tuple[str, str]]:
    """(path within it, text) of each template in a folder."""
    for path in sorted((TEMPLATES / folder).rglob(f"*{ENDING}")):
        yield path.relative_to(TEMPLATES / folder).as_posix().removesuffix(ENDING), path.read_text("utf-8")


def _placed(path: str, name: str) -> str:
    """Where a template of a kind goes in a distribution."""
    module = _module(name)
    return path.replace("package/", f"{module}/", 1).replace("test_plugin", f"test_{module}", 1)


def _filled(text: str, words: dict[str, str]) -> str:
    """A template with the words put in; those that hold others first."""
    for key in ("PLUGIN_USE", "PLUGIN_FILES", *words):
        text = text.replace(key, words[key])
    return text


def _phrase(text: str) -> str:
    """What a file is: the first line of its docstring or comment."""
    return text.splitlines()[0].strip('"# ').rstrip(".")


def _module(name: str) -> str:
    """The import package of a component's distribution."""
    return normal_name(f"{_PREFIX}{name}").replace("-", "_")
