"""Write docs/cli.md from the commands themselves: ``python docs/make_cli.py [--check]``.

With ``--check`` nothing is written; the exit code is 1 when the page is out of date.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import click

from mlxlora_core.cli import VERBS, group
from mlxlora_core.errors import ExitCode

PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
# The command line

Made by `python docs/make_cli.py`; change the commands, not this page.

stdout holds the result, stderr the progress and the errors. With `--json`, where a verb has it, stdout is
one JSON document. A component is named by its name or by its full id `PLUGIN:NAME`
([plugins](plugins.md#names)). `--set` is explained in [recipes](kinds/recipes.md#the-command-line).

## Exit codes

"""

_MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.USAGE: "usage and configuration: a command line, recipe or option that makes no sense",
    ExitCode.DATA: "data: rows that cannot be read or used",
    ExitCode.MODEL: "model, adapter or tokenizer that is damaged or does not fit",
    ExitCode.SAFETY: "refused for safety, such as code in a checkpoint or a folder that holds something else",
    ExitCode.RESOURCE: "disk, memory and limits",
    ExitCode.DIVERGED: "diverged: a loss or a gradient that is not finite",
    ExitCode.PLUGIN: "plugin: missing, broken or incompatible",
    ExitCode.LOCKED: "locked: another run holds the folder",
    ExitCode.DEFECT: "a defect of mlxlora",
}


def text() -> str:
    """The whole page."""
    codes = "".join(f"- {int(code)}: {_MEANINGS[code]}\n" for code in ExitCode)
    return HEAD + codes + "- 128 + n: ended by signal n\n" + "".join(verb(name) for name in VERBS)


def verb(name: str) -> str:
    """The part about one verb: usage, what it does, and every option."""
    command = group.get_command(click.Context(group), name)
    assert command is not None
    ctx = click.Context(command, info_name=f"mlxlora {name}", **command.context_settings)
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    lines = [f"\n## mlxlora {name}\n", f"```\n{usage}\n```\n", inspect.cleandoc(command.help or "") + "\n"]
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if isinstance(parameter, click.Option) and record is not None:  # the usage line tells the arguments
            flags, meaning = record
            lines.append(f"- `{flags}`: {' '.join(meaning.split())}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or say whether it is up to date."""
    made = text()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.is_file() or PAGE.read_text("utf-8") != made)
    PAGE.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
