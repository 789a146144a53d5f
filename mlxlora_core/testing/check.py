"""The process in which plugins are checked: ``python -m mlxlora_core.testing.check JOB``.

JOB is a file of JSON: ``plugins``, of which each has ``name``, ``distribution`` and ``value`` of its
entry point; ``tests``, folders with test files of their authors; ``settings``, a file of settings of
pytest; ``out``, the number of an open file that findings are written to, a line of JSON each.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import mlxlora_core.api  # noqa: F401  # so that what it takes is not put down to a plugin
from mlxlora_core.plugins import Plugin, Registry, load
from mlxlora_core.plugins.plugin import normal_name

#: what no plugin may import before it is used
HEAVY = (
    *("mlx", "numpy", "torch", "tensorflow", "jax", "transformers", "tokenizers", "sentencepiece"),
    *("safetensors", "datasets", "pandas", "scipy", "sklearn", "matplotlib", "huggingface_hub"),
)

_LOADED = "Its module can be imported; its hooks are known, its specs whole."


def main(job: Path) -> int:
    """Check the plugins of a job; the exit code is 0 when that could be done, whatever was found."""
    given = json.loads(job.read_text("utf-8"))
    tell = partial(_tell, given["out"])
    for wanted in given["plugins"]:
        tell({"plugin": wanted["name"], **_imported(wanted["value"])})
    registry = load()
    plugins = [_found(registry, wanted) for wanted in given["plugins"]]
    for plugin in plugins:
        tell(_loaded(plugin))
    components = [c for c in registry.components if c.plugin in plugins]
    from mlxlora_core.machine.device import prepare_device
    from mlxlora_core.testing import checked
    from mlxlora_core.testing.findings import Findings

    prepare_device()
    quiet = (
        "-c",
        given["settings"],
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "addopts=",
        "-W",
        "ignore",
    )
    files = (f"--basetemp={job.parent / 'trials'}", str(checked.__file__), *given["tests"])
    code = pytest.main([*quiet, *files], plugins=[Findings(components, tell)])
    return 0 if code in (0, 1, 2, 5) else int(code)


def _tell(out: int, finding: Mapping[str, Any]) -> None:
    os.write(out, json.dumps(finding).encode() + b"\n")


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


def _imported(value: str) -> dict[str, Any]:
    """What the import of an entry point costs, in a process that has imported nothing of this kind."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(_measured(value.partition(":")[0])).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    found: dict[str, Any] = json.loads(said) if said else {"import_ms": None, "heavy": []}
    told = {"test": "import", "tried": "Its import brings nothing heavy.", **found}
    if not found["heavy"]:
        return told | {"result": "passed"}
    return told | {"result": "failed", "got": ", ".join(found["heavy"]), "want": "imports inside functions"}


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
    sys.exit(main(Path(sys.argv[1])))
