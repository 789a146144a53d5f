"""A tiny model with adapters on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from serving_steps import ADAPTERS, Served, written_adapter

from mlxlora_core.model import loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.several import AdapterSet
from mlxlora_core.plugins import Registry


@pytest.fixture(scope="module")
def adapter_files(
    registry: Registry, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], dict[str, Path]]:
    """A function that gives a file of each adapter for a base."""
    made: dict[Path, dict[str, Path]] = {}

    def make(base: Path) -> dict[str, Path]:
        if base not in made:
            folder = tmp_path_factory.mktemp("adapters")
            made[base] = {
                name: written_adapter(base, folder / f"{name}.safetensors", registry, *each)
                for name, each in ADAPTERS.items()
            }
        return made[base]

    return make


@pytest.fixture(scope="module")
def make_served(
    model_folder: Callable[..., Path], registry: Registry, adapter_files: Callable[[Path], dict[str, Path]]
) -> Callable[..., Served]:
    """A function that loads the tiny model, with its adapters."""

    def make(names: Sequence[str] = tuple(ADAPTERS), **options: Any) -> Served:
        base = model_folder(**options)
        model = loading.load(base, registry)
        several = AdapterSet(model)
        for name in names:
            several.load(name, AdapterFile(adapter_files(base)[name]), registry)
        mx.eval(model.language_model.parameters())
        return Served(model.language_model, model.tokenizer, several)

    return make


@pytest.fixture(scope="module")
def served(make_served: Callable[..., Served]) -> Served:
    """The tiny model with its adapters, in float32."""
    return make_served()
