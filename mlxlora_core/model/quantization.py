"""What a quantizer makes of weights, checked; and the quantized layers of a model folder, restored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.errors import ModelError, PluginError, UsageError, listing
from mlxlora_core.files import tensor_file
from mlxlora_core.files.tensor_checks import is_finite, type_name
from mlxlora_core.model.folder import SOURCE
from mlxlora_core.model.linears import (
    QuantizedEmbedding,
    QuantizedLinear,
    embeddings,
    linear_shape,
    linears,
    replace_modules,
)
from mlxlora_core.options import explain, parse
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.plugins.defaults import DEFAULT_QUANTIZER

#: keys of config.json: which quantizer, its options, and path -> options that differ of what it packed
QUANTIZER, QUANTIZATION, QUANTIZED = "quantizer", "quantization", "quantized"
_MODE = "mode"


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model when every weight is dense, and other than what it was made of."""
    apart = (QUANTIZER, QUANTIZATION, QUANTIZED, SOURCE)
    return {key: value for key, value in config.items() if key not in apart}


@dataclass(frozen=True)
class Packed:
    """A weight in fewer bits.

    Attributes:
        parts: the tensors that stand for it, by the quantizer's names.
        weight: what they stand for, float32.
    """

    parts: Mapping[str, mx.array]
    weight: mx.array


def pack(weight: mx.array, quantization: Choice) -> Packed | None:
    """What the quantizer makes of a weight (..., outputs, inputs), or None where it leaves it as it is.

    Raises:
        PluginError: it gives something else than its parts, or parts that stand
            for another shape or for values that are not finite.
    """
    component, options = quantization.component, quantization.options
    given = component.spec.quantize(weight, options)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise component.breach("quantize", type(given).__name__, "a mapping of its parts, or None")
    parts = dict(given)
    if parts.keys() != set(component.spec.parts):
        raise component.breach("quantize", f"parts {listing(map(str, parts))}", listing(component.spec.parts))
    for name, part in parts.items():
        if component.checked("quantize", part, mx.array).dtype not in tensor_file.TYPES:
            raise component.breach("quantize", f"{name} of type {part.dtype}", "a type that files hold")
    restored = expanded(parts, quantization, weight.shape)
    if not is_finite(restored):
        raise component.breach("dequantize", "values that are not finite", "finite ones")
    return Packed(parts, restored)


def repacked(weight: mx.array, quantization: Choice, path: str) -> Mapping[str, mx.array]:
    """The parts of a weight, quantized once more.

    Raises:
        PluginError: the quantizer leaves it as it is, which it had packed before.
    """
    packed = pack(weight, quantization)
    if packed is None:
        what = f"None for {path}, which it packed before"
        raise quantization.component.breach("quantize", what, "its parts")
    return packed.parts


def read_quantization(config: Mapping[str, Any], registry: Registry, where: Path) -> Choice | None:
    """How a config says that linears are quantized, or None.

    Raises:
        PluginError: no such quantizer.
        ModelError: options that it does not have.
    """
    stated = config.get(QUANTIZATION)
    if stated is None:
        return None
    name = config.get(QUANTIZER, DEFAULT_QUANTIZER)
    if not isinstance(stated, dict) or not isinstance(name, str):
        raise ModelError(f"quantization is {stated!r} by {name!r}, wanted a table and a name", where=where)
    component = registry.find("quantizer", name)
    return Choice(component, _options(component, stated, where))


def packed_config(quantizer: str, packed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What config.json holds of packed weights: the commonest options, and of each what differs from them.

    Args:
        quantizer: who packed them.
        packed: path -> the options of each weight; one at least.
    """
    found = {path: json.dumps(dict(options), sort_keys=True) for path, options in packed.items()}
    commonest = Counter(found.values()).most_common(1)[0][0]
    common = dict(next(packed[path] for path, text in found.items() if text == commonest))
    differing = {
        path: {key: value for key, value in options.items() if common.get(key) != value}
        for path, options in packed.items()
    }
    return {QUANTIZER: quantizer, QUANTIZATION: common, QUANTIZED: differing}


def packed_already(
    module: nn.Module, tensors: Collection[str], config: Mapping[str, Any], where: Path
) -> dict[str, dict[str, Any]]:
    """path -> the options of each weight that a config says is packed.

    Args:
        module: the model, with dense linears.
        tensors: names of those of the weight file.
        config: config.json.
        where: config.json, for messages.

    Raises:
        ModelError: the config says it in another form.
    """
    if QUANTIZATION not in config:
        return {}
    known = {path for found in (linears(module), embeddings(module)) for path, _ in found}
    stated = _packed(known, tensors, config, where)
    return {path: {**config[QUANTIZATION], **differing} for path, differing in stated.items()}


def restore(
    module: nn.Module,
    tensors: Mapping[str, mx.array],
    config: Mapping[str, Any],
    quantization: Choice,
    where: Path,
) -> None:
    """Put an empty quantized linear wherever one is packed; its parts are filled in with the other weights.

    Args:
        module: the model, with dense linears.
        tensors: of the weight file.
        config: config.json.
        quantization: what it says of all quantized linears.
        where: config.json, for messages.

    Raises:
        ModelError: a linear that the model does not have, or parts that are not those of its weight.
    """
    dense = dict(linears(module))
    words = dict(embeddings(module))
    packed: dict[str, nn.Module] = {}
    faults: dict[str, str] = {}
    for path, differing in _packed({**dense, **words}, tensors, config, where).items():
        place = dense.get(path, words.get(path))
        if place is None:
            raise ModelError(
                f"{QUANTIZED} names {path}, which is no linear and no embedding of this model", where=where
            )
        stated = {**config[QUANTIZATION], **differing}
        own = Choice(quantization.component, _options(quantization.component, stated, where))
        try:
            packed[path] = _empty(path, place, tensors, own if differing else quantization)
        except (ModelError, PluginError, ValueError) as fault:
            faults[path] = str(fault)
    if faults:
        first = next(iter(faults.values()))
        raise ModelError(
            f"the weights do not fit config.json: {len(faults)} quantized weights, "
            f"{listing(faults)}, have other parts: {first}",
            where=where.parent,
        )
    replace_modules(module, packed)


def _packed(
    known: Collection[str], tensors: Collection[str], config: Mapping[str, Any], where: Path
) -> Mapping[str, Mapping[str, Any]]:
    """path -> the options that differ, of each quantized weight."""
    stated = config.get(QUANTIZED)
    if stated is None:  # written before linears were named one by one
        names = (name.rpartition(".") for name in tensors)
        return {path: {} for path, _, part in names if path in known and part not in ("weight", "bias")}
    if not isinstance(stated, dict) or not all(isinstance(value, dict) for value in stated.values()):
        raise ModelError(f"{QUANTIZED} must be a table of tables, by path", where=where)
    return stated


def _empty(
    path: str, module: nn.Module, tensors: Mapping[str, mx.array], quantization: Choice
) -> QuantizedLinear | QuantizedEmbedding:
    """What takes the place of a dense linear or embedding, with parts of the shapes that the file has."""
    names = quantization.component.spec.parts
    absent = [f"{path}.{name}" for name in names if f"{path}.{name}" not in tensors]
    if absent:
        raise ModelError(f"there is no {listing(absent)}")
    found = {name: tensors[f"{path}.{name}"] for name in names}
    parts = {name: mx.zeros(part.shape, part.dtype) for name, part in found.items()}
    shape = module.weight.shape if isinstance(module, nn.Embedding) else linear_shape(module)
    expanded(parts, quantization, shape)  # only the shape is asked for: nothing is computed
    if isinstance(module, nn.Embedding):
        _require_rows(parts, shape[0], quantization)
        return QuantizedEmbedding(quantization, parts, shape)
    return QuantizedLinear(quantization, parts, shape, module.bias if "bias" in module else None)


def _require_rows(parts: Mapping[str, mx.array], rows: int, quantization: Choice) -> None:
    """Refuse parts of an embedding that are not laid out row by row: single words are looked up in it."""
    other = [name for name, part in parts.items() if part.shape[:1] != (rows,)]
    if other:
        raise ModelError(
            f"quantizer '{quantization.component.spec.name}' does not pack row by row ({listing(other)}), "
            "as an embedding needs it"
        )


def expanded(parts: Mapping[str, mx.array], quantization: Choice, shape: tuple[int, ...]) -> mx.array:
    """The weight, float32, that the quantizer makes of ``parts``.

    Raises:
        PluginError: it has another shape or type.
    """
    component = quantization.component
    given = component.spec.dequantize(parts, quantization.options)
    weight = component.checked("dequantize", given, mx.array)
    if weight.shape != shape or weight.dtype != mx.float32:
        got = f"{weight.shape} {type_name(weight.dtype)}"
        raise component.breach("dequantize", got, f"{shape} float32")
    return weight


def _options(quantizer: Component, stated: Mapping[str, Any], where: Path) -> Any:
    """The options that config.json states; MLX's own ``mode`` there must be what this quantizer does."""
    name = quantizer.spec.name
    if _MODE in stated and _MODE not in {option.name for option in explain(quantizer.spec.options)}:
        if stated[_MODE] not in (None, name):
            raise ModelError(
                f"is quantized in mode {stated[_MODE]!r}, which '{name}' does not read", where=where
            )
        stated = {key: value for key, value in stated.items() if key != _MODE}
    try:
        return parse(quantizer.spec.options, stated, owner=f"quantizer '{quantizer.spec.name}'")
    except UsageError as fault:
        raise ModelError(fault.what, where=where) from fault
