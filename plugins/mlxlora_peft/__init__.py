"""Adapters of PEFT, both ways: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlxlora_core.api import AdapterLoader, ForeignAdapter, NoOptions, hookimpl


def detect(path: Path) -> bool:
    """Whether ``path`` is an adapter folder of PEFT, or a file with tensors as it names them."""
    from mlxlora_peft.opening import detect

    return detect(path)


def open_adapter(path: Path, options: NoOptions) -> ForeignAdapter:
    """The adapter at ``path``; see :func:`mlxlora_peft.opening.open_adapter`."""
    from mlxlora_peft.opening import open_adapter

    return open_adapter(path)


@hookimpl
def mlxlora_adapter_loaders() -> Iterable[AdapterLoader]:
    """The one adapter loader of this plugin."""
    summary = "adapters of PEFT: LoRA, rsLoRA, DoRA, IA3, VeRA"
    return [AdapterLoader(name="peft", summary=summary, detect=detect, open=open_adapter)]
