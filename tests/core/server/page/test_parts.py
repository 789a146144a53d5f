"""The modules of the page one by one: markdown, words that differ, places of tokens."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from canned_server import Canned, serving
from chromium import Page


@pytest.fixture(scope="module")
def page(tab: Page) -> Iterator[Page]:
    with serving(Canned({"base": "x"})) as url:
        tab.open(url)
        yield tab


def call(page: Page, module: str, expression: str, *given: Any) -> Any:
    """An expression of ``m``, the module, and ``a``, the arguments."""
    return page.script(f"import('/page/{module}.js').then((m) => ((a) => {expression})({json.dumps(given)}))")


# --- markdown -----------------------------------------------------------------

DRAWN = """
(() => {
  const place = document.createElement('div');
  place.append(...m.blocks(a[0], (text) => document.createTextNode(text)).map((one) => one.build()));
  return place.innerHTML;
})()
"""
CODE = '<pre tabindex="0" role="region" aria-label="Code"><code>'
MARKDOWN = {
    "one\ntwo": "<p>one\ntwo</p>",
    "one\n\ntwo": "<p>one</p><p>two</p>",
    "# a\n### b ##": "<h4>a</h4><h6>b</h6>",
    "#no": "<p>#no</p>",
    "**b** *i* ~~d~~ `c`": "<p><strong>b</strong> <em>i</em> <del>d</del> <code>c</code></p>",
    "__b__ _i_": "<p><strong>b</strong> <em>i</em></p>",
    "***both***": "<p><strong><em>both</em></strong></p>",
    "**a *b***": "<p><strong>a <em>b</em></strong></p>",
    "snake_case_name and 2 * 3 * 4": "<p>snake_case_name and 2 * 3 * 4</p>",
    "**open": "<p>**open</p>",
    r"\*no\* \\ \a": r"<p>*no* \ \a</p>",
    "``a ` b`` `**c**`": "<p><code>a ` b</code> <code>**c**</code></p>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "1. a\n\n   more\n2. b": "<ol><li>a<p>more</p></li><li>b</li></ol>",
    "text\n- a": "<p>text</p><ul><li>a</li></ul>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "```py\nx = 1\n\n  # y\n```\nz": '<div class="code"><span class="language">py</span>'
    f"{CODE}x = 1\n\n  # y</code></pre></div><p>z</p>",
    "~~~\n```\n~~~": f'<div class="code">{CODE}```</code></pre></div>',
    "```\nopen": f'<div class="code">{CODE}open</code></pre></div>',
    "a | b\n--|:-:\n1 | **2**\nend": "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody>"
    "<tr><td>1</td><td><strong>2</strong></td></tr></tbody></table>",
    "a | b\nc": "<p>a | b\nc</p>",
    "[t *i*](https://e.org/a_(b)?q=1&r)": '<p><a href="https://e.org/a_(b)?q=1&amp;r" '
    'title="https://e.org/a_(b)?q=1&amp;r" target="_blank" '
    'rel="noopener noreferrer nofollow">t <em>i</em></a></p>',
    "[t](/here) [t](mailto:a@b) [t](ftp://e)": "<p>[t](/here) [t](mailto:a@b) [t](ftp://e)</p>",
    "<b>&amp;</b>": "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>",
}  # fmt: skip


@pytest.mark.parametrize("source", MARKDOWN)
def test_markdown(page: Page, source: str) -> None:
    found = call(page, "markdown", DRAWN, source)
    found = re.sub(r'<div class="wide"[^>]*>(.*)</div>(?=<p>|$)', r"\1", found, flags=re.DOTALL)
    wanted = MARKDOWN[source]
    assert found == wanted or found.removesuffix("<p>end</p>") == wanted


def test_the_blocks_tell_where_they_stand(page: Page) -> None:
    source = "# a\n\ntext\nmore\n\n- x\n- y\n"
    found = call(page, "markdown", "m.blocks(a[0], () => '').map(({start, end}) => [start, end])", source)
    assert [source[start:end] for start, end in found] == ["# a", "text\nmore", "- x\n- y"]


# --- words that differ --------------------------------------------------------


def split(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def common_length(x: list[str], y: list[str]) -> int:
    """Of a longest common subsequence, by its definition."""

    @cache
    def length(i: int, j: int) -> int:
        if i == len(x) or j == len(y):
            return 0
        if x[i] == y[j]:
            return 1 + length(i + 1, j + 1)
        return max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


def without(text: str, ranges: list[list[int]]) -> list[str]:
    """The words that are not marked."""
    for start, end in reversed(ranges):
        text = text[:start] + " " + text[end:]
    return split(text)


def test_what_is_not_marked_is_a_longest_common_subsequence(page: Page) -> None:
    draw = random.Random(0)
    for _ in range(40):
        x, y = (
            " ".join(draw.choice(["a", "bb", "c", "d,", "e.f"]) for _ in range(draw.randrange(40)))
            for _ in "xy"
        )
        found = call(page, "words", "m.differences(...a)", x, y)
        kept = without(x, found["a"])
        assert kept == without(y, found["b"])
        assert len(kept) == common_length(split(x), split(y))


@pytest.mark.parametrize(
    ("x", "y", "marked"),
    [
        ("same text.", "same  text.", [[], []]),
        ("", "all new", [[], ["all new"]]),
        ("a b c d", "a x y d", [["b c"], ["x y"]]),
        ("a\n  b", "c", [["a", "b"], ["c"]]),
        ("f(x) = 1", "f(y) = 1", [["x"], ["y"]]),
        ("\u4f60\u597d\u4e16\u754c", "\u4f60\u4eec\u4e16\u754c", [["\u597d"], ["\u4eec"]]),
        ("na\u00efve \U0001f600", "na\u00efve \U0001f601", [["\U0001f600"], ["\U0001f601"]]),
    ],
)
def test_the_words_that_differ(page: Page, x: str, y: str, marked: list[list[str]]) -> None:
    expression = """(({a: x, b: y}) => [[x, a[0]], [y, a[1]]].map(([ranges, text]) =>
        ranges.map(([start, end]) => text.slice(start, end))))(m.differences(a[0], a[1]))"""
    assert call(page, "words", expression, x, y) == marked


def test_long_texts_are_compared_in_bounded_memory(page: Page) -> None:
    x = " ".join(f"w{i}" for i in range(60000))
    y = " ".join(f"w{i}" for i in reversed(range(59990)))
    found = call(page, "words", "m.differences(...a)", f"head {x}", f"head {y}")
    assert without(f"head {x}", found["a"]) == ["head", *(f"w{i}" for i in range(59990))]
    assert found["b"] == []


# --- tokens -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens", "wanted"),
    [
        ("a bc", ["a", " b", "c"], [("a", 0, 0), (" b", 1, 1), ("c", 2, 2)]),
        ("ReLU is", [" ReLU", " is"], [("ReLU", 0, 0), (" is", 1, 1)]),
        (
            "x\U0001f600y", ["x", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "y"],
            [("x", 0, 0), ("\U0001f600", 1, 4), ("y", 5, 5)],
        ),
        ("x\u00e9", ["x", "\ufffd", "\ufffd"], [("x", 0, 0), ("\u00e9", 1, 2)]),
        ("a", ["a", " stop", " text"], [("a", 0, 0)]),
        ("a", ["a", ""], [("a", 0, 0)]),
        ("all of it", [], []),
    ],
)  # fmt: skip
def test_where_tokens_stand(
    page: Page, text: str, tokens: list[str], wanted: list[tuple[str, int, int]]
) -> None:
    expression = """m.places(a[0], a[1].map((text) => ({text})))
        .map((one) => [a[0].slice(one.start, one.end), one.first, one.last])"""
    assert [tuple(one) for one in call(page, "tokens", expression, text, tokens)] == wanted
