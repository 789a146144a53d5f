"""Fixtures for the plugins' tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlxlora_openblas
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def build_hook() -> Any:
    """The module hatch_build.py."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compile_sgemm(build_hook: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles the C files of the openblas plugin as installing does: ``compile_sgemm(folder, *flags)``.

    Once for the same flags, with all warnings as errors; each folder gets a copy, which the
    loader takes for a library of its own.
    """
    if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("needs a C compiler: install gcc or clang")
    made: dict[tuple[str, ...], Path] = {}

    def make(folder: Path, *flags: str) -> Path:
        if flags not in made:
            library = tmp_path_factory.mktemp("compiled") / build_hook.LIBRARY
            sources = Path(mlxlora_openblas.__file__).parent
            build_hook.compile_library(sources, library, "-Wall", "-Wextra", "-Werror", *flags)
            made[flags] = library
        return Path(shutil.copy(made[flags], folder / build_hook.LIBRARY))

    return make
