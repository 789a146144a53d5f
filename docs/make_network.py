"""Write ``network.svg``, and the tables in ``several-machines.md``.

::

    python docs/make_network.py [--check]

The lines are reckoned by the model of ``benchmarks/workers/message_time.py``; the dots, and the table of
what was measured, are those of ``benchmarks/network.py``. With ``--check`` nothing is written; the exit
code is 1 when one of them is out of date.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from workers import cables  # noqa: E402  # from where it stands
from workers.message_time import Network, Overhead, message_seconds  # noqa: E402  # from where it stands

PICTURE = Path(__file__).with_name("network.svg")
PAGE = Path(__file__).with_name("several-machines.md")
FIGURES = ROOT / "benchmarks" / "results" / "network-amd-epyc-2.json"

#: what people have; delays one way. The last is as the one before it, told to forget nothing.
NETWORKS = (
    Network("Thunderbolt", 0.1e-3, 20e9),
    Network("10 Gbit/s Ethernet", 0.05e-3, 10e9),
    Network("1 Gbit/s Ethernet", 0.2e-3, 1e9),
    Network("100 Mbit/s Ethernet", 0.2e-3, 0.1e9),
    Network("Wi-Fi, 300 Mbit/s", 3e-3, 0.3e9),
    Network("two sites, 1 Gbit/s", 10e-3, 1e9),
    Network("the same, `tcp_slow_start_after_idle=0`", 10e-3, 1e9),
)
#: what machines take themselves, as two ranks on one loopback address do: 40 µs for a number, 0.4 ms for all
MACHINES = Overhead(packet=20e-6, byte=0.6e-9)
RANKS = (2, 4, 8, 16, 32, 64)
#: seconds of a step on one machine
STEPS = (1, 10, 60)
WANTED = 0.9
#: of what was measured, what stands in the picture: added delay in ms, and Gbit/s
SHOWN = ((0.0, 10.0), (0.2, 1.0), (1.0, 1.0), (5.0, 1.0), (20.0, 1.0))
COLOURS = ("#1b9e77", "#377eb8", "#7570b3", "#d95f02", "#c2185b")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 920, 470, 70, 200, 30, 50
LEAST_MS, MOST_MS = 1.0, 4000.0


def reckoned_ms(figures: dict[str, Any], network: Network, ranks: int) -> float:
    """The message of a step, in milliseconds."""
    idle = not network.name.endswith("=0`")
    return 1e3 * message_seconds(figures["numbers"], ranks, network, MACHINES, after_idle=idle)


def most_ranks(figures: dict[str, Any], network: Network, seconds: float) -> int:
    """With how many ranks up to 64 a step that one machine makes in so many seconds is fast enough."""

    def share(ranks: int) -> float:
        own = seconds / ranks
        return own / (own + reckoned_ms(figures, network, ranks) / 1e3)

    found = [ranks for ranks in range(2, max(RANKS) + 1) if share(ranks) >= WANTED]
    return max(found, default=1)


def reckoned_table(figures: dict[str, Any]) -> str:
    """What the message takes on networks that people have, and how many ranks that is enough for."""
    head = "| network | delay, one way | " + " | ".join(f"{n} ranks" for n in RANKS)
    lines = [head + " | " + " | ".join(f"{s} s" for s in STEPS) + " |"]
    lines.append("|---|---|" + "---|" * (len(RANKS) + len(STEPS)))
    for network in NETWORKS:
        times = " | ".join(_milliseconds(reckoned_ms(figures, network, ranks)) for ranks in RANKS)
        most = " | ".join(str(most_ranks(figures, network, seconds)) for seconds in STEPS)
        lines.append(f"| {network.name} | {1e3 * network.delay:g} ms | {times} | {most} |")
    return "\n".join(lines)


def measured_table(figures: dict[str, Any]) -> str:
    """What was measured, beside what the model gives."""
    lines = ["| delay added | rate | 2 ranks | 3 ranks | 4 ranks |", "|---|---|---|---|---|"]
    points = {(p["delay_ms"], p["rate_gbit"], p["ranks"]): p for p in figures["points"]}
    for delay, rate in dict.fromkeys((p["delay_ms"], p["rate_gbit"]) for p in figures["points"]):
        cells = []
        for ranks in (2, 3, 4):
            point = points[delay, rate, ranks]
            told = (point["measured_ms"]["after_idle"], point["reckoned_ms"]["after_idle"])
            cells.append(" / ".join(map(_milliseconds, told)))
        lines.append(f"| {delay:g} ms | {rate:g} Gbit/s | {' | '.join(cells)} |")
    return "\n".join(lines)


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def page(figures: dict[str, Any]) -> str:
    """The page with the tables between their marks."""
    text = PAGE.read_text("utf-8")
    for name, table in (("reckoned", reckoned_table), ("measured", measured_table)):
        begin, end = f"<!-- {name}: made by docs/make_network.py -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n\n{table(figures)}\n\n{end}{rest.partition(end)[2]}"
    return text


def draw(figures: dict[str, Any]) -> str:
    """The picture as SVG."""
    parts = [*_axes()]
    for (delay, rate), colour in zip(SHOWN, COLOURS, strict=True):
        network = Network("", delay / 1e3 + figures["least_delay"], rate * 1e9, cables.headers(rate * 1e9))
        overhead = Overhead(**figures["overhead"])
        line = [
            (ranks, 1e3 * message_seconds(figures["numbers"], ranks, network, overhead))
            for ranks in range(2, max(RANKS) + 1)
        ]
        path = " ".join(f"{_x(ranks):.1f},{_y(value):.1f}" for ranks, value in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for point in figures["points"]:
            if (point["delay_ms"], point["rate_gbit"]) == (delay, rate):
                x, y = _x(point["ranks"]), _y(point["measured_ms"]["after_idle"])
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
        told = f"{rate:g} Gbit/s, {delay:g} ms" if delay else f"{rate:g} Gbit/s, no delay added"
        y = _y(line[-1][1]) + 4
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y:.1f}" fill="{colour}">{told}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="13">'
    )
    title = (
        "<title>The message of a step by the number of ranks: measured (dots) and reckoned (lines)</title>"
    )
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    return "\n".join([head, title, ground, *parts, "</svg>"]) + "\n"


def _axes() -> list[str]:
    """Lines and numbers at both sides."""
    parts = []
    for value in (1, 10, 100, 1000):
        y, label = _y(value), f"{value} ms" if value < 1000 else "1 s"
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#444444">{label}</text>')
    for ranks in (2, 3, 4, 8, 16, 32, 64):
        x = _x(ranks)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#eeeeee"/>')
        y = HEIGHT - BOTTOM + 18
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle" fill="#444444">{ranks}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle" fill="#444444">ranks</text>')
    return parts


def _x(ranks: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(ranks) - 1) / (math.log2(max(RANKS)) - 1)


def _y(milliseconds: float) -> float:
    share = math.log(milliseconds / LEAST_MS) / math.log(MOST_MS / LEAST_MS)
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def main() -> int:
    """Write both, or say whether they are up to date."""
    figures = json.loads(FIGURES.read_text("utf-8"))
    made = {PICTURE: draw(figures), PAGE: page(figures)}
    if "--check" in sys.argv[1:]:
        return int(any(path.read_text("utf-8") != text for path, text in made.items()))
    for path, text in made.items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
