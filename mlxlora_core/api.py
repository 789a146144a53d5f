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
from mlxlora_core.files.lazy_rows import neighbour_rows
from mlxlora_core.hookspecs import hookimpl
from mlxlora_core.machine.memory import free_in_groups_bytes
from mlxlora_core.machine.processors import thread_count
from mlxlora_core.options import NoOptions, option, parse
from mlxlora_core.plugins.progress import report_note, report_progress
from mlxlora_core.runtime_started import LayerOperations, RuntimeStarted
from mlxlora_core.series import RunInfo, Series, Watcher, figures, flat_settings
from mlxlora_core.specs import (
    Adapter,
    AdapterLoader,
    Architecture,
    Command,
    DatasetBuilder,
    Evaluator,
    Exporter,
    Layout,
    Observer,
    Quantizer,
    RecipeFile,
    Runtime,
    Sampler,
    TokenizerLoader,
    WeightLoader,
)
from mlxlora_core.values import (
    Answer,
    Cache,
    ExportAdapter,
    ExportSource,
    ForeignAdapter,
    ForeignModel,
    ForeignTensor,
    LazyTensor,
    LowRank,
    PackedProduct,
    PackedTensor,
    Piece,
    Place,
    Row,
    Rows,
    Skipped,
    Tokenizer,
    TokenizerFiles,
    Transform,
)

__all__ = [
    "Adapter",
    "AdapterLoader",
    "Answer",
    "Architecture",
    "Cache",
    "Command",
    "DataError",
    "DatasetBuilder",
    "Evaluator",
    "ExportAdapter",
    "ExportSource",
    "Exporter",
    "ForeignAdapter",
    "ForeignModel",
    "ForeignTensor",
    "LayerOperations",
    "Layout",
    "LazyTensor",
    "LowRank",
    "MlxloraError",
    "ModelError",
    "NoOptions",
    "Observer",
    "PackedProduct",
    "PackedTensor",
    "Piece",
    "Place",
    "PluginError",
    "Quantizer",
    "RecipeFile",
    "ResourceError",
    "Row",
    "Rows",
    "RunInfo",
    "Runtime",
    "RuntimeStarted",
    "SafetyError",
    "Sampler",
    "Series",
    "Skipped",
    "Tokenizer",
    "TokenizerFiles",
    "TokenizerLoader",
    "Transform",
    "UsageError",
    "Watcher",
    "WeightLoader",
    "figures",
    "flat_settings",
    "free_in_groups_bytes",
    "hookimpl",
    "listing",
    "neighbour_rows",
    "option",
    "parse",
    "report_note",
    "report_progress",
    "thread_count",
]
