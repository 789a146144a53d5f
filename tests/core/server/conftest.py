"""A server on a small model with three adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served_models import ADAPTERS, ServerProcess, write_models

pytest.importorskip("uvicorn", reason="needs the extra: pip install 'mlxlora[serve]'")
pytest.importorskip("starlette", reason="needs the extra: pip install 'mlxlora[serve]'")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and adapters."""
    return write_models(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def begin(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ServerProcess]:
    """A function that begins a server with more options."""

    def make(*more: object) -> ServerProcess:
        files = [word for name in ADAPTERS for word in ("--adapter-file", models / f"{name}.safetensors")]
        folder = tmp_path_factory.mktemp("server")
        return ServerProcess("--model", models / "model", *files, *more, folder=folder)

    return make


@pytest.fixture(scope="module")
def server(begin: Callable[..., ServerProcess]) -> Iterator[ServerProcess]:
    """A server as it is without more options."""
    with begin() as process:
        yield process
