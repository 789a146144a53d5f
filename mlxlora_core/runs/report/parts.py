"""Parts that several sections of the page are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from mlxlora_core.runs.report.html import Html, element

_LARGE = 1e6


def figure(name: str, title: str, unit: str, *series: tuple[str, str]) -> Html:
    """The place of the chart ``name`` of report.js; ``series`` are (style, label) of its legend."""
    legend = [element("li", element("i", class_=f"key {kind}"), label) for kind, label in series]
    return element(
        "figure",
        element("figcaption", element("b", title), " ", element("span", unit)),
        element("ul", *legend, class_="legend") if legend else None,
        element("div", class_="chart", data_chart=name),
        id=f"chart-{name}",
    )


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Iterable[int] = (),
    kind: str | None = None,
) -> Html:
    """A table whose first column names the row; ``numbers`` are the columns set to the right."""
    right = set(numbers)

    def cell(i: int, value: object) -> Html:
        style = "number" if i in right else None
        if i == 0:
            return element("th", value, scope="row", class_=style)
        return element("td", value, class_=style, dir="auto")

    return element(
        "table",
        element("caption", caption),
        element(
            "thead",
            element(
                "tr",
                *(
                    element("th", head, scope="col", class_="number" if i in right else None)
                    for i, head in enumerate(heads)
                ),
            ),
        )
        if any(heads)
        else None,
        element("tbody", *(element("tr", *(cell(i, value) for i, value in enumerate(row))) for row in rows)),
        class_=kind,
    )


def note(*children: object) -> Html:
    """A paragraph that explains."""
    return element("p", *children, class_="note")


def shown(value: object) -> str:
    """A value of a recipe as one would say it."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "empty"
    return str(value) if value != "" else "empty"


def counted(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_nats(loss: float) -> str:
    """A loss with four decimals, or as many digits as there are of a very large one."""
    return f"{loss:.4f}" if abs(loss) < _LARGE else f"{loss:.4g}"


def duration(seconds: float) -> str:
    """``2 h 5 min``, ``3 min 20 s`` or ``4.2 s``."""
    if not math.isfinite(seconds):
        return "a time that is not known"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours:,} h {left} min" if hours else f"{minutes} min {rest} s"
