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
from mlxlora_core.options import NoOptions, option, parse
from mlxlora_core.specs import (
    Adapter,
    AdapterOptions,
    Architecture,
    Cache,
    DatasetBuilder,
    DatasetOptions,
    ForeignModel,
    LazyTensor,
    Piece,
    Quantizer,
    QuantizerOptions,
    RecipeFile,
    Row,
    Rows,
    Runtime,
    RuntimeNote,
    Sample,
    Sampler,
    Skipped,
    Tokenizer,
    TokenizerLoader,
    WeightLoader,
)

__all__ = [
    "Adapter",
    "AdapterOptions",
    "Architecture",
    "Cache",
    "DataError",
    "DatasetBuilder",
    "DatasetOptions",
    "ForeignModel",
    "LazyTensor",
    "MlxloraError",
    "ModelError",
    "NoOptions",
    "Piece",
    "PluginError",
    "Quantizer",
    "QuantizerOptions",
    "RecipeFile",
    "ResourceError",
    "Row",
    "Rows",
    "Runtime",
    "RuntimeNote",
    "SafetyError",
    "Sample",
    "Sampler",
    "Skipped",
    "Tokenizer",
    "TokenizerLoader",
    "UsageError",
    "WeightLoader",
    "hookimpl",
    "listing",
    "option",
    "parse",
    "thread_count",
]
