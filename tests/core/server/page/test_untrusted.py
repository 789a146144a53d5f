"""What models, rows and servers say is text: no script of theirs runs, and no element of theirs is made."""

from __future__ import annotations

import json

import pytest
from canned_server import Canned, serving
from chromium import Page
from page_trials import PAYLOADS
from test_talking import DONE, ask, start

#: what markdown may become, beside the pieces of text that tokens and marks are
ALLOWED = {
    *("p", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "pre", "code", "div", "span", "mark"),
    *("a", "em", "strong", "del", "table", "thead", "tbody", "tr", "th", "td"),
}
MADE = "[...new Set([...document.querySelectorAll('.said *')].map((one) => one.localName))]"
ATTRIBUTES = """
[...new Set([...document.querySelectorAll('.said *')].flatMap((one) => one.getAttributeNames()))]
"""
LINKS = "[...document.querySelectorAll('.said a')].map((one) => [one.protocol, one.rel])"
HARM = """
[window.pwned ?? null, document.scripts.length, document.querySelectorAll('img, iframe, object, form').length]
"""
CALM = [None, 1, 3]  # the icon and two forms of ours


def look_for_harm(tab: Page, payload: str) -> None:
    """Whatever it shows is text in elements that are ours."""
    tab.script("document.querySelectorAll('.token').forEach((one) => one.focus())")
    over = "(one) => one.dispatchEvent(new MouseEvent('mouseover'))"
    tab.script(f"document.querySelectorAll('.said *').forEach({over})")
    assert tab.script(HARM) == CALM, payload
    assert set(tab.script(MADE)) <= ALLOWED, payload
    own = {"class", "tabindex", "data-index", "aria-describedby", "role", "aria-label", "start"}
    assert set(tab.script(ATTRIBUTES)) <= own | {"href", "title", "target", "rel"}, payload
    links = tab.script("[...document.querySelectorAll('.said a')].map((one) => [one.protocol, one.rel])")
    assert all(link == ["https:", "noopener noreferrer nofollow"] for link in links), payload
    assert [one for one in tab.complaints if "500" not in one] == [], (
        payload
    )  # the browser's word on our error


def test_no_script_from_anywhere_runs(tab: Page) -> None:
    """30 payloads and more in answers, prompts, questions, references, model names, titles and errors."""
    questions = [{"prompt": payload, "answer": payload} for payload in PAYLOADS]
    said = {payload: f"{payload}\n\nand {payload}" for payload in PAYLOADS}
    canned = Canned(said, facts={"questions": questions, "title": " ".join(PAYLOADS)})
    with serving(canned) as url:
        start(tab, url, "#mode=chat")
        for i, payload in enumerate(PAYLOADS):
            choose = f"document.getElementById('model').selectedIndex = {i}"
            told = "document.getElementById('model').dispatchEvent(new Event('input', {bubbles: true}))"
            tab.script(f"{choose}; {told}")
            tab.script(f"document.querySelectorAll('#question-list button')[{i}].click()")
            tab.wait_for(DONE)
            assert canned.requests[-1]["model"] == payload
            canned.error = (500, payload)
            ask(tab, payload)
            tab.wait_for("document.querySelector('.turn [role=alert]')")
            canned.error = None
            look_for_harm(tab, payload)
            tab.script("document.getElementById('fresh').click()")
        assert len(canned.requests) == 2 * len(PAYLOADS)
        assert [one for one in tab.requests if not one.startswith(url)] == []


def test_a_script_of_somebody_else_would_be_refused(tab: Page) -> None:
    """Or the policy would not be seen to work."""
    with serving(Canned({"base": "x"})) as url:
        start(tab, url)
        tab.script(
            "const made = document.createElement('script'); made.textContent = 'pwned = 1';"
            "document.body.append(made)"
        )
        tab.script("new Promise((done) => setTimeout(done, 50))")
        assert tab.script("window.pwned === undefined")
        assert any("Content Security Policy" in one for one in tab.complaints)


@pytest.mark.parametrize(
    "hard",
    [
        "*" * 20000, "[" * 20000, "`" * 20000, "> " * 5000 + "x", "- " * 5000 + "x", "*a _b " * 4000,
        "|" * 9000,
        "\n".join("  " * i + "- x" for i in range(300)), "[a](" * 5000, "**a*" * 5000, "a|b\n-|-\n" * 1500,
        "x\n" * 9000, "``a` " * 5000, "~~a" * 6000, "<https://" * 3000,
    ],
    ids=range(15),
)  # fmt: skip
def test_text_that_is_hard_to_read_is_read_at_once(tab: Page, hard: str) -> None:
    """Before the browser is given up, in bounded depth, and each piece is what stands at its place."""
    with serving(Canned({"base": "x"})) as url:
        start(tab, url)
        read = """
        Promise.all([import('/page/markdown.js'), %s]).then(([{blocks}, source]) => {
          const place = document.createElement('div');
          let letters = 0;
          const leaf = (text, at) => {
            if (source.slice(at, at + text.length) !== text) throw new Error('not what stands there');
            letters += text.length;
            return document.createTextNode(text);
          };
          place.append(...blocks(source, leaf).map((one) => one.build()));
          let deepest = 0;
          const walk = (node, depth) => {
            deepest = Math.max(deepest, depth);
            for (const child of node.children) walk(child, depth + 1);
          };
          walk(place, 0);
          return [deepest, letters];
        })
        """
        deepest, letters = tab.script(read % json.dumps(hard))
        assert deepest < 60 and letters <= len(hard)
