"""The page of ``mlxlora serve`` with the embedded model, base and adapter side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlxlora_demo
import pytest
from chromium import Page
from mlx.utils import tree_map
from served_models import ServerProcess
from test_talking import DONE, ask

import mlxlora_core

BASE = Path(mlxlora_demo.__file__).parent / "base"
PROMPT = "Q: What is a list in Python?\nA:"
SAID = "[...document.querySelectorAll('.turn:last-child .said')].map((one) => one.innerText)"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("embedded")
    model = mlxlora_core.load(BASE).attach("lora", rank=4, scale=4.0, seed=0)
    mx.random.seed(0)
    made = model.base.module.trainable_parameters()
    model.base.module.update(tree_map(lambda x: 0.1 * mx.random.normal(x.shape), made))
    model.save_adapter(folder / "tuned.safetensors")
    with ServerProcess(
        "--model", BASE, "--adapter-file", folder / "tuned.safetensors", folder=folder
    ) as process:
        yield process


def test_the_page_shows_what_the_server_says(tab: Page, server: ServerProcess) -> None:
    tab.open("about:blank")
    tab.open(f"{server.url}/#form=plain&view=plain&max_tokens=24&temperature=0.8&seed=3")
    tab.wait_for("document.querySelectorAll('#model option').length === 2")
    ask(tab, PROMPT)
    names = tab.script("[...document.querySelectorAll('#model option')].map((one) => one.value)")
    texts = [
        server.text(model=name, prompt=PROMPT, max_tokens=24, temperature=0.8, seed=3, top_p=1)
        for name in names
    ]
    assert [text.strip() for text in texts] == [text.strip() for text in tab.script(SAID)]
    assert texts[0] != texts[1]
    marked = "document.querySelectorAll('.side-{} mark').length > 0"
    assert tab.script(marked.format(0)) and tab.script(marked.format(1))
    meta = tab.script("[...document.querySelectorAll('.meta')].map((one) => one.textContent)")
    assert all("tokens" in line and ("ended" in line or "limit" in line) for line in meta)

    tab.script("document.querySelector('.side-1 .token').focus()")
    told = tab.script("document.getElementById('tip').innerText")
    assert "log-probability" in told and told.count("%") >= 5, "its own, and those of four"
    assert tab.complaints == []
    assert [one for one in tab.requests if not one.startswith(server.url)] == []


def test_a_conversation_in_its_template(tab: Page, server: ServerProcess) -> None:
    tab.open("about:blank")
    tab.open(f"{server.url}/#mode=chat&max_tokens=8&system=Be%20brief")
    tab.wait_for("document.querySelectorAll('#model option').length === 2")
    ask(tab, "What is a list?")
    ask(tab, "And a tuple?")
    assert tab.script("document.querySelectorAll('.turn').length") == 2
    assert all(tab.script("[...document.querySelectorAll('.meta')].map((one) => one.textContent.length > 5)"))
    assert tab.script("document.querySelectorAll('[role=alert]:not(:empty)').length") == 0
    assert tab.complaints == []


def test_an_error_of_the_protocol_is_one_line(tab: Page, server: ServerProcess) -> None:
    """A prompt that the context does not hold."""
    tab.open("about:blank")
    tab.open(f"{server.url}/#mode=chat&form=plain")
    tab.wait_for("document.querySelectorAll('#model option').length === 2")
    ask(tab, "word " * 6000)
    told = tab.script("document.querySelector('.turn [role=alert]').textContent")
    assert "context" in told and "\n" not in told
    assert tab.script(f"Boolean({DONE})")
