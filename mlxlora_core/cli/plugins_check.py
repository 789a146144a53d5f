"""``mlxlora plugins check``: the conformance suites over plugins, without a test file of their author's."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.checking import Checked, check
from mlxlora_core.cli.groups import CONTEXT
from mlxlora_core.cli.session import DEBUG_OPTION, JSON_OPTION, Verb
from mlxlora_core.errors import PluginError, UsageError, one_line
from mlxlora_core.plugins.targets import find_targets

_DEFINE = "define \0"
SECONDS = 60  # that a case may take


@click.command("check", cls=Verb, context_settings=CONTEXT)
@click.argument("targets", nargs=-1, type=declare.NAME_OR_PATH, metavar="[NAME|PATH]...")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=86400),
    default=SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="Seconds after which a case that has not ended has failed.",
)
@JSON_OPTION
@DEBUG_OPTION
def command(targets: Sequence[str], timeout: float, as_json: bool) -> None:
    """Try plugins as their kinds promise, without a test of yours.

    Each is an installed plugin, the folder of a distribution, which need not be
    installed, or a file; without any, it is the folder that you are in. All that it
    gives goes through the conformance suite of its kind, in a process of its own.
    What only you can say, such as files that a loader reads, is taken from the
    suites in the folder `tests` of a distribution, and left out where there are none.
    A case that ends the process or does not end has failed, and the others are tried.
    """
    found = [target for text in targets or (".",) for target in find_targets(text)]
    if importlib.util.find_spec("pytest") is None:
        raise UsageError("the suites need pytest, which is not there", fix="pip install 'mlxlora[testing]'")
    checked = check(found, timeout)
    if as_json:
        show.as_json({"plugins": checked.plugins, "checks": checked.checks})
    else:
        _show(checked)
    failed = [one for one in checked.checks if one["result"] == "failed"]
    if failed:
        names = ", ".join(dict.fromkeys(target.name for target in found))
        raise PluginError(f"{len(failed)} of {len(checked.checks)} checks failed", where=names)


def _show(checked: Checked) -> None:
    """Print the plugins, a table of what was tried, and what failures are about."""
    for plugin in checked.plugins:
        took = plugin["import_ms"]
        import_told = "" if took is None else f", imported in {took} ms"
        named = one_line(f"{plugin['name']} ({plugin['distribution']} {plugin['version']})")
        show.result(f"{named}: {' '.join(plugin['components']) or 'no component'}{import_told}")
    rows = [(_whose(one), one["tried"], _result(one)) for one in checked.checks if not one["why"]]
    rows += _untried(checked.checks)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    show.table(("component", "tried", "result"), rows, width)
    counts = Counter(one["result"] for one in checked.checks)
    show.result(f"{counts['passed']} checks passed, {counts['failed']} failed, {counts['left out']} left out")
    for one in checked.checks:
        if one["result"] == "failed":
            show.result(f"\nfailed: {one_line(_whose(one))}: {one_line(one['test'])}")
            for title in ("tried", "got", "want", "where"):
                if one[title]:
                    show.result(f"  {title:<6}{one_line(one[title])}")


def _untried(checks: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """The rows about what was not tried: one a reason, and one for all that is to be defined."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in checks:
        if one["why"]:
            why = one["why"].replace(f"define {one['missing']}", _DEFINE, 1) if one["missing"] else one["why"]
            grouped.setdefault((_whose(one), f"{one['result']}: {why}"), []).append(one)
    for (whose, said), alike in grouped.items():
        names = ", ".join(dict.fromkeys(one["missing"] for one in alike))
        tried = alike[0]["tried"] if len(alike) == 1 else f"{len(alike)} more checks"
        yield whose, tried, said.replace(_DEFINE, f"define {names}", 1)


def _whose(one: Mapping[str, Any]) -> str:
    """What a check is about: a component or a plugin, or a test file that was not read."""
    return f"{one['kind']} {one['component']}" if one["component"] else str(one["plugin"])


def _result(one: dict[str, Any]) -> str:
    """How a check has ended, in a cell."""
    if one["result"] == "failed" and one["times"] > 1:
        return f"failed, {one['failures']} of {one['times']}"
    if one["result"] == "passed" and one["times"] > 1:
        return f"passed, {one['times']} times"
    return str(one["result"])
