"""mlxlora: language models of the Llama kind, fine-tuned on MLX; every part is a plugin.

::

    import mlxlora_core as mlxlora

    model = mlxlora.load("model-folder")

What is named here is for people; it is loaded when it is first asked for.
Plugins import ``mlxlora_core.api``, ``.ops`` and ``.files``.
"""

# No import before that of our own modules: ``python -m mlxlora_core`` begins here, and Python would look
# for it, even for ``__future__``, in the working folder.
from mlxlora_core.version import __version__ as __version__

__all__ = [
    "Model",
    "TrainReport",
    "TrainResult",
    "ValidReport",
    "errors",
    "evaluate",
    "export",
    "fuse",
    "generate",
    "load",
    "registry",
    "run",
    "score",
    "stream",
    "train",
]

TYPE_CHECKING = False  # typing itself takes longer to import than all the rest
if TYPE_CHECKING:
    from mlxlora_core import errors
    from mlxlora_core.python import evaluate, export, fuse, generate, run, score, stream, train
    from mlxlora_core.python.model import Model, load, registry
    from mlxlora_core.training.events import TrainReport, TrainResult, ValidReport
else:  # a type checker would take any name for one that is here

    def __getattr__(name):
        from importlib import import_module

        if name == "errors":
            return import_module("mlxlora_core.errors")
        if name in __all__:
            return getattr(import_module("mlxlora_core.python"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
