"""The report in a real browser: nothing overflows, nothing is fetched, the charts are drawn."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from chromium import PROGRAMS, Page, browser, program
from made_run import LONG, write_run
from page_trials import FAINT

from mlxlora_core.runs.report import write_report

pytestmark = pytest.mark.skipif(
    program() is None, reason=f"no Chromium here (looked for {', '.join(PROGRAMS)})"
)

VIEWS = [("many", width, dark) for width in (390, 1280) for dark in (False, True)]
VIEWS += [(name, *view) for name in ("long", "short", "going on") for view in ((390, False), (1280, True))]
OUTSIDE = """
(() => {
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  const width = document.documentElement.clientWidth;
  return [...document.querySelectorAll("body *")].filter((one) => {
    const box = one.getBoundingClientRect();
    return box.width > 0 && (box.left < -0.5 || box.right > width + 0.5);
  }).map((one) => one.outerHTML.slice(0, 80));
})()
"""
DRAWN = """
Object.fromEntries([...document.querySelectorAll("[data-chart]")].map((place) => {
  const marks = ":is([aria-label=line], [aria-label=rect], [aria-label=dot])";
  const boxes = [...place.querySelectorAll(`svg ${marks} *`)].map((one) => one.getBoundingClientRect());
  const wide = Math.max(...boxes.map((box) => box.right)) - Math.min(...boxes.map((box) => box.left));
  return [place.dataset.chart, [place.clientWidth, boxes.length, wide]];
}))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports that are hard on a layout, each for a reason of its own."""
    folder = tmp_path_factory.mktemp("runs")
    made = {
        "plain": write_run(folder / "plain", steps=40),
        "many": write_run(folder / "many", steps=2000),
        "long": write_run(
            folder / "long", name=LONG, prompt=f"{LONG}{{}}{LONG}", said="x" * 900, questions=4, steps=40
        ),
        "short": write_run(folder / "short", questions=0, steps=1),
        "going on": write_run(folder / "going", done=3, steps=40),
    }
    return {name: write_report(path) for name, path in made.items()}


@pytest.mark.parametrize(("name", "width", "dark"), VIEWS)
def test_a_report_fits_fetches_nothing_and_draws(
    page: Page, reports: dict[str, Path], tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    page.open(reports[name], width=width, dark=dark)
    for chart, (place, shapes, wide) in page.script(DRAWN).items():
        assert shapes > 0 and (0.5 * place < wide <= place or name == "short"), chart
    assert page.script("document.querySelectorAll('[data-chart] svg').length") >= 4

    page.picture(tmp_path / "page.png")
    header = (tmp_path / "page.png").read_bytes()[:24]
    wide, high = struct.unpack(">II", header[16:])
    assert header[1:4] == b"PNG" and wide == width and high > 900

    assert page.script(OUTSIDE) == []
    root = "document.documentElement"
    assert page.script(f"{root}.scrollWidth <= {root}.clientWidth")
    assert page.script(FAINT) == [], "text of too little contrast"
    assert page.requests == [reports[name].as_uri()]
    assert page.script("performance.getEntriesByType('resource').length") == 0
    assert page.complaints == []


def test_dark_is_dark_and_light_is_light(page: Page, reports: dict[str, Path]) -> None:
    paper, lines = [], []
    for dark in (False, True):
        page.open(reports["plain"], dark=dark)
        paper.append(page.script("getComputedStyle(document.body).backgroundColor"))
        lines.append(page.script("getComputedStyle(document.querySelector('[aria-label=line]')).stroke"))
    assert paper == ["rgb(251, 250, 248)", "rgb(21, 23, 26)"]
    assert lines[0] != lines[1], "the charts follow"


def test_it_is_drawn_again_where_the_window_changes(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["plain"], width=1280)
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=900, deviceScaleFactor=1, mobile=False)
    page.script("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    for _, (place, shapes, wide) in page.script(DRAWN).items():
        assert shapes > 0 and wide <= place < 390


def test_every_answer_is_on_paper(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["plain"])
    page.call("Emulation.setEmulatedMedia", media="print")
    heights = page.script(
        "[...document.querySelectorAll('.questions .answers')].map(one => one.getBoundingClientRect().height)"
    )
    assert len(heights) == 20 and min(heights) > 50


def test_without_scripts_all_is_there_but_the_charts(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["plain"], scripts=False)
    text = page.script("document.body.innerText")
    assert "The charts need JavaScript" in text and "mlx.nn.Layer0 Applies the Layer0 function." in text
    assert page.script("document.querySelectorAll('svg').length") == 0
    assert page.script("document.querySelector('.more table').rows.length") == 41


def test_headings_go_down_by_one(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["plain"])
    levels = page.script("[...document.querySelectorAll('h1, h2, h3, h4')].map(one => +one.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.script("[...document.querySelectorAll('table')].every(one => one.caption.textContent)")
    assert page.script("document.title") == "demo · mlxlora run"


def test_hostile_text_is_read_and_does_nothing(page: Page, tmp_path: Path) -> None:
    text = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>\x1b[2J\u202e"
    folder = write_run(
        tmp_path / "run", name=text, plugins={text: text}, prompt=text + "{}", said=text + "{}", steps=5
    )
    page.open(write_report(folder))
    assert page.script("window.pwned === undefined && document.images.length === 0")
    assert page.script("document.querySelector('h1').textContent") == text[:-5] + "\\x1b[2J\\u202e"
    assert page.complaints == [] and len(page.requests) == 1


def test_a_script_of_somebody_else_is_refused(page: Page, reports: dict[str, Path], tmp_path: Path) -> None:
    """Or the tests of the policy would show nothing."""
    extra = "<script>window.pwned = 1</script><img src='https://example.invalid/x.png'></body>"
    changed = tmp_path / "report.html"
    changed.write_text(reports["plain"].read_text("utf-8").replace("</body>", extra))
    page.open(changed)
    assert page.script("window.pwned === undefined")
    assert len([line for line in page.complaints if "Content Security Policy" in line]) >= 2
