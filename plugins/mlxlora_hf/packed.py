"""Weights that mlx-lm has packed: ``PATH.weight``, ``PATH.scales`` and ``PATH.biases`` as one tensor.

How many bits each has stands in the table ``quantization`` of config.json:
``group_size``, ``bits`` and ``mode`` of all, and for a path values of its own, or
false where it is dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.api import LazyTensor, ModelError, PackedTensor, listing

if TYPE_CHECKING:
    import mlx.core as mx

_QUANTIZER = "affine"
_DEFAULTS = {"group_size": 64, "bits": 4}  # of MLX, for this mode
_CHOICES = {"group_size": (32, 64, 128), "bits": (2, 3, 4, 5, 6, 8)}
_MODE = "mode"
_KEYS = {_MODE, *_DEFAULTS}
_PARTS = ("weight", "scales", "biases")
_FLOATS = ("float16", "bfloat16", "float32")

Tensors = Mapping[str, LazyTensor]


def join_packed(
    tensors: Tensors, table: Mapping[str, Any] | None, short: Callable[[str], str], where: Path
) -> dict[str, LazyTensor]:
    """The tensors with each packed weight as one of them.

    Args:
        tensors: name -> tensor.
        table: ``quantization`` of config.json, or None.
        short: what a path in it is called among the tensors.
        where: config.json, for messages.

    Raises:
        ModelError: another mode (by its name), or parts that do not fit each other or the table (all listed).
    """
    paths = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if table is None:
        if paths:
            raise ModelError(
                f"states no quantization, but {len(paths)} weights are packed: {listing(paths)}", where=where
            )
        return dict(tensors)
    common, own = _read_table(table, short, where)
    faults = [
        f"{path} is stated, but not packed"
        for path, options in own.items()
        if _is_dense(path, tensors, options)
    ]
    packed = {}
    for path in paths:
        options = own.get(path, common)
        if options is None:
            faults.append(f"{path} is packed, but stated to be dense")
        elif fault := _misfit(path, tensors, options):
            faults.append(fault)
        else:
            packed[path] = _joined(path, tensors, options)
    if faults:
        raise ModelError("the packed weights do not fit: " + listing(faults, 4), where=where)
    parts = {f"{path}.{part}" for path in packed for part in _PARTS[1:]}
    return {
        name: packed.get(name.removesuffix(".weight"), tensor) if name.endswith(".weight") else tensor
        for name, tensor in tensors.items()
        if name not in parts
    }


def _read_table(
    table: Mapping[str, Any], short: Callable[[str], str], where: Path
) -> tuple[dict[str, int], dict[str, dict[str, int] | None]]:
    """The options of all, and path -> options of its own, or None where it is dense."""
    by_path = {key: v for key, v in table.items() if isinstance(v, dict | bool) and key not in _KEYS}
    common = _options({key: v for key, v in table.items() if key not in by_path}, "", where)
    own: dict[str, dict[str, int] | None] = {}
    for path, value in by_path.items():
        if isinstance(value, dict):
            own[short(path)] = _options(value, f" of {path}", where)
        elif value is False:
            own[short(path)] = None
    return common, own


def _options(stated: Mapping[str, Any], whose: str, where: Path) -> dict[str, int]:
    """The options that a part of the table states; null is as good as nothing."""
    mode = stated.get(_MODE)
    if mode not in (None, _QUANTIZER):
        raise ModelError(
            f"the quantization{whose} is of mode {mode!r}, which is not read; read is '{_QUANTIZER}'",
            where=where,
            fix="take the model that it was made of, and quantize that: --quantize",
        )
    unknown = sorted(stated.keys() - _KEYS)
    if unknown:
        raise ModelError(
            f"the quantization{whose} has keys that are not known: {listing(unknown)}", where=where
        )
    options = {}
    for key, default in _DEFAULTS.items():
        value = default if stated.get(key) is None else stated[key]
        if type(value) is not int or value not in _CHOICES[key]:
            raise ModelError(
                f"{key} of the quantization{whose} is {value!r}, wanted one of {listing(_CHOICES[key])}",
                where=where,
            )
        options[key] = value
    return options


def _is_dense(path: str, tensors: Tensors, options: Mapping[str, int] | None) -> bool:
    """Whether a weight that the table has options for is there, and is dense."""
    return options is not None and f"{path}.weight" in tensors and f"{path}.scales" not in tensors


def _misfit(path: str, tensors: Tensors, options: Mapping[str, int]) -> str:
    """Why the parts of a weight do not belong together, or nothing."""
    absent = [f"{path}.{part}" for part in _PARTS if f"{path}.{part}" not in tensors]
    if absent:
        return f"there is no {listing(absent)}"
    words, scales, biases = (tensors[f"{path}.{part}"] for part in _PARTS)
    if words.dtype != "uint32" or scales.dtype not in _FLOATS or biases.dtype != scales.dtype:
        types = f"{words.dtype}, {scales.dtype} and {biases.dtype}"
        return f"{path} has parts of {types}, wanted uint32 and two of one float type"
    whole = (
        len(words.shape) == len(scales.shape) == 2
        and scales.shape == biases.shape
        and words.shape[0] == scales.shape[0]
        and words.shape[1] * 32 == scales.shape[1] * options["group_size"] * options["bits"]
    )
    stated = f"{options['bits']} bits, {options['group_size']} weights a group"
    shapes = f"{words.shape}, {scales.shape} and {biases.shape}"
    return "" if whole else f"{path} has parts of {shapes}, which are not {stated}"


def _joined(path: str, tensors: Tensors, options: Mapping[str, int]) -> LazyTensor:
    """The parts of one weight (outputs, inputs) as one tensor."""
    parts = {part: tensors[f"{path}.{part}"] for part in _PARTS}

    def read() -> mx.array:
        import mlx.core as mx

        words, scales, biases = (parts[part].read() for part in _PARTS)
        # In float32: in the type of the scales the sum would be rounded.
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(words, scales, biases, options["group_size"], options["bits"])

    rows, groups = parts["scales"].shape
    return LazyTensor(
        (rows, groups * options["group_size"]), "float32", read, PackedTensor(_QUANTIZER, options, parts)
    )
