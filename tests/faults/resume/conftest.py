"""What the tests of saving and going on share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import Bench, write_rows
from forkserver import ForkServer


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Bench]:
    """The :class:`Bench` of this session."""
    folder = tmp_path_factory.mktemp("bench")
    server = ForkServer(folder)
    bench = Bench(folder, tiny_checkpoint, server)
    bench.run("convert", "--torch-path", tiny_checkpoint, "--mlx-path", bench.model, "--dtype", "float32")
    write_rows(bench.data)
    yield bench
    server.close()
