"""The one module that a plugin imports.

::

    from mlxlora_core.api import Sampler, hookimpl, option

What needs mlx (``QuantizedLinear``, ``KVCache`` and the functions on linears)
is loaded when it is first asked for: take it inside the function that uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxlora_core.errors import (
    DataError,
    MlxloraError,
    ModelError,
    PluginError,
    ResourceError,
    SafetyError,
    UsageError,
    some,
)
from mlxlora_core.hookspecs import API_VERSION, hookimpl
from mlxlora_core.input_file import open_regular, read_exactly, read_json, refuse_stand_in
from mlxlora_core.jsonl import JsonLines, check_content, read_jsonl, refuse_faults, scan_jsonl
from mlxlora_core.limits import thread_count
from mlxlora_core.options import NoOptions, option
from mlxlora_core.specs import (
    Adapter,
    AdapterOptions,
    Architecture,
    Cache,
    Checkpoint,
    DatasetBuilder,
    DatasetOptions,
    LanguageModel,
    LazyTensor,
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
    WeightLoader,
)
from mlxlora_core.zip_layout import ZipLayout, ZipMember, read_zip_layout

if TYPE_CHECKING:
    from mlxlora_core.cache import KVCache
    from mlxlora_core.fast import attention, rms_norm, rotate, silu_times
    from mlxlora_core.layers import QuantizedLinear, dense_weight, linear_shape, on_cpu, on_cuda

_HEAVY = {
    "attention": "mlxlora_core.fast",
    "rms_norm": "mlxlora_core.fast",
    "rotate": "mlxlora_core.fast",
    "silu_times": "mlxlora_core.fast",
    "KVCache": "mlxlora_core.cache",
    "QuantizedLinear": "mlxlora_core.layers",
    "dense_weight": "mlxlora_core.layers",
    "linear_shape": "mlxlora_core.layers",
    "on_cpu": "mlxlora_core.layers",
    "on_cuda": "mlxlora_core.layers",
}

__all__ = [
    "API_VERSION",
    "Adapter",
    "AdapterOptions",
    "Architecture",
    "Cache",
    "Checkpoint",
    "DataError",
    "DatasetBuilder",
    "DatasetOptions",
    "JsonLines",
    "KVCache",
    "LanguageModel",
    "LazyTensor",
    "MlxloraError",
    "ModelError",
    "NoOptions",
    "PluginError",
    "QuantizedLinear",
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
    "UsageError",
    "WeightLoader",
    "ZipLayout",
    "ZipMember",
    "attention",
    "check_content",
    "dense_weight",
    "hookimpl",
    "linear_shape",
    "on_cpu",
    "on_cuda",
    "open_regular",
    "option",
    "read_exactly",
    "read_json",
    "read_jsonl",
    "read_zip_layout",
    "refuse_faults",
    "refuse_stand_in",
    "rms_norm",
    "rotate",
    "scan_jsonl",
    "silu_times",
    "some",
    "thread_count",
]


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        import importlib

        return getattr(importlib.import_module(_HEAVY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
