"""The process in which plugins are checked: ``python -m mlxlora_core.testing.check JOB``.

JOB is a file of JSON: ``plugins``, of which each has ``name``, ``distribution`` and ``value`` of its
entry point; ``tests``, folders with test files of their authors; ``settings``, a file of settings of
pytest; ``trials``, a folder for what tests write; ``out``, the number of an open file that findings are
written to, a line of JSON each. A line with ``running`` names what begins, and has in ``about`` what is
to be told of it if it ends the process or does not end; ``seen`` are the names that an earlier process
has begun, ``failed`` those that have ended it, and ``seconds`` is how long one may take. The last line
has ``ended``.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import mlxlora_core.api  # noqa: F401  # so that what it takes is not put down to a plugin
from mlxlora_core.errors import listing
from mlxlora_core.options import explain
from mlxlora_core.plugins import ALLOW_LIST, Component, Plugin, Registry, load
from mlxlora_core.plugins.plugin import normal_name
from mlxlora_core.testing.public import DOORS, private_imports

#: what no plugin may import before it is used
HEAVY = (
    *("mlx", "numpy", "torch", "tensorflow", "jax", "transformers", "tokenizers", "sentencepiece"),
    *("safetensors", "datasets", "pandas", "scipy", "sklearn", "matplotlib", "huggingface_hub"),
)

_OWN_SECONDS = 120.0  # that what is no work of a plugin may take
_CONFTEST = "The conftest.py of its author can be read."
_DOORS = "It imports nothing of mlxlora but what is public."
_HELPED = "Every option has a sentence of help."
_LOADED = "Its module can be imported; its hooks are known, its specs whole."


class Progress:
    """Tells what begins and what is found, to the process that waits for it.

    What has nothing to tell of it is no work of a plugin.

    Args:
        job: as this module says.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.seen, self.failed = frozenset(job["seen"]), frozenset(job["failed"])
        self._out, self._seconds = job["out"], job["seconds"]
        self._stderr = os.dup(2)  # pytest puts a file in place of the other one

    def tell(self, finding: Mapping[str, Any]) -> None:
        """Tell a finding."""
        os.write(self._out, json.dumps(finding).encode() + b"\n")

    def begin(self, name: str, about: Mapping[str, Any], **more: Any) -> None:
        """Tell that something begins, and have it said on stderr where it stands if it takes too long."""
        seconds = self._seconds if about else max(self._seconds, _OWN_SECONDS)
        self.tell({"running": name, "about": about, "seconds": seconds, **more})
        faulthandler.dump_traceback_later(seconds, file=self._stderr)


def main(job: Path) -> int:
    """Check the plugins of a job; the exit code is 0 when that could be done, whatever was found."""
    faulthandler.enable()
    given = json.loads(job.read_text("utf-8"))
    progress = Progress(given)
    for wanted in given["plugins"]:
        _import(wanted, progress)
    for wanted in given["plugins"]:
        _load(wanted, progress)
    progress.begin("all", {})
    gone = [one for one in given["plugins"] if _trials(one) & progress.failed]
    registry = load([f"no:{_id(one)}" for one in gone])
    plugins = [_found(registry, wanted) for wanted in given["plugins"]]
    return _tried(given, [c for c in registry.components if c.plugin in plugins], progress)


def _tried(given: Mapping[str, Any], components: Sequence[Component], progress: Progress) -> int:
    """Let the suites of some components run; the exit code of pytest, where it could not do that."""
    from mlxlora_core.machine.device import prepare_device
    from mlxlora_core.testing import checked
    from mlxlora_core.testing.findings import Findings

    prepare_device()
    quiet = (
        *("-c", given["settings"], "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="),
        *("-W", "ignore", "--continue-on-collection-errors", f"--basetemp={given['trials']}"),
    )
    names = ", ".join(dict.fromkeys(one["name"] for one in given["plugins"]))
    progress.begin("conftest", {"plugin": names, "test": "conftest.py", "tried": _CONFTEST})
    findings = Findings(components, progress)
    code = pytest.main([*quiet, str(checked.__file__), *given["tests"]], plugins=[findings])
    by = "KeyboardInterrupt" if code == pytest.ExitCode.INTERRUPTED else f"pytest, with exit code {int(code)}"
    ended = 0 if code in (0, 1, 2, 5) and not findings.left else int(code) or 1
    progress.tell({"ended": ended, "by": by})
    return ended


# --- loading them -------------------------------------------------------------


def _load(wanted: Mapping[str, str], progress: Progress) -> None:
    """Tell whether a plugin can be loaded: it alone, so that it is known if the process ends in it."""
    name = f"load {_id(wanted)}"
    if name in progress.seen or _trials(wanted) & progress.failed:
        return
    progress.begin(name, {"plugin": wanted["name"], "test": "load", "tried": _LOADED})
    registry = load(environ={ALLOW_LIST: _id(wanted)})
    plugin = _found(registry, wanted)
    progress.tell(_loaded(plugin))
    private = private_imports(plugin)
    told = {"plugin": wanted["name"], "test": "doors", "tried": _DOORS}
    failed = {"result": "failed", "got": listing(private), "want": listing(DOORS)}
    progress.tell(told | (failed if private else {"result": "passed"}))
    for component in registry.components:
        if component.plugin == plugin and explain(component.spec.options):
            progress.tell(_helped(component))


def _helped(component: Component) -> dict[str, Any]:
    """Whether every option of a component has a sentence of help."""
    bare = [option.name for option in explain(component.spec.options) if not option.help.strip()]
    told = {"component": component.id, "kind": component.kind, "test": "help", "tried": _HELPED}
    failed = {"result": "failed", "got": f"none of {listing(bare)}", "want": 'option(..., help="a sentence")'}
    return told | (failed if bare else {"result": "passed"})


def _id(plugin: Mapping[str, str]) -> str:
    return f"{plugin['distribution']}/{plugin['name']}"


def _trials(plugin: Mapping[str, str]) -> set[str]:
    """The names of what a plugin may end the process in before it is used."""
    return {f"import {_id(plugin)}", f"load {_id(plugin)}"}


def _found(registry: Registry, wanted: Mapping[str, str]) -> Plugin:
    """The plugin of an entry point."""
    return next(
        plugin
        for plugin in registry.plugins
        if (plugin.name, plugin.value) == (wanted["name"], wanted["value"])
        and normal_name(plugin.distribution) == normal_name(wanted["distribution"])
    )


def _loaded(plugin: Plugin) -> dict[str, Any]:
    """Whether a plugin keeps the rules of the door: its hooks are known, its specs are whole."""
    told: dict[str, Any] = {"plugin": plugin.name, "test": "load", "tried": _LOADED}
    told |= {"distribution": plugin.distribution, "version": plugin.version}
    told |= {"components": [f"{kind}:{name}" for kind, name in plugin.components]}
    if plugin.status == "active":
        return told | {"result": "passed"}
    return told | {"result": "failed", "got": plugin.reason}


# --- what its import costs ----------------------------------------------------


def _import(wanted: Mapping[str, str], progress: Progress) -> None:
    """Tell what the import of a plugin costs, in a process that has imported nothing of this kind."""
    name = f"import {_id(wanted)}"
    if name in progress.seen:
        return
    told = {"plugin": wanted["name"], "test": "import", "tried": "Its import brings nothing heavy."}
    progress.begin(name, told)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(_measured(wanted["value"].partition(":")[0])).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
    found: dict[str, Any] = json.loads(said) if said else {"import_ms": None, "heavy": []}
    heavy = {"result": "failed", "got": ", ".join(found["heavy"]), "want": "imports inside functions"}
    progress.tell(told | found | (heavy if found["heavy"] else {"result": "passed"}))


def _measured(module: str) -> dict[str, Any]:
    """The milliseconds that an import takes, and the heavy modules that it brings."""
    started = time.perf_counter()
    try:
        importlib.import_module(module)
    except BaseException:  # loading it tells the reason
        return {"import_ms": None, "heavy": []}
    took = time.perf_counter() - started
    return {"import_ms": round(1000 * took, 1), "heavy": [name for name in HEAVY if name in sys.modules]}


if __name__ == "__main__":
    os._exit(main(Path(sys.argv[1])))  # at once: a thread that a plugin has left would hold it up
