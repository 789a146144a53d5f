"""The page of a run in a real browser: it grows, fits, compares, stops, and runs nobody else's script."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from chromium import Page
from made_run import LONG, write_run
from page_trials import AXE_FAULTS, FAINT, PAYLOADS, axe_core

from mlxlora_core.files import lock

VIEWS = [(width, dark) for width in (390, 1280) for dark in (False, True)]
READY = "document.querySelector('#loss svg path') && document.querySelector('#beside table')"
OUTSIDE = """
(() => {
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  const width = document.documentElement.clientWidth;
  return [...document.querySelectorAll("body *")].filter((one) => {
    const box = one.getBoundingClientRect();
    return box.width > 0 && !one.closest(".wide *") && (box.left < -0.5 || box.right > width + 0.5);
  }).map((one) => one.outerHTML.slice(0, 80));
})()
"""


def add(folder: Path, step: int, loss: float, kind: str = "train") -> None:
    line = {"kind": kind, "step": step, "loss": loss, "learning_rate": 1e-3, "tokens_per_second": 900.0}
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps({**line, "steps_per_second": 2.0, "padding": 0.1}) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that are hard on a layout."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("a", {"name": LONG, "prompt": f"{LONG}{{}}"}), ("b", {"name": "b"}), ("c", {})):
        write_run(folder / name, steps={"a": 400, "b": 300, "c": 20}[name], **more)  # type: ignore[arg-type]
    (folder / "a" / "data").mkdir()
    rows = [{"text": LONG * 20}, {"prompt": "p" * 900, "completion": "c"}]
    (folder / "a" / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("width", "dark"), VIEWS)
def test_it_fits_and_fetches_nothing_from_elsewhere(
    tab: Page, runs: Path, serving: Any, tmp_path: Path, width: int, dark: bool
) -> None:
    with serving(runs / "a", chats=True) as url:
        tab.open(f"{url}/run", width=width, dark=dark)
        tab.wait_for(READY)
        tab.script("document.getElementById('tick-b').click()")
        tab.wait_for("document.querySelectorAll('#loss path').length === 4")
        assert tab.script(OUTSIDE) == []
        root = "document.documentElement"
        assert tab.script(f"{root}.scrollWidth <= {root}.clientWidth")
        assert tab.script(FAINT) == [], "text of too little contrast"
        tab.picture(tmp_path / "page.png")
        wide, high = struct.unpack(">II", (tmp_path / "page.png").read_bytes()[16:24])
        assert wide == width and high > 900
        assert [one for one in tab.requests if not one.startswith(f"{url}/")] == []
        assert tab.complaints == []
        link = "document.querySelector('nav a')"
        assert tab.script(f"[{link}.textContent, {link}.pathname]") == ["Talk to the model", "/"]
        assert tab.script(f"{link}.getBoundingClientRect().height") >= 24, "a finger finds it"
        tab.press("Tab")
        assert tab.script(f"document.activeElement === {link}")
        levels = tab.script("[...document.querySelectorAll('h1, h2')].map((one) => +one.tagName[1])")
        assert levels[0] == 1 and levels.count(1) == 1


def test_it_grows_with_the_run(tab: Page, tmp_path: Path, serving: Any) -> None:
    folder = write_run(tmp_path / "a", steps=40, done=3)
    (folder / "metrics.jsonl").write_text("")
    add(folder, 1, 3.0)
    with lock.hold(folder), serving(folder) as url:
        tab.open(f"{url}/run")
        tab.wait_for("document.getElementById('state').textContent === 'running'")
        tab.wait_for("document.querySelector('#loss circle')")
        for step in range(2, 11):
            add(folder, step, 3.0 - step / 10)
        add(folder, 10, 2.5, "valid")
        said = {"kind": "sample", "step": 10, "prompt": "Q: What is Layer0 in mlx?\nA:", "text": "on my way"}
        (folder / "samples.jsonl").write_text(json.dumps(said) + "\n")
        tab.wait_for("document.querySelector('#loss path')")
        tab.wait_for("document.getElementById('samples').textContent.includes('on my way')")
        where = tab.script("document.getElementById('where').textContent")
        assert "stage 4 of 5 (train)" in where and "step 10 of 40" in where and "900 tokens/s" in where
        assert "about 15 s left" in where
        tab.script("document.querySelector('#loss .plot').focus()")
        tab.press("End")
        assert tab.script("document.querySelector('#loss .readout').textContent") == (
            "step 10: train 2.0000, valid 2.5000"
        )
        # A training that goes on from step 5 takes back what it told behind it.
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "new").write_text("".join(lines[:5]))
        (folder / "new").replace(folder / "metrics.jsonl")
        add(folder, 6, 1.0)
        tab.wait_for("document.getElementById('loss').textContent.includes('6')")
        tab.script("document.querySelector('#loss .plot').focus()")
        tab.press("End")
        assert tab.script("document.querySelector('#loss .readout').textContent") == "step 6: train 1.0000"
    tab.wait_for("document.getElementById('told').textContent.includes('server has gone')")
    assert tab.script("document.querySelectorAll('#loss path').length") == 1, "what was told stays"


def test_runs_are_laid_over_each_other_and_differences_marked(tab: Page, runs: Path, serving: Any) -> None:
    with serving(runs / "b") as url:
        tab.open(f"{url}/run")
        tab.wait_for(READY)
        assert tab.script("document.querySelectorAll('#loss path').length") == 2
        tab.script("document.getElementById('tick-c').focus()")
        tab.press("Space")
        tab.wait_for("document.querySelectorAll('#loss path').length === 4")
        labels = tab.script(
            "[...document.querySelectorAll('#loss .legend li')].map((one) => one.textContent)"
        )
        assert labels == ["train", "valid", "train, c", "valid, c"]
        heads = tab.script("[...document.querySelectorAll('#beside thead th')].map((one) => one.textContent)")
        assert heads[6:] == ["train.iters", "train.warmup"], "equal ones are left out"
        marked = "[...document.querySelectorAll('#beside td.differs')].map((one) => one.textContent)"
        assert tab.script(marked) == ["400", "40", "20", "2"]


def test_the_button_asks_first_and_works_by_keyboard(tab: Page, tmp_path: Path, serving: Any) -> None:
    stopped: list[int] = []
    folder = write_run(tmp_path / "a", steps=40, done=3)
    with lock.hold(folder), serving(folder, lambda: stopped.append(1)) as url:
        tab.open(f"{url}/run", width=390)
        tab.wait_for("!document.getElementById('stop').hidden")
        tab.press("Tab")
        assert tab.script("document.activeElement.id") == "stop", "first in the order of the page"
        tab.press("Enter")
        tab.wait_for("document.getElementById('sure').open")
        assert tab.script("document.activeElement.value") == "no", "what does no harm has the focus"
        tab.press("Enter")
        tab.wait_for("!document.getElementById('sure').open")
        assert stopped == []
        tab.press("Enter")
        tab.wait_for("document.getElementById('sure').open")
        tab.press("Tab", "Enter")
        tab.wait_for("document.getElementById('told').textContent.includes('Stopping')")
        assert stopped == [1] and tab.script("document.getElementById('stop').disabled")


def test_no_script_of_rows_samples_or_settings_runs(tab: Page, tmp_path: Path, serving: Any) -> None:
    everything = "\n".join(PAYLOADS)
    folder = write_run(
        tmp_path / "runs" / "a",
        name=everything,
        prompt="{}" + everything.replace("{", "(").replace("}", ")"),
        said="x",
        steps=20,
    )
    beside = write_run(tmp_path / "runs" / "<img src=x onerror=window.pwned=1>", name=everything, steps=40)
    (beside / "recipe.toml").write_text(
        (beside / "recipe.toml").read_text() + f"\n[odd]\nkey = {json.dumps(PAYLOADS[0])}\n"
    )
    (folder / "data").mkdir()
    rows = [{"text": everything}, {"prompt": everything, "completion": everything}]
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [{"kind": "sample", "step": 1, "prompt": one, "text": one} for one in PAYLOADS]
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    with serving(folder) as url:
        tab.open(f"{url}/run")
        tab.wait_for(READY)
        tab.wait_for("document.querySelectorAll('#samples details').length > 30")
        tab.wait_for("document.querySelectorAll('#rows .row').length === 2")
        tab.script("document.querySelector('#beside input').click()")
        tab.wait_for("document.querySelectorAll('#loss path').length === 4")
        assert tab.script("window.pwned") is None
        made = "[...new Set([...document.querySelectorAll('main *')].map((one) => one.localName))]"
        bad = {
            "script",
            "img",
            "iframe",
            "object",
            "embed",
            "video",
            "base",
            "style",
            "link",
            "meta",
            "math",
            "a",
        }
        assert not bad & set(tab.script(made))
        handlers = (
            "[...document.querySelectorAll('main *')]"
            ".some((one) => [...one.attributes].some(({name}) => name.startsWith('on')))"
        )
        assert tab.script(handlers) is False
        assert PAYLOADS[2] in tab.script("document.getElementById('samples').textContent"), "told as it is"
        assert [one for one in tab.requests if not one.startswith(f"{url}/")] == []
        assert tab.complaints == []


def test_a_key_is_asked_for_where_one_is_wanted(tab: Page, runs: Path, serving: Any) -> None:
    with serving(runs / "c", None, ("secret",)) as url:
        tab.open(f"{url}/run")
        tab.wait_for("!document.getElementById('key').hidden")
        tab.script("document.getElementById('key-value').focus()")
        tab.type("secret")
        tab.press("Enter")
        tab.wait_for("document.querySelector('#loss svg path')")
        tab.script("sessionStorage.clear()")


@pytest.mark.parametrize(("width", "dark"), VIEWS)
def test_axe_finds_no_serious_fault(tab: Page, runs: Path, serving: Any, width: int, dark: bool) -> None:
    program = axe_core()
    with serving(runs / "a", chats=True) as url:
        tab.open(f"{url}/run", width=width, dark=dark)
        tab.wait_for(READY)
        tab.script(f"{program}; 0")
        assert tab.script(AXE_FAULTS) == []
