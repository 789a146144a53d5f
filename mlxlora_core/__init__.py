"""mlxlora: language models of the Llama kind, fine-tuned on MLX; every part is a plugin.

::

    import mlxlora_core as mlxlora

    model = mlxlora.load("model-folder")

What is named here is for people; it is loaded when it is first asked for.
Plugins import ``mlxlora_core.api``, ``.ops`` and ``.files``.
"""

from __future__ import annotations

from mlxlora_core.version import __version__

TYPE_CHECKING = False  # typing itself takes longer to import than all the rest
if TYPE_CHECKING:
    from typing import Any

    from mlxlora_core.python import (
        Model,
        evaluate,
        export,
        fuse,
        generate,
        load,
        registry,
        run,
        stream,
        train,
    )

__all__ = [
    "Model",
    "__version__",
    "evaluate",
    "export",
    "fuse",
    "generate",
    "load",
    "registry",
    "run",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("mlxlora_core.python"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
