"""A browser, and a server of the page of a run in this process."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from chromium import PROGRAMS, Page, browser, program

missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if missing else []

Serving = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if program() is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(PROGRAMS)})")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="session")
def serving() -> Serving:
    """Serves the page of a folder: ``with serving(folder, stop) as url``."""
    from mlxlora_core.machine.signals import Pending
    from mlxlora_core.server.app import Part, make_app
    from mlxlora_core.server.guard import Policy
    from mlxlora_core.server.live_routes import OPEN_PATHS, live_routes
    from mlxlora_core.server.run import listen, serve, url_of

    @contextmanager
    def served(
        folder: Path,
        stop: Callable[[], None] | None = None,
        keys: tuple[str, ...] = (),
        chats: bool = False,
    ) -> Iterator[str]:
        listening, pending = listen("127.0.0.1", 0), Pending()
        app = make_app(None, Policy(keys), [Part(live_routes(folder, stop, chats=chats), OPEN_PATHS)])
        work = threading.Thread(target=lambda: serve(app, listening, pending, connections=32))
        work.start()
        try:
            yield url_of(listening)
        finally:
            pending.signum = 2
            work.join(20)
            listening.close()
            assert not work.is_alive()

    return served
