"""Write ``architecture.svg``, and the list of files in ``architecture.md``.

::

    python docs/make_architecture.py [--check]

The picture is drawn from the imports: a room stands above all that it imports,
and where an arrow leads, so do all ways on from there. The list has the first
line of each module's docstring. With ``--check`` nothing is written; the exit
code is 1 when one of them is out of date.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).with_name("architecture.svg")
PAGE = PICTURE.with_suffix(".md")
BEGIN, END = "<!-- files: made by docs/make_architecture.py -->", "<!-- end of files -->"

#: what a room is for, in the words that stand in its box
WORDS = {
    "cli": "one module a verb",
    "python": "the same for scripts",
    "runs": "recipes, stages, the report",
    "testing": "suites for plugin authors",
    "training": "rows to an adapter",
    "server": "the OpenAI protocol",
    "serving": "many requests at once",
    "model": "linears, adapters, folders, text",
    "plugins": "found, checked, looked up",
    "chat": "templates in a sandbox",
    "distributed": "ranks: started, joined, watched",
    "files": "bytes in and out",
    "machine": "processors, memory, device",
    "the door": "what plugins import",
    "the shelf": "loaders, models, adapters, …",
}
HEAVY = {"model", "server", "serving", "training"}  # they compute with tensors
WIDTH, BOX_WIDTH, BOX_HEIGHT, FLOOR_HEIGHT = 920, 230, 62, 120


def room_of(module: str) -> str | None:
    """The room that a module of ours stands in; None for everybody else's."""
    parts = module.split(".")
    if parts[0] == "mlxlora_core":
        package = len(parts) > 1 and (ROOT / parts[0] / parts[1]).is_dir()
        return parts[1] if package else "the door"
    return "the shelf" if (ROOT / "plugins" / parts[0]).is_dir() else None


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows() -> dict[tuple[str, str], int]:
    """(room, room that it imports) -> in how many files."""
    found: dict[tuple[str, str], int] = {}
    for top in (ROOT / "mlxlora_core", ROOT / "plugins"):
        base = ROOT if top.name == "mlxlora_core" else top
        for path in sorted(top.rglob("*.py")):
            here = room_of(".".join(path.relative_to(base).with_suffix("").parts))
            there = {room for module in imports(path) if (room := room_of(module))} - {here}
            for room in there:
                if here:
                    found[here, room] = found.get((here, room), 0) + 1
    # The door hands on what others hold, so an arrow out of it would only lead back.
    return {pair: count for pair, count in found.items() if pair[0] != "the door"}


def floors(pairs: Mapping[tuple[str, str], int]) -> dict[str, int]:
    """room -> floor: one above the highest that it imports."""
    known: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in known:
            known[room] = 1 + max((floor(b) for a, b in pairs if a == room), default=-1)
        return known[room]

    return {room: floor(room) for room in WORDS}


def straight(pairs: Mapping[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The arrows without those that a longer way through other rooms leads along too."""

    def below(room: str) -> set[str]:
        direct = {b for a, b in pairs if a == room}
        return direct | {far for b in direct for far in below(b)}

    return {(a, b) for a, b in pairs if not any(b in below(c) for x, c in pairs if x == a)}


def draw() -> str:
    """The picture as SVG."""
    pairs = arrows()
    levels = floors(pairs)
    top = max(levels.values())
    places: dict[str, tuple[float, float]] = {}
    for level in range(top + 1):
        row = [room for room in WORDS if levels[room] == level]
        for i, room in enumerate(row):
            places[room] = (WIDTH * (i + 1) / (len(row) + 1), 50 + (top - level) * FLOOR_HEIGHT)
    height = 50 + top * FLOOR_HEIGHT + 60
    lines = [_arrow(places[a], places[b]) for a, b in sorted(straight(pairs))]
    boxes = [_box(room, *place) for room, place in places.items()]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" text-anchor="middle">'
        '<defs><marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="#7a869a"/></marker></defs>'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    )
    return "\n".join([head, *lines, *boxes, "</svg>"]) + "\n"


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    y1, y2 = y1 + BOX_HEIGHT / 2, y2 - BOX_HEIGHT / 2
    bend = (y2 - y1) / 2
    curve = f"M{x1:.0f} {y1:.0f} C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2 - 2:.0f}"
    return f'<path d="{curve}" fill="none" stroke="#7a869a" marker-end="url(#end)"/>'


def _box(room: str, x: float, y: float) -> str:
    fill = "#ffe8cc" if room in HEAVY else "#d3f9d8" if room == "the shelf" else "#e7f5ff"
    return (
        f'<rect x="{x - BOX_WIDTH / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="8" fill="{fill}" stroke="#495057"/>'
        f'<text x="{x:.0f}" y="{y - 4:.0f}" font-size="18" font-weight="600">{escape(room)}</text>'
        f'<text x="{x:.0f}" y="{y + 18:.0f}" font-size="13" fill="#495057">{escape(WORDS[room])}</text>'
    )


def file_list() -> str:
    """Every module of core and of the shelf with the first line of its docstring, folder by folder."""
    lines: list[str] = []
    files = sorted([*(ROOT / "mlxlora_core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")], key=_place)
    folder = None
    for path in files:
        if path.parent != folder:
            folder = path.parent
            about = _first_line(folder / "__init__.py")
            lines += ["", f"**{folder.relative_to(ROOT).as_posix()}/** {about}", ""]
        if path.name != "__init__.py":
            lines.append(f"- `{path.name}` {_first_line(path)}")
    return "\n".join(lines).strip()


def _place(path: Path) -> tuple[str, ...]:
    return (*path.parent.parts, "", path.name)


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def page() -> str:
    """The page with the list of files between its marks."""
    head, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    return f"{head}{BEGIN}\n\n{file_list()}\n\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Write both, or say whether they are up to date."""
    made = {PICTURE: draw(), PAGE: page()}
    if "--check" in sys.argv[1:]:
        return int(any(path.read_text("utf-8") != text for path, text in made.items()))
    for path, text in made.items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
