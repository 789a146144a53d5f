"""The files of the page, as a client gets them."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")

from starlette.applications import Starlette
from starlette.testclient import TestClient

from mlxlora_core.server.page_routes import ASSETS, page_routes

FACTS = {
    "title": "demo",
    "models": ["base", "tuned"],
    "template": False,
    "questions": [{"prompt": "Q?", "answer": None}],
    "token": False,
    "run": True,
}


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=page_routes(FACTS)))


def test_every_file_of_the_page_is_served_with_its_type(client: TestClient) -> None:
    there = {path.name for path in files("mlxlora_core.server").joinpath("page").iterdir()}
    assert there == {*ASSETS, "index.html"}
    for name, kind in ASSETS.items():
        got = client.get(f"/page/{name}")
        assert got.status_code == 200 and got.headers["content-type"] == kind
        assert got.content == files("mlxlora_core.server").joinpath("page", name).read_bytes()
    got = client.get("/")
    assert got.headers["content-type"] == "text/html; charset=utf-8" and "<noscript>" in got.text


def test_a_browser_that_has_a_file_does_not_get_it_again(client: TestClient) -> None:
    first = client.get("/page/main.js")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for sent in (tag, f'"other", W/{tag}'):
        again = client.get("/page/main.js", headers={"If-None-Match": sent})
        assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == tag
    assert client.get("/page/main.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.get("/page/words.js").headers["etag"] != tag


def test_nothing_else_is_served(client: TestClient) -> None:
    for path in ("/page/", "/page/index.html", "/page/../page_routes.py", "/page/%2e%2e/page_routes.py"):
        assert client.get(path).status_code == 404
    assert client.head("/page/main.js").content == b"" and client.post("/").status_code == 405


def test_the_facts_are_told_and_kept_nowhere(client: TestClient) -> None:
    got = client.get("/api/page")
    assert got.json() == FACTS and got.headers["cache-control"] == "no-store"


def test_the_page_names_no_other_place_and_parses_no_markup() -> None:
    page = files("mlxlora_core.server").joinpath("page")
    for name in [*ASSETS, "index.html"]:
        text = page.joinpath(name).read_text("utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text
        )
        addresses = set(re.findall(r"https?://[\w./]+", text)) - {"http://www.w3.org/2000/svg"}
        assert addresses == set(), name
