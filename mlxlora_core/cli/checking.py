"""Has plugins checked in a process of its own, and gathers what it finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.cli import show
from mlxlora_core.errors import PluginError
from mlxlora_core.files import durable
from mlxlora_core.machine.children import safe_environment, safe_python
from mlxlora_core.plugins import ALLOW_LIST, GROUP
from mlxlora_core.plugins.targets import PROJECT, Target

Finding = Mapping[str, Any]

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
            ``got``, ``want``, ``where`` and ``why``.
    """

    plugins: list[dict[str, Any]]
    checks: list[dict[str, Any]]


def check(targets: Sequence[Target]) -> Checked:
    """What the suites say to everything that some plugins give.

    Raises:
        PluginError: the process ended before it was done.
    """
    with tempfile.TemporaryDirectory(prefix="mlxlora-check-") as folder:
        return _gathered(list(_findings(targets, Path(folder))))


# --- the process --------------------------------------------------------------


def _findings(targets: Sequence[Target], folder: Path) -> Iterator[Finding]:
    """What the process tells, as it comes; the bar shows how far it is."""
    reader, writer = os.pipe()
    job = folder / "job.json"
    plugins = [{"name": t.name, "distribution": t.distribution, "value": t.value} for t in targets]
    tests = list(dict.fromkeys(str(t.tests) for t in targets if t.tests is not None))
    settings = str(_settings(targets, folder))
    durable.write_json(job, {"plugins": plugins, "tests": tests, "settings": settings, "out": writer})
    command = safe_python("-m", "mlxlora_core.testing.check", str(job))
    with (folder / "stderr").open("w+b") as stderr, show.Bar() as bar:
        process = subprocess.Popen(
            command,
            env=_environment(targets, folder),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=[writer],
        )
        os.close(writer)
        try:
            running = ""
            with open(reader, encoding="utf-8") as pipe:
                for finding in map(json.loads, pipe):
                    running = finding.get("running", running)
                    if "running" in finding:
                        bar.move("checking", finding["done"], finding["count"])
                    else:
                        yield finding
            process.wait()
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            stderr.seek(0)
            raise _ended(process.returncode, running, stderr.read().decode("utf-8", "replace"))


def _settings(targets: Sequence[Target], folder: Path) -> Path:
    """The settings of pytest that count: those of a distribution that is checked alone, or none."""
    folders = {target.folder for target in targets}
    only = folders.pop() if len(folders) == 1 else None
    if only is not None and (only / PROJECT).is_file():
        return only / PROJECT
    durable.write_text(folder / "pytest.ini", "[pytest]\n")
    return folder / "pytest.ini"


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


def _ended(code: int, running: str, stderr: str) -> PluginError:
    """The error that the process did not come to its end."""
    said = [line for line in stderr.splitlines() if line.strip()]
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
    what = f"the process that checks has ended {how}{f' in {running}' if running else ''}"
    return PluginError(f"{what}: {said[-1].strip()}" if said else what)


# --- what it finds ------------------------------------------------------------


def _gathered(findings: Sequence[Finding]) -> Checked:
    """The findings as one record a plugin, and one a thing that was tried."""
    plugins: dict[str, dict[str, Any]] = {}
    checks: dict[tuple[str, str], dict[str, Any]] = {}
    for one in findings:
        if "plugin" in one:
            known = plugins.setdefault(one["plugin"], {"name": one["plugin"]})
            known |= {key: one[key] for key in _OF_PLUGINS if key in one}
        key = one.get("component") or one.get("plugin") or "", one["test"].partition("[")[0]
        checks[key] = _worse(checks.get(key), one)
    return Checked(list(plugins.values()), list(checks.values()))


_OF_PLUGINS = ("distribution", "version", "components", "import_ms", "heavy")
_TOLD = ("plugin", "component", "kind", "suite", "test", "tried", "result", "got", "want", "where", "why")


def _worse(known: dict[str, Any] | None, one: Finding) -> dict[str, Any]:
    """One record of what was tried several times: the result that counts, and how often."""
    told = {key: one.get(key, "") for key in _TOLD}
    if known is not None and RESULTS.index(told["result"]) <= RESULTS.index(known["result"]):
        told = dict(known)
    times, failures = (known["times"], known["failures"]) if known is not None else (0, 0)
    tried, failed = one["result"] in ("passed", "failed"), one["result"] == "failed"
    return told | {"times": times + tried, "failures": failures + failed}
