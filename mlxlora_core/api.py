"""The contract: what a plugin hands over, its options, the errors it may raise.

::

    from mlxlora_core.api import Sampler, hookimpl, option

Light: it loads neither mlx nor numpy. The maths stands in ``mlxlora_core.ops``,
safe reading of files in ``mlxlora_core.files``.
"""

from __future__ import annotations

from mlxlora_core.errors import (
    DataError,
    MlxloraError,
    ModelError,
    PluginError,
    ResourceError,
    SafetyError,
    UsageError,
    listing,
)
from mlxlora_core.hookspecs import hookimpl
from mlxlora_core.machine.processors import thread_count
from mlxlora_core.options import NoOptions, option
from mlxlora_core.specs import (
    Adapter,
    Architecture,
    Cache,
    DatasetBuilder,
    ForeignModel,
    LanguageModel,
    LazyTensor,
    Place,
    Quantizer,
    RecipeFile,
    Row,
    Rows,
    Runtime,
    RuntimeNote,
    Sampler,
    Skipped,
    Transform,
    WeightLoader,
)

__all__ = [
    "Adapter",
    "Architecture",
    "Cache",
    "DataError",
    "DatasetBuilder",
    "ForeignModel",
    "LanguageModel",
    "LazyTensor",
    "MlxloraError",
    "ModelError",
    "NoOptions",
    "Place",
    "PluginError",
    "Quantizer",
    "RecipeFile",
    "ResourceError",
    "Row",
    "Rows",
    "Runtime",
    "RuntimeNote",
    "SafetyError",
    "Sampler",
    "Skipped",
    "Transform",
    "UsageError",
    "WeightLoader",
    "hookimpl",
    "listing",
    "option",
    "thread_count",
]
