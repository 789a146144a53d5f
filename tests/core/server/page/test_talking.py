"""The page in a real browser: conversations, comparisons, settings, questions, by mouse and by keyboard."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from canned_server import Canned, serving
from chromium import Page

BASE = "It is **a function** that returns `max(0, x)`."
TUNED = "It is **the function** that returns `max(0, x)` for each element."
BOTH = {"base": BASE, "tuned": TUNED}
QUESTIONS = [
    {"prompt": "Q: What is ReLU?\nA:", "answer": "It is the function."},
    {"prompt": "Q: What is SELU?\nA:", "answer": None},
]
DONE = "document.querySelector('.turn:last-child :is(.meta, .fault)') && !document.body.matches('.busy')"
SAID = "[...document.querySelectorAll('.turn:last-child .said')].map((one) => one.innerText)"
MARKED = "[...document.querySelectorAll('.side-{} mark')].map((one) => one.textContent)"


def start(tab: Page, url: str, fragment: str = "", **view: Any) -> None:
    tab.open("about:blank")
    tab.open(url + fragment, **view)
    tab.wait_for("document.querySelector('#model option')")


def ask(tab: Page, text: str) -> None:
    tab.script("document.getElementById('prompt').focus()")
    tab.type(text)
    tab.press("Enter")
    tab.wait_for(DONE)


def is_clean(tab: Page, url: str) -> None:
    assert tab.complaints == []
    assert [one for one in tab.requests if not one.startswith(url)] == []


def test_a_conversation_is_told_from_its_beginning(tab: Page) -> None:
    canned = Canned({"base": BASE})
    with serving(canned) as url:
        start(tab, url)
        ask(tab, "What is it?")
        assert tab.script(SAID) == ["It is a function that returns max(0, x)."]
        assert tab.script("document.querySelector('.said strong').textContent") == "a function"
        ask(tab, "And\u00a0then?")
        first, second = canned.requests
        assert first["messages"] == [{"role": "user", "content": "What is it?"}]
        assert second["messages"] == [
            *first["messages"],
            {"role": "assistant", "content": BASE},
            {"role": "user", "content": "And\u00a0then?"},
        ]
        assert first["stream"] and first["logprobs"] and first["top_logprobs"] == 4
        assert (first["temperature"], first["top_p"], first["max_tokens"], first["seed"]) == (0, 1, 256, 0)
        tab.script("document.getElementById('fresh').click()")
        assert tab.script("document.querySelectorAll('.turn').length") == 0
        ask(tab, "Again")
        assert len(canned.requests[-1]["messages"]) == 1
        is_clean(tab, url)


def test_both_answer_at_once_and_the_words_that_differ_are_marked(tab: Page) -> None:
    canned = Canned(BOTH, pause=0.1)
    with serving(canned) as url:
        start(tab, url)
        tab.script("document.getElementById('prompt').focus()")
        tab.type("What?")
        tab.press("Enter")
        tab.wait_for("[...document.querySelectorAll('.said')].filter((one) => one.innerText).length === 2")
        busy = "[...document.querySelectorAll('.said')].map((one) => one.getAttribute('aria-busy'))"
        assert tab.script(busy) == ["true", "true"], "both are still coming"
        tab.wait_for(DONE)
        assert tab.script(MARKED.format(0)) == ["a"]
        assert tab.script(MARKED.format(1)) == ["the", "for each element"]
        assert [one["model"] for one in canned.requests] == ["base", "tuned"]
        tab.script("void (document.getElementById('marks').value = 'none')")
        tab.script("document.getElementById('marks').dispatchEvent(new Event('input', {bubbles: true}))")
        assert tab.script("document.querySelectorAll('mark').length") == 0
        is_clean(tab, url)


def test_each_model_hears_its_own_answers(tab: Page) -> None:
    canned = Canned(BOTH)
    with serving(canned) as url:
        start(tab, url)
        ask(tab, "One")
        ask(tab, "Two")
        heard = {one["model"]: one["messages"][1]["content"] for one in canned.requests[2:]}
        assert heard == BOTH


@pytest.mark.parametrize("template", [True, False])
def test_a_token_tells_its_probability_to_pointer_and_focus(tab: Page, template: bool) -> None:
    with serving(Canned({"base": BASE}, template=template)) as url:
        start(tab, url)
        ask(tab, "What?")
        tip = "document.getElementById('tip')"
        x, y = tab.script(
            "(() => { const box = document.querySelectorAll('.token')[1].getBoundingClientRect();"
            " return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )
        tab.point(x, y)
        tab.wait_for(f"!{tip}.hidden")
        told = tab.script(f"{tip}.innerText")
        assert "\u2423is" in told and "75.0%" in told and "\u22120.288" in told and "20.0%" in told
        tab.point(5, 5)
        tab.wait_for(f"{tip}.hidden")

        # What comes before the prompt is the answer's first token.
        tab.script("document.getElementById('prompt').focus()")
        tab.press("Shift+Tab")
        assert tab.script("document.activeElement.matches('.token')")
        assert tab.script(f"{tip}.hidden") is False
        tab.press("ArrowRight")
        assert "\u2423is" in tab.script(f"{tip}.innerText")
        tab.press("End")
        assert "x)`." in tab.script(f"{tip}.innerText")
        tab.press("Escape")
        assert tab.script(f"{tip}.hidden") is True
        is_clean(tab, url)


def test_settings_are_in_the_address_and_come_back(tab: Page) -> None:
    canned = Canned(BOTH)
    with serving(canned) as url:
        start(tab, url)
        set_value = (
            "((name, value) => {{ const one = document.getElementById(name); one.value = value;"
            " one.dispatchEvent(new Event('input', {{bubbles: true}})); }})({!r}, {!r})"
        )
        wanted = {
            "temperature": "0.7",
            "top_p": "0.9",
            "max_tokens": "33",
            "seed": "5",
            "system": "Be #&= brief",
        }
        for name, value in {**wanted, "model": "tuned", "with": "base"}.items():
            tab.script(set_value.format(name, value))
        address = tab.script("location.href")
        kept = parse_qs(urlsplit(address).fragment)
        assert kept == {name: [value] for name, value in {**wanted, "model": "tuned", "with": "base"}.items()}
        tab.script(set_value.format("temperature", "9"))
        assert tab.script("document.getElementById('temperature').getAttribute('aria-invalid')") == "true"
        assert tab.script("location.href") == address, "what is no value of it is not kept"

        tab.open("about:blank")
        tab.open(address)
        tab.wait_for("document.querySelector('#model option')")
        ask(tab, "What?")
        sent = canned.requests[0]
        assert (sent["model"], canned.requests[1]["model"]) == ("tuned", "base")
        assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["seed"]) == (0.7, 0.9, 33, 5)
        assert sent["messages"][0] == {"role": "system", "content": "Be #&= brief"}


def test_an_address_that_is_wrong_changes_nothing(tab: Page) -> None:
    canned = Canned(BOTH)
    fragment = "#temperature=9&top_p=x&max_tokens=1.5&seed=-1&model=other&mode=none&__proto__=1&constructor=2"
    with serving(canned) as url:
        start(tab, url, fragment)
        ask(tab, "What?")
        sent = canned.requests[0]
        assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["seed"]) == (0, 1, 256, 0)
        assert sent["model"] == "base" and tab.complaints == []
        tab.script("void (location.hash = '#seed=&mode=chat')")
        tab.wait_for("document.getElementById('seed').value === ''")
        ask(tab, "What?")
        assert "seed" not in canned.requests[-1] and len(canned.requests) == 3


def test_a_question_is_asked_alone_beside_its_reference(tab: Page) -> None:
    canned = Canned({"base": "It is a function."}, facts={"questions": QUESTIONS}, template=False)
    with serving(canned) as url:
        start(tab, url)
        shown = "[...document.querySelectorAll('#question-list button')].map((one) => one.textContent)"
        assert tab.script(shown) == ["What is ReLU?", "What is SELU?"]
        tab.script("document.querySelector('#question-list button').click()")
        tab.wait_for(DONE)
        assert canned.requests[0]["prompt"] == "Q: What is ReLU?\nA:"
        assert tab.script(SAID) == ["It is a function.", "It is the function."]
        assert tab.script(MARKED.format(0)) == ["a"]
        assert tab.script("[...document.querySelectorAll('.wanted mark')].map((one) => one.textContent)") == [
            "the"
        ]
        exact = "[...document.querySelectorAll('.turn:last-child .exact')].map((one) => !one.hidden)"
        assert tab.script(exact) == [False]
        ask(tab, "What is GELU?")
        assert canned.requests[1]["prompt"] == "Q: What is GELU?\nA:", "in the form of the run's questions"
        ask(tab, "Q: What is tanh?\nA:")
        assert canned.requests[2]["prompt"] == "Q: What is tanh?\nA:"
        tab.script("document.querySelectorAll('#question-list button')[1].click()")
        tab.wait_for(f"document.querySelectorAll('.turn').length === 4 && {DONE}")
        assert tab.script("document.querySelectorAll('.turn:last-child .wanted').length") == 0
        canned.said["base"] = " It is the function.\n"
        tab.script("document.querySelector('#question-list button').click()")
        tab.wait_for(f"document.querySelectorAll('.turn').length === 5 && {DONE}")
        assert tab.script(exact) == [True]
        is_clean(tab, url)


def test_a_run_s_question_is_asked_as_the_run_has_asked_it(tab: Page) -> None:
    """In the template or not, with its system message, whatever the settings are."""
    asked = [{**QUESTIONS[0], "chat": False}, {**QUESTIONS[1], "chat": False}]
    canned = Canned({"base": BASE}, facts={"questions": asked})
    with serving(canned) as url:
        start(tab, url)
        ask(tab, "What is GELU?")
        assert canned.requests[0]["prompt"] == "Q: What is GELU?\nA:"
        start(tab, url, "#form=chat&system=Be%20brief")
        tab.script("document.querySelector('#question-list button').click()")
        tab.wait_for(DONE)
        assert canned.requests[1]["prompt"] == "Q: What is ReLU?\nA:"
        ask(tab, "What is GELU?")
        assert canned.requests[2]["messages"][0]["content"] == "Be brief"
    why = {"prompt": "Why?", "answer": None, "chat": True, "system": "S"}
    canned = Canned({"base": BASE}, facts={"questions": [why]})
    with serving(canned) as url:
        start(tab, url, "#form=plain&system=T")
        tab.script("document.querySelector('#question-list button').click()")
        tab.wait_for(DONE)
        assert [one["content"] for one in canned.requests[0]["messages"]] == ["S", "Why?"]
        ask(tab, "And?")
        assert canned.requests[1]["prompt"] == "And?"


def test_escape_stops_and_what_came_stays(tab: Page) -> None:
    canned = Canned({"base": "one two three four five six seven eight nine ten " * 20}, pause=0.05)
    with serving(canned) as url:
        start(tab, url)
        tab.script("document.getElementById('prompt').focus()")
        tab.type("Count")
        tab.press("Enter")
        tab.wait_for("document.querySelector('.said').innerText.includes('three')")
        assert tab.script("document.getElementById('send').textContent") == "Stop"
        tab.press("Escape")
        tab.wait_for(DONE)
        assert "stopped by you" in tab.script("document.querySelector('.meta').textContent")
        assert "three" in tab.script(SAID)[0]
        end = time.monotonic() + 10
        while not canned.gone and time.monotonic() < end:
            time.sleep(0.02)
        assert canned.gone == 1, "the server is told"


@pytest.mark.parametrize(
    ("canned", "told"),
    [
        (Canned({"base": ""}, error=(429, "the queue\nis full")), "the queue is full. Try again in 7 s."),
        (Canned({"base": ""}, error=(400, "too long: " + "x" * 900)), "too long: " + "x" * 289 + "\u2026"),
        (Canned({"base": "one two"}, midway="diverged"), "diverged"),
    ],
    ids=["busy", "long", "midway"],
)
def test_an_error_is_one_line(tab: Page, canned: Canned, told: str) -> None:
    with serving(canned) as url:
        start(tab, url)
        ask(tab, "What?")
        assert tab.script("document.querySelector('.turn [role=alert]').textContent") == told
        canned.error = canned.midway = None
        ask(tab, "Again")
        assert len(canned.requests[-1]["messages"]) == 1, "what failed is not told again"


def test_a_server_that_is_gone_is_one_line(tab: Page) -> None:
    with serving(Canned({"base": BASE})) as url:
        start(tab, url)
    ask(tab, "What?")
    assert "cannot be reached" in tab.script("document.querySelector('.turn [role=alert]').textContent")


def test_a_key_is_asked_for_kept_in_the_tab_and_sent(tab: Page) -> None:
    canned = Canned({"base": BASE}, facts={"token": True})
    key = "k" * 20
    with serving(canned, key) as url:
        tab.open("about:blank")
        tab.open(url)
        tab.wait_for("!document.getElementById('key-form').hidden")
        assert tab.script("document.activeElement.id") == "key"
        tab.type("wrong")
        tab.press("Enter")
        tab.wait_for("document.getElementById('key-fault').textContent")
        tab.type(key)
        tab.press("Enter")
        tab.wait_for("document.querySelector('#model option')")
        ask(tab, "What?")
        assert tab.script("Object.values(sessionStorage)") == [key]
        assert tab.script("[localStorage.length, document.cookie, location.href]") == [0, "", url]
        tab.script("document.getElementById('forget').click()")
        assert tab.script("sessionStorage.length") == 0


def test_without_scripts_the_page_says_what_to_do(tab: Page) -> None:
    with serving(Canned({"base": BASE})) as url:
        tab.open("about:blank")
        tab.open(url, scripts=False)
        assert "mlxlora chat" in tab.script("document.body.innerText")
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


def test_all_of_it_by_keyboard(tab: Page) -> None:
    """Tab and Enter, from a page that nobody has clicked on, at both widths."""
    canned = Canned(BOTH, facts={"questions": QUESTIONS, "run": True})
    with serving(canned) as url:
        for width in (1280, 390):
            start(tab, url, width=width)
            tab.script("document.activeElement.blur()")
            seen = []
            for _ in range(40):
                tab.press("Tab")
                seen.append(tab.script("document.activeElement.id || document.activeElement.name"))
                if seen[-1] == "prompt":
                    break
            assert seen[-1] == "prompt", seen
            outline = "(() => { const s = getComputedStyle(document.activeElement.closest('.box'));"
            assert tab.script(f"{outline} return s.outlineStyle; }})()") != "none"
            tab.type("One line")
            tab.press("Shift+Enter")
            tab.type("another")
            tab.press("Enter")
            tab.wait_for(DONE)
            assert canned.requests[-1]["messages"][-1]["content"] == "One line\nanother"
            assert tab.script("document.activeElement.id") == "prompt", "the focus stays"
        # the panel of the narrow page, with the focus going in and coming back
        tab.script("document.getElementById('open-questions').focus()")
        tab.press("Enter")
        assert tab.script("document.getElementById('main').inert") is True
        assert tab.script("document.activeElement.localName") == "summary"
        tab.press("Escape")
        assert tab.script("document.activeElement.id") == "open-questions"
        tab.press("Enter", "Tab")
        assert tab.script("document.activeElement.textContent") == "What is ReLU?"
        tab.press("Enter")
        tab.wait_for(f"document.querySelectorAll('.turn').length === 2 && {DONE}")
        assert tab.script("document.getElementById('main').inert") is False


def test_a_long_answer_takes_its_reader_along_and_keeps_what_is_drawn(tab: Page) -> None:
    canned = Canned({"base": "".join(f"Paragraph {n} is here.\n\n" for n in range(120))}, pause=0.001)
    with serving(canned) as url:
        start(tab, url)
        tab.script("document.getElementById('prompt').focus()")
        tab.type("Tell")
        tab.press("Enter")
        tab.wait_for("document.querySelectorAll('.said p').length > 3")
        tab.script("void (window.second = document.querySelectorAll('.said p')[1])")
        tab.wait_for("document.querySelectorAll('.said p').length > 20")
        assert tab.script("window.second === document.querySelectorAll('.said p')[1]")
        tab.wait_for(DONE)
        page = "document.scrollingElement"
        assert tab.script(f"{page}.scrollHeight - {page}.clientHeight - {page}.scrollTop") < 3
        assert tab.script("document.querySelectorAll('.said p').length") == 120
        tab.script(f"void ({page}.scrollTop = 0)")
        assert tab.script("document.querySelectorAll('.said [tabindex=\"0\"]').length") == 1
