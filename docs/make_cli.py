"""Write docs/cli.md from the commands themselves: ``python docs/make_cli.py [--check]``.

With ``--check`` nothing is written; the exit code is 1 when the page is out of date.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import click

from mlxlora_core.cli import declare
from mlxlora_core.cli.verbs import commands
from mlxlora_core.errors import ExitCode

PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
# The command line

Made by `python docs/make_cli.py`; change the commands, not this page.

stdout holds the result, stderr the progress and the errors. With `--json`, where a verb has it, stdout is
one JSON document. A component is named by its name or by its full id `PLUGIN:NAME`
([plugins](plugins.md#names)). `--set` is explained in [recipes](kinds/recipes.md#the-command-line).
Plugins may bring verbs of their own ([commands](kinds/commands.md)).

## Exit codes

"""

TAIL = """\
- 128 + n: ended by signal n

Every failure is one line on stderr that says what, where and what to do; `--debug` puts the traceback before
it and changes no exit code.

## Terminals, pipes and logs

What cannot be told on stderr is not told, and the work goes on: a log on a full disk or at its size limit, a
terminal that was closed, a stream that is closed or that nobody reads. A result that cannot be written to
stdout is exit code 6; a reader of stdout that goes away ends the verb as it ends any program, and a stdout
that is closed is no fault. Only results go to stdout, whatever a plugin prints.

On a terminal, control characters in what a model, a row, a package, a plugin or a file name brings are shown
as `\\x1b`, and so are those that change the direction of a line; other text is shown as it is. On stderr this
is so everywhere. In a pipe or a file the text of a model on stdout is exact, and `--json` writes such
characters as JSON's `\\u001b`. Characters that the encoding of a stream does not have are written as escapes.

## The working folder

No module that lies in the working folder is run, neither by `mlxlora` nor by `python -m mlxlora_core`,
unless `PYTHONPATH` or `-P` names it. An empty entry, as `PYTHONPATH=$PYTHONPATH:folder` leaves it, names
nothing here. What Python imports before it comes to mlxlora, from its standard library, it looks for as it
always does: `python -m` in the working folder first (`python -P -m` does not), and both there where
`PYTHONPATH` has an empty entry.

## Signals

SIGINT (Ctrl-C), SIGTERM and SIGHUP end a verb with 130, 143 and 129. Training finishes its step and saves
first ([checkpoints](checkpoints.md)), and in [`chat`](chat.md) on a terminal SIGINT stops the answer; every
other verb ends at once, removes its temporary files and the
child processes that read packages, and leaves no target behind. A second signal ends the process on the
spot. A signal that was ignored at the start, as under `nohup`, stays ignored.

## One at a time

`run` locks its run folder, `train` its adapter file, and `convert`, `data`, `fuse` and `export` the folder
that they write. A second one stops at once with exit code 9 and names the process, machine and time of the
first. The lock of `NAME` is the file `.NAME.lock` beside it, held with flock(2) and removed at the end;
when its holder was killed, the kernel has released it, and the file that is left does no harm. A lock that
another machine left, on a network drive, is not taken: the message says what to remove when nothing runs
there any more. Readers need no lock, since what they read appears whole: `generate`, `evaluate`, `fuse` and
`export` see the state before a save or the one after it.

## Disk and memory

Before long work both are said on stderr: what is needed and what can be had. What cannot end well is
refused with exit code 6 before anything is written. The need of memory is an estimate of what the process
holds at most, with what is loaded, right within a factor of 1.5: resident memory, or addresses where
`ulimit -v` is what is nearest to its end, or the memory of the GPU. What can be had is the least of what the
machine, its control groups and `ulimit -v` allow; of several ranks on one machine, each is promised its part.
Where a batch that is only measured or a prompt does not fit whole, it is taken in smaller parts. Where there
turns out to be too little at work, the process ends with one line and 6, and the last checkpoint goes on.
"""

_MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.USAGE: "usage and configuration: a command line, recipe or option that makes no sense",
    ExitCode.DATA: "data: rows that cannot be read or used",
    ExitCode.MODEL: "model, adapter or tokenizer that is damaged or does not fit",
    ExitCode.SAFETY: "refused for safety, such as code in a checkpoint or a folder that holds something else",
    ExitCode.RESOURCE: "disk, memory and limits",
    ExitCode.DIVERGED: "diverged: a loss, a gradient or logits that are not finite",
    ExitCode.PLUGIN: "plugin: missing, broken or incompatible",
    ExitCode.LOCKED: "locked: another run holds the folder",
    ExitCode.RANK: "another [rank](several-machines.md#when-a-rank-is-lost) of the same training is lost, "
    "has failed, or differs",
    ExitCode.DEFECT: "a defect of mlxlora",
}


def text() -> str:
    """The whole page."""
    codes = "".join(f"- {int(code)}: {_MEANINGS[code]}\n" for code in ExitCode)
    return HEAD + codes + TAIL + "".join(verb(name, command) for name, command in commands().items())


def verb(name: str, command: click.Command) -> str:
    """The part about one verb: usage, what it does, and every option."""
    ctx = click.Context(command, info_name=f"mlxlora {name}", **command.context_settings)
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    lines = [f"\n## mlxlora {name}\n", f"```\n{usage}\n```\n", inspect.cleandoc(command.help or "") + "\n"]
    for title, options in declare.sections(command, ctx).items():
        if title != declare.COMMON:
            lines.append(f"\n{title}:\n")
        elif len(lines) > 3:  # there are sections before
            lines.append("\nOthers:\n")
        for flags, meaning in filter(None, (option.get_help_record(ctx) for option in options)):
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
