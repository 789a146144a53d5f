"""Has plugins checked in a process of its own, and gathers what it finds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.cli.check_process import Finding, Job, findings
from mlxlora_core.files import durable
from mlxlora_core.machine.children import safe_environment
from mlxlora_core.plugins import ALLOW_LIST, GROUP
from mlxlora_core.plugins.targets import PROJECT, Target

#: results, the one that counts of several last
RESULTS = ("does not apply", "left out", "passed", "failed")


@dataclass(frozen=True)
class Checked:
    """What came of checking.

    Attributes:
        plugins: one a plugin: ``name``, ``distribution``, ``version``, ``components``, ``import_ms``
            and ``heavy``, the heavy modules that its import brings.
        checks: one a thing that was tried: ``plugin``, ``component``, ``kind``, ``test``, ``tried``,
            ``suite``, ``result`` of :data:`RESULTS`, ``times`` and ``failures`` of those that were tried,
            ``got``, ``want``, ``where``, ``why`` and ``missing``, what a suite does not say.
    """

    plugins: list[dict[str, Any]]
    checks: list[dict[str, Any]]


def check(targets: Sequence[Target], seconds: float) -> Checked:
    """What the suites say to everything that some plugins give.

    Args:
        targets: the plugins.
        seconds: that one case may take.

    Raises:
        PluginError: the process ended outside of all cases.
    """
    with tempfile.TemporaryDirectory(prefix="mlxlora-check-") as folder:
        return _gathered(targets, findings(_job(targets, Path(folder), seconds)))


# --- the process --------------------------------------------------------------


def _job(targets: Sequence[Target], folder: Path, seconds: float) -> Job:
    """What the process is to do."""
    plugins = [{"name": t.name, "distribution": t.distribution, "value": t.value} for t in targets]
    tests = list(dict.fromkeys(str(t.tests) for t in targets if t.tests is not None))
    plain = folder / "pytest.ini"
    durable.write_text(plain, "[pytest]\n")
    given = {"plugins": plugins, "tests": tests, "settings": str(_settings(targets) or plain)}
    given["trials"] = str(folder / "trials")
    return Job(given, plain, _environment(targets, folder), folder, seconds)


def _settings(targets: Sequence[Target]) -> Path | None:
    """The settings of pytest that count: those of a distribution that is checked alone, or none."""
    folders = {target.folder for target in targets}
    only = folders.pop() if len(folders) == 1 else None
    return only / PROJECT if only is not None and (only / PROJECT).is_file() else None


def _environment(targets: Iterable[Target], folder: Path) -> dict[str, str]:
    """The variables of a process that finds each target as if it were installed."""
    variables = safe_environment()
    variables.pop(ALLOW_LIST, None)
    roots = []
    for number, target in enumerate(targets):
        if target.root is not None:
            roots += [_installed_in(folder / str(number), target), str(target.root)]
    # The process works in another folder, where a relative entry would stand for something else.
    others = [os.path.abspath(e) for e in variables["PYTHONPATH"].split(os.pathsep) if e]
    return variables | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([*roots, *others])),
        "PYTHONDONTWRITEBYTECODE": "1",  # the author's folders stay as they are
    }


def _installed_in(folder: Path, target: Target) -> str:
    """A folder that says of a target what pip would when it has installed it."""
    info = folder / f"{target.distribution.replace('-', '_')}-{target.version}.dist-info"
    info.mkdir(parents=True)
    told = f"Metadata-Version: 2.1\nName: {target.distribution}\nVersion: {target.version}\n"
    durable.write_text(info / "METADATA", told)
    durable.write_text(info / "entry_points.txt", f"[{GROUP}]\n{target.name} = {target.value}\n")
    return str(folder)


# --- what it finds ------------------------------------------------------------


def _gathered(targets: Sequence[Target], found: Iterable[Finding]) -> Checked:
    """The findings as one record a plugin, and one a thing that was tried."""
    plugins: dict[str, dict[str, Any]] = {}
    for t in targets:
        told = {"name": t.name, "distribution": t.distribution, "version": t.version}
        plugins[t.name] = told | {"components": [], "import_ms": None, "heavy": []}
    checks: dict[tuple[str, str], dict[str, Any]] = {}
    for one in found:
        known = plugins.get(one.get("plugin", ""), {})
        known |= {key: one[key] for key in known if key in one}
        key = one.get("component") or one.get("plugin") or "", one["test"].partition("[")[0]
        checks[key] = _worse(checks.get(key), one)
    return Checked(list(plugins.values()), list(checks.values()))


_TOLD = (
    "plugin",
    "component",
    "kind",
    "suite",
    "test",
    "tried",
    "result",
    "got",
    "want",
    "where",
    "why",
    "missing",
)


def _worse(known: dict[str, Any] | None, one: Finding) -> dict[str, Any]:
    """One record of what was tried several times: the result that counts, and how often."""
    told = {key: one.get(key, "") for key in _TOLD}
    if known is not None and RESULTS.index(told["result"]) <= RESULTS.index(known["result"]):
        told = dict(known)
    times, failures = (known["times"], known["failures"]) if known is not None else (0, 0)
    tried, failed = one["result"] in ("passed", "failed"), one["result"] == "failed"
    return told | {"times": times + tried, "failures": failures + failed}
