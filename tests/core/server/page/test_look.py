"""How the page looks: it fits its window, prints, and axe-core has nothing serious against it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from canned_server import Canned, serving
from chromium import Page
from page_trials import AXE_FAULTS, axe_core
from test_talking import DONE, QUESTIONS, start

LONG = "x" * 300
HARD = f"""# A heading of {LONG}

| {LONG} | a table |
|---|---|
| 1 | {LONG} |

```python
{LONG} = 1
```

1. {LONG}
   - **{LONG}** and `{LONG}` and [a link](https://example.org/{LONG})

> A quote, \u4f60\u597d and \u05e9\u05dc\u05d5\u05dd.

- a list
"""
PLAIN = "Applies **the** [rectified linear unit](https://example.org) by `max(0, x)`.\n\n"
PLAIN += "```python\nnn.ReLU()\n```\n\n> So it is.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
VIEWS = [(width, dark) for width in (390, 1280) for dark in (False, True)]
# What may be scrolled by itself is let go.
OUTSIDE = """
(() => {
  const width = document.documentElement.clientWidth;
  return [...document.querySelectorAll("body *")].filter((one) => {
    const box = one.getBoundingClientRect();
    const free = one.closest("pre, .wide, .hidden");
    return !free && box.width > 0 && (box.left < -0.5 || box.right > width + 0.5);
  }).map((one) => one.outerHTML.slice(0, 80));
})()
"""


def sides(text: str) -> Canned:
    said = {
        "base": text,
        f"tuned-{LONG}" if text is HARD else "tuned": text.replace("the", "its").replace("a ", ""),
    }
    return Canned(said, facts={"questions": [*QUESTIONS, {"prompt": LONG, "answer": text}], "run": True})


@pytest.fixture(scope="module")
def hard() -> Iterator[str]:
    with serving(sides(HARD)) as url:
        yield url


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    with serving(sides(PLAIN)) as url:
        yield url


def fits(tab: Page) -> None:
    root = "document.documentElement"
    assert tab.script(OUTSIDE) == []
    assert tab.script(f"{root}.scrollWidth <= {root}.clientWidth")


@pytest.mark.parametrize(("width", "dark"), VIEWS)
@pytest.mark.parametrize("mode", ["chat", "compare"])
def test_it_fits_its_window_and_fetches_nothing_from_elsewhere(
    tab: Page, hard: str, width: int, dark: bool, mode: str
) -> None:
    start(tab, hard, f"#mode={mode}", width=width, dark=dark, mobile=width == 390)
    fits(tab)
    tab.script("document.querySelector('#question-list li:last-child button').click()")
    tab.wait_for(DONE)
    fits(tab)
    tab.script("document.querySelector('.token').focus()")
    fits(tab)
    if width == 390:
        tab.script("document.getElementById('open-questions').click()")
        fits(tab)
        tab.script("document.getElementById('close-panel').click()")
    assert [one for one in tab.requests if not one.startswith(hard)] == []
    assert tab.complaints == []
    background = tab.script("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(21, 23, 26)" if dark else "rgb(251, 250, 248)")
    beside = tab.script("new Set([...document.querySelectorAll('.answer')].map((one) => one.offsetTop)).size")
    if mode == "compare":
        assert beside == (3 if width == 390 else 2), "side by side where there is room"


def test_on_paper_there_are_answers_and_no_controls(tab: Page, plain: str) -> None:
    start(tab, plain, width=794)
    tab.script("document.querySelector('#question-list button').click()")
    tab.wait_for(DONE)
    tab.call("Emulation.setEmulatedMedia", media="print")
    shown = "(id) => document.getElementById(id).getClientRects().length > 0"
    assert tab.script(f"['composer', 'side', 'fresh', 'turns', 'summary'].map({shown})") == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert "temperature 0" in tab.script("document.getElementById('summary').innerText")
    fits(tab)
    tab.call("Emulation.setEmulatedMedia", media="")


# --- axe-core -----------------------------------------------------------------


@pytest.mark.parametrize(("width", "dark"), VIEWS)
def test_axe_finds_no_serious_fault(tab: Page, plain: str, width: int, dark: bool) -> None:
    program = axe_core()
    start(tab, plain, "#unsure=shown", width=width, dark=dark)
    tab.script(f"{program}; 0")
    assert tab.script(AXE_FAULTS) == [], "empty"
    tab.script("document.querySelector('#question-list li:last-child button').click()")
    tab.wait_for(DONE)
    tab.script("document.querySelector('.token').focus()")
    assert tab.script(AXE_FAULTS) == [], "with answers"
    if width == 390:
        tab.script("document.getElementById('open-settings').click()")
        assert tab.script(AXE_FAULTS) == [], "with settings"


def test_axe_sees_a_fault(tab: Page, plain: str) -> None:
    program = axe_core()
    start(tab, plain)
    tab.script(f"{program}; 0")
    tab.script("document.querySelector('label[for=prompt]').remove()")
    tab.script("document.getElementById('prompt').removeAttribute('placeholder')")
    assert [one for one in tab.script(AXE_FAULTS) if 'id="prompt"' in one]
