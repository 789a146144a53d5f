"""How results look: for the terminal, and for docs/performance.md."""

from __future__ import annotations

from typing import Any

#: between which two lines of the page a table stands
Marks = tuple[str, str]
PEERS: Marks = ("<!-- peers: made by benchmarks/peers.py -->", "<!-- end of peers -->")
GPU: Marks = ("<!-- gpu: made by benchmarks/gpu.py -->", "<!-- end of gpu -->")


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row how many times as fast mlxlora is: its first row of the same work by this one."""
    for row in rows:
        ours = next(other for other in rows if _work(other) == _work(row))
        if "median" in row and "median" in ours:
            row["ratio"] = ratio(ours["median"], row["median"], row["unit"])


def _work(row: dict[str, Any]) -> tuple[str, str, bool]:
    """What was done, whoever did it."""
    return row["shape"], row["kind"], row.get("adapter", False)


def ratio(ours: float, theirs: float, unit: str) -> float:
    """How many times as fast ``ours`` is; of seconds, fewer are faster."""
    return theirs / ours if unit == "seconds" else ours / theirs


def text(result: dict[str, Any]) -> str:
    """A table for the terminal."""
    rows = [_HEAD, *(_cells(row) for row in result["rows"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([_preface(result), "", *lines])


def markdown(result: dict[str, Any]) -> str:
    """The table for the page."""
    lines = [_HEAD, ["---"] * len(_HEAD), *(_cells(row) for row in result["rows"])]
    return "\n".join([_preface(result), "", *("| " + " | ".join(line) + " |" for line in lines)])


def replaced(page: str, made: str, marks: Marks = PEERS) -> str:
    """``page`` with ``made`` between two marks."""
    begin, end = marks
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


_HEAD = ["shape", "work", "tool", "weights", "adapter", "median", "lowest to highest", "samples"]
_HEAD += ["mlxlora is", "MFU", "peak memory"]


def _preface(result: dict[str, Any]) -> str:
    """When, where and with what."""
    here, device = result["machine"], result["machine"]["device"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in result["rates"].items())
    compiled = ", ".join(
        f"{row['tool']} {row['compiles']} ({row['shape']}, {row['kind']})"
        for row in result["rows"]
        if row.get("compiles")
    )
    steps = f" Times that a training step was compiled: {compiled}." if compiled else ""
    quick = " (quick)" if result["quick"] else ""
    return (
        f"{result['date']}{quick}: {device['name']}, {here['threads']} threads, "
        f"{here['memory_bytes'] / 1e9:.0f} GB, {here['system']}; {versions}. Matrix products: {rates}.{steps}"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    """One row as text."""
    start = [row["shape"], row["kind"], row["tool"], row.get("weights", "")]
    start.append("yes" if row.get("adapter") else "")
    if "error" in row:
        return [*start, f"failed: {row['error'][:60]}", *[""] * (len(_HEAD) - 6)]
    unit = {"seconds": "s"}.get(row["unit"], row["unit"])
    return [
        *start,
        f"{row['median']:.4g} {unit}",
        f"{row['low']:.4g} to {row['high']:.4g}",
        str(row["samples"]),
        "" if row["tool"] == "mlxlora" else f"{row['ratio']:.2f} times as fast",
        f"{row['mfu']:.2f}" if "mfu" in row else "",
        f"{max(row['peak_rss_bytes'], row.get('device_bytes', 0)) / 1e9:.2f} GB",
    ]
