"""A browser for all tests of the page; without one, or without the extra serve, they skip."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from chromium import PROGRAMS, Page, browser, program

NEEDED = ("starlette", "uvicorn")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if missing else []


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if program() is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(PROGRAMS)})")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
