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
def make_served(
    model_folder: Callable[..., Path], registry: Registry, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Served]:
    """A function that loads the tiny model, with its adapters."""
    made: dict[Any, dict[str, Path]] = {}

    def make(names: Sequence[str] = tuple(ADAPTERS), **options: Any) -> Served:
        base = model_folder(**options)
        if base not in made:
            folder = tmp_path_factory.mktemp("adapters")
            made[base] = {
                name: written_adapter(base, folder / f"{name}.safetensors", registry, *each)
                for name, each in ADAPTERS.items()
            }
        model = loading.load(base, registry)
        several = AdapterSet(model)
        for name in names:
            several.load(name, AdapterFile(made[base][name]), registry)
        mx.eval(model.language_model.parameters())
        return Served(model.language_model, model.tokenizer, several)

    return make


@pytest.fixture(scope="module")
def served(make_served: Callable[..., Served]) -> Served:
    """The tiny model with its adapters, in float32."""
    return make_served()
