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
def compile_sgemm(build_hook: Any) -> Callable[..., Path]:
    """Compiles the C files of the openblas plugin as installing does: ``compile_sgemm(folder, *flags)``."""
    if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("needs a C compiler: install gcc or clang")

    def make(folder: Path, *flags: str) -> Path:
        library = folder / build_hook.LIBRARY
        build_hook.compile_library(Path(mlxlora_openblas.__file__).parent, library, *flags)
        return library

    return make
