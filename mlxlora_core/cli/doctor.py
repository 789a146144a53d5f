"""``mlxlora doctor``: what there is on this machine, and what would make it faster."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.cli import show
from mlxlora_core.cli.session import JSON_OPTION, verb
from mlxlora_core.errors import MlxloraError, one_line
from mlxlora_core.machine import doctor
from mlxlora_core.machine.processors import THREADS
from mlxlora_core.options import plain
from mlxlora_core.plugins import Registry, start_runtimes
from mlxlora_core.runtime_started import RuntimeStarted

_NO_RUNTIME = "MLX's own: no runtime has changed it"


@dataclass(frozen=True)
class _Products:
    """Matrix products: what computes them, GFLOP/s, GFLOP/s in a process without a runtime, and with each
    library where there are several: the fastest is used from now on."""

    by: str
    gflops: float | None
    stock_gflops: float | None
    libraries: Mapping[str, float | None]


@verb(JSON_OPTION, tolerant=True)
def command(registry: Registry, as_json: bool) -> None:
    """Say what mlxlora finds on this machine, and what would make it faster.

    Takes a second or two, for it measures matrix products with and without the
    runtimes, and some more where there are several libraries for them: the
    fastest is used from then on. The exit code is 0 also when parts are missing.
    """
    found, error = _device()
    products, warnings = _products(registry, found) if found else (None, [])
    spread = doctor.threads()
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "device": plain(found) if found else {"error": error},
        "products": plain(products),
        "threads": plain(spread),
        "memory": plain(doctor.memory()),
        "disk": plain(doctor.disk(Path())),
        "versions": doctor.versions(),
        "plugins": [show.plugin(plugin) for plugin in registry.plugins],
        "advice": doctor.advice(found, warnings, spread),
    }
    if as_json:
        show.as_json(facts)
    else:
        _print(facts)


def _device() -> tuple[doctor.Device | None, str]:
    """The device, or why there is none."""
    try:
        return doctor.device(), ""
    except ImportError as fault:
        return None, one_line(fault)


def _products(registry: Registry, device: doctor.Device) -> tuple[_Products, list[str]]:
    """Matrix products here, and what the runtimes warn of or advise."""
    stock = doctor.stock_matmul_gflops() if device.backend == "cpu" else None
    notes = start_runtimes(registry)
    by = "; ".join(note.text for note in notes if not note.warning) or _NO_RUNTIME
    advice = [line for note in notes for line in (note.text if note.warning else "", note.advice) if line]
    rate = doctor.matmul_gflops()
    libraries: dict[str, float | None] = {}
    for note in notes:
        faults, rates = _choose(note)
        advice, libraries = advice + faults, libraries | rates
    return _Products(by, _known(rate), _known(stock), libraries), advice


def _choose(note: RuntimeStarted) -> tuple[list[str], dict[str, float | None]]:
    """Measure what a runtime could use, and let it remember the fastest; what went wrong, and the rates."""
    choices = list(note.alternatives()) if note.alternatives is not None else []
    rates = [_known(doctor.runtime_matmul_gflops(variables)) for variables in choices]
    names = [" ".join(variables.values()) for variables in choices]
    faults = []
    if note.prefer is not None and any(rates):
        fastest = max(range(len(choices)), key=lambda i: rates[i] or 0)
        try:
            note.prefer(choices[fastest])
        except (MlxloraError, OSError) as fault:
            faults.append(f"{names[fastest]} is the fastest, and that cannot be remembered: {fault}")
    return faults, dict(zip(names, rates, strict=True))


def _known(rate: float | None) -> float | None:
    """A rate that could be measured, else None."""
    return rate if rate is not None and math.isfinite(rate) else None


def _print(facts: dict[str, Any]) -> None:
    """The facts for a person, a line each."""
    rows = [("system", facts["system"]), *_computing(facts["device"], facts["products"])]
    rows += [("threads", _threads(facts["threads"])), ("memory", _memory(facts["memory"]))]
    disk = facts["disk"]
    rows.append(
        ("disk", f"{_gb(disk['free_bytes'])} free of {_gb(disk['total_bytes'])} for {disk['folder']}")
    )
    rows.append(("versions", ", ".join(f"{k} {v or 'missing'}" for k, v in facts["versions"].items())))
    for what, text in rows:
        show.result(f"{what:<10}{one_line(text)}")
    show.result()
    show.table(
        ("plugin", "distribution", "version", "origin", "status"),
        [
            [p[key] for key in ("name", "distribution", "version", "origin", "status")]
            for p in facts["plugins"]
        ],
    )
    for plugin in facts["plugins"]:
        if plugin["reason"]:
            show.result(one_line(f"{plugin['name']}: {plugin['status']}: {plugin['reason']}"))
    show.result()
    for line in facts["advice"] or ["nothing to install or to set for more speed"]:
        show.result(f"advice    {one_line(line)}")


def _computing(device: Any, products: Any) -> list[tuple[str, str]]:
    """The lines about what computes."""
    if products is None:
        return [("device", f"none: {device['error']}")]
    stock = products["stock_gflops"]
    if products["gflops"] is None:
        return [("device", device["name"]), ("products", "unknown: the clock stands still")]
    rate = f"{products['gflops']:.1f} GFLOP/s"
    if stock:
        rate += f", {products['gflops'] / stock:.1f} times stock ({stock:.1f})"
    kind = (
        device["kind"] if device["kind"] == device["backend"] else f"{device['kind']} ({device['backend']})"
    )
    rows = [("device", f"{kind}, {device['name']}"), ("products", rate), ("blas", products["by"])]
    measured = products["libraries"]
    if measured:
        fastest = max(measured, key=lambda name: measured[name] or 0)
        told = ", ".join(f"{n} {'cannot' if r is None else f'{r:.0f}'}" for n, r in measured.items())
        rows.append(("libraries", f"GFLOP/s: {told}; from now on {fastest}"))
    return rows


def _threads(threads: Any) -> str:
    quota = "none" if threads["quota"] is None else f"{threads['quota']:g}"
    count = "unclear" if threads["count"] is None else threads["count"]
    return (
        f"{count} of {threads['machine']} processors (affinity {threads['allowed']}, cgroup quota {quota}, "
        f"{THREADS} {threads['variable'] or 'unset'})"
    )


def _memory(memory: Any) -> str:
    limit = memory["limit_bytes"]
    return (
        f"{_gb(memory['total_bytes'])}, {_gb(memory['available_bytes'])} available, "
        f"cgroup limit {'none' if limit is None else _gb(limit)}"
    )


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.2f} GB"
