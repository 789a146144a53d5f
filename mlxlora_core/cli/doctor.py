"""``mlxlora doctor``: what there is on this machine, and what would make it faster."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlxlora_core.cli import show
from mlxlora_core.cli.session import JSON_OPTION, verb
from mlxlora_core.errors import one_line
from mlxlora_core.machine import doctor
from mlxlora_core.machine.processors import THREADS
from mlxlora_core.options import plain
from mlxlora_core.plugins import Registry, start_runtimes

_NO_RUNTIME = "MLX's own: no runtime has changed it"


@dataclass(frozen=True)
class _Products:
    """Matrix products: what computes them, GFLOP/s, and GFLOP/s in a process without a runtime."""

    by: str
    gflops: float | None
    stock_gflops: float | None


@verb(JSON_OPTION, tolerant=True)
def command(registry: Registry, as_json: bool) -> None:
    """Say what mlxlora finds on this machine, and what would make it faster.

    Takes a second or two, for it measures matrix products with and without the
    runtimes. The exit code is 0 also when parts are missing.
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
    return _Products(by, doctor.matmul_gflops(), stock), advice


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
        click.echo(f"{what:<10}{one_line(text)}")
    click.echo()
    show.table(
        ("plugin", "distribution", "version", "origin", "status"),
        [
            [p[key] for key in ("name", "distribution", "version", "origin", "status")]
            for p in facts["plugins"]
        ],
    )
    for plugin in facts["plugins"]:
        if plugin["reason"]:
            click.echo(one_line(f"{plugin['name']}: {plugin['status']}: {plugin['reason']}"))
    click.echo()
    for line in facts["advice"] or ["nothing to install or to set for more speed"]:
        click.echo(f"advice    {one_line(line)}")


def _computing(device: Any, products: Any) -> list[tuple[str, str]]:
    """The lines about what computes."""
    if products is None:
        return [("device", f"none: {device['error']}")]
    stock = products["stock_gflops"]
    rate = f"{products['gflops']:.1f} GFLOP/s"
    if stock is not None:
        rate += f", {products['gflops'] / stock:.1f} times stock ({stock:.1f})"
    kind = (
        device["kind"] if device["kind"] == device["backend"] else f"{device['kind']} ({device['backend']})"
    )
    return [("device", f"{kind}, {device['name']}"), ("products", rate), ("blas", products["by"])]


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
