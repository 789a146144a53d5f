"""``loader.open -> architecture.tensors -> cast -> quantizer -> model folder``, a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import ModelError, UsageError, listing
from mlxlora_core.files import durable, tensor_file
from mlxlora_core.files.targets import check_output_folder, paths_in
from mlxlora_core.files.tensor_checks import is_finite, type_name
from mlxlora_core.machine.disk import require_disk
from mlxlora_core.machine.memory import require_memory
from mlxlora_core.model import folder as model_folder
from mlxlora_core.model.events import SpaceNeeded, TensorWritten
from mlxlora_core.model.folder import CONFIG, SOURCE
from mlxlora_core.model.foreign import OpenedModel, open_foreign
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import linears
from mlxlora_core.model.quantization import QUANTIZATION, QUANTIZED, QUANTIZER, pack
from mlxlora_core.model.stored import folder_form
from mlxlora_core.model.weights import WEIGHTS
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.sections import QuantizeConfig
from mlxlora_core.values import LazyTensor

_NOT_THE_HEAD = QuantizeConfig()
#: the type of each tensor in the checkpoint
STORED = "stored"
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass
class _Tally:
    """What has been converted so far."""

    tensors: int = 0
    parameters: int = 0
    quantized: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # packed already in the checkpoint
    left_dense: list[str] = field(default_factory=list)
    squared_error: float = 0.0
    squared_weight: float = 0.0


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        folder: the model folder.
        loader: who read the foreign model.
        architecture: who builds the model.
        parameters: how many the model has.
        bytes: size of the tensors written.
        quantized: how many linears were quantized.
        left_dense: linears that the quantizer left as they are.
        relative_error: ‖w - ŵ‖ / ‖w‖ over all quantized weights.
        left_out: tensors of the checkpoint that the model has no use for.
        padding: ids of the model that stand for no piece of its tokenizer; they are never drawn.
        notes: what was assumed of the checkpoint, or done to it, that its owner may not expect.
    """

    folder: str
    loader: str
    architecture: str
    parameters: int
    bytes: int
    quantized: int
    left_dense: tuple[str, ...]
    relative_error: float
    left_out: tuple[str, ...]
    padding: int
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits that a parameter takes on average, scales and dense layers included."""
        return self.bytes * 8 / self.parameters

    def values(self) -> dict[str, Any]:
        """The report in plain values."""
        values: dict[str, Any] = plain(self)
        return values | {"bits_per_weight": self.bits_per_weight}


def convert(
    source: Path,
    target: Path,
    registry: Registry,
    *,
    loader: str | None = None,
    loader_options: Any = None,
    dtype: str | None = None,
    file_format: str = "safetensors",
    quantization: Choice | None = None,
    quantize_config: QuantizeConfig = _NOT_THE_HEAD,
    overwrite: bool = False,
    name: str = "",
) -> Iterator[SpaceNeeded | TensorWritten | ConvertReport]:
    """Turn a foreign model into a model folder, in memory that does not grow with the model.

    Args:
        source: folder or file of the checkpoint.
        target: model folder to make.
        registry: where loaders and architectures are looked up.
        loader: which weight loader; None asks each whether it knows the folder.
        loader_options: of the loader; None for its defaults.
        dtype: a type, or ``stored`` for that of each tensor as it is; None for what the loader says.
        file_format: ``safetensors`` or ``npz``.
        quantization: how to quantize the linears, or None.
        quantize_config: which of them.
        overwrite: whether a model folder that is there may be replaced.
        name: by which the source is found again, such as ``org/name@commit``, to be kept in config.json.

    Yields:
        What disk and memory must hold, each tensor as it is written, and the report.

    Raises:
        UsageError: the target is the source, or holds it; the quantizer leaves every linear as it is.
        ModelError: a part is absent or damaged, or tensors do not fit (all listed).
        SafetyError: the target holds something else, or a file wants to run code.
        ResourceError: disk or memory is too small.
    """
    ours = model_folder.holds_only_a_model
    check_output_folder(target, [source, *paths_in(loader_options)], overwrite=overwrite, ours=ours)
    opened = open_foreign(source, registry, loader, loader_options)
    config, tensors = _folder_form(opened, source, name, quantization)
    packed = _to_quantize(opened.model, quantize_config) if quantization else set()
    types = _types(opened, tensors, dtype, file_format)
    disk = _need(tensors, packed, types, target)
    yield SpaceNeeded(f"{disk}; {_memory(tensors, packed, types)}")
    if quantization is not None:
        _check_takes_some({(tensors[name].shape, types[name]) for name in packed}, len(packed), quantization)
    tally = _tally(opened)
    with durable.new_folder(target, overwrite=overwrite, ours=ours) as folder:
        stream = _stored(tensors, packed, types, quantization, tally, source)
        size = 0
        most = len(tensors) * (len(quantization.component.spec.parts) if quantization else 1)
        for written in tensor_file.saving(folder / WEIGHTS[file_format], stream, {}, most=most):
            if isinstance(written, str):
                yield TensorWritten(written, tally.tensors, len(tensors))
            else:
                size = written.bytes
        _write_beside(folder, opened, config, quantization, tally)
    yield _report(target, opened, size, tally)


def _write_beside(
    folder: Path, opened: OpenedModel, config: Mapping[str, Any], quantization: Choice | None, tally: _Tally
) -> None:
    """Write what stands beside the weights: the tokenizer's files and config.json."""
    for name, path in opened.tokenizer.files.items():
        durable.copy_file(path, folder / name)
    durable.write_json(folder / CONFIG, {**config, **_quantized_config(quantization, tally.quantized)})


def _dtype(opened: OpenedModel, asked: str | None) -> str:
    """The type that is asked for, or else what the loader says of its checkpoints."""
    if asked is not None:
        return asked
    told: str = opened.loader.spec.dtype
    if told not in (STORED, *DTYPES):
        raise opened.loader.breach("dtype", repr(told), listing((STORED, *DTYPES)))
    return told


def _folder_form(
    opened: OpenedModel, source: Path, name: str, quantization: Choice | None
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """What config.json and the weight file would hold of the model as it is.

    Raises:
        UsageError: it is to be quantized, and is so already.
    """
    config, tensors = folder_form(opened)
    if quantization is not None and QUANTIZATION in config:
        raise UsageError(f"{source} is quantized already", fix="leave -q out: its bits are kept as they are")
    return config | ({SOURCE: name} if name else {}), tensors


def cast(name: str, tensor: mx.array, dtype: mx.Dtype, where: Path) -> mx.array:
    """``tensor`` in another type.

    Raises:
        ModelError: a value that the type cannot hold, or that is not finite to begin with.
    """
    result = tensor.astype(dtype)
    if not is_finite(result):
        raise ModelError(
            f"{name} has values that are not finite as {type_name(dtype)}",
            where=where,
            fix="use --dtype bfloat16 or float32, if the weights themselves are sound",
        )
    return result


def _types(
    opened: OpenedModel, tensors: Mapping[str, LazyTensor], asked: str | None, file_format: str
) -> dict[str, mx.Dtype]:
    """The type that each tensor gets; parts of a packed weight keep theirs.

    Raises:
        UsageError: the format cannot hold one of them.
    """
    dtype = _dtype(opened, asked)
    kept = {name for name in tensors if name not in opened.tensors or opened.tensors[name].packed is not None}
    types = {
        name: getattr(mx, tensor.dtype) if dtype == STORED or name in kept else DTYPES[dtype]
        for name, tensor in tensors.items()
    }
    if file_format == "npz" and mx.bfloat16 in types.values():
        raise UsageError("npz cannot hold bfloat16", fix="use --dtype float16, or --format safetensors")
    return types


def _tally(opened: OpenedModel) -> _Tally:
    """A tally in which the weights that are packed already are counted."""
    packed = {name: tensor.shape for name, tensor in opened.tensors.items() if tensor.packed is not None}
    return _Tally(
        parameters=sum(map(math.prod, packed.values())),
        kept=[name.removesuffix(".weight") for name in packed],
    )


def _to_quantize(model: LanguageModel, config: QuantizeConfig) -> set[str]:
    """The names of the weights that the quantizer is asked about."""
    paths = {path for path, _ in linears(model)}
    return {f"{path}.weight" for path in paths if config.head or path != model.head_path}


def _need(
    tensors: Mapping[str, LazyTensor], packed: Collection[str], types: Mapping[str, mx.Dtype], target: Path
) -> str:
    """What the model will need of the disk, in words; of what is quantized only that it is not counted."""
    sizes = (math.prod(t.shape) * types[name].size for name, t in tensors.items() if name not in packed)
    said = require_disk(sum(sizes), target)
    return f"{said}, not counting what is quantized" if packed else said


def _memory(tensors: Mapping[str, LazyTensor], packed: Collection[str], types: Mapping[str, mx.Dtype]) -> str:
    """What the largest tensor will need of memory, in words, once the loader has what it reads with.

    Raises:
        ResourceError: less is free.
    """
    sizes = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    mx.eval(tensors[min(sizes, key=sizes.__getitem__)].read())
    need = max(
        size
        * (
            2 * getattr(mx, tensors[name].dtype).size + 13
            if name in packed
            else _bytes_each(tensors[name], types[name])
        )
        for name, size in sizes.items()
    )
    return require_memory(need, "converting", "convert where there is more memory")


def _bytes_each(tensor: LazyTensor, dtype: mx.Dtype) -> int:
    """What each number of a tensor takes that is read, cast, and written."""
    return int(getattr(mx, tensor.dtype).size) + 2 * dtype.size


def _stored(
    tensors: Mapping[str, LazyTensor],
    packed: Collection[str],
    types: Mapping[str, mx.Dtype],
    quantization: Choice | None,
    tally: _Tally,
    source: Path,
) -> Iterator[tuple[str, mx.array]]:
    """(name, tensor) as the weight file will hold them, one at a time."""
    kept = frozenset(tally.kept)
    for name, lazy in tensors.items():
        try:
            tensor = lazy.read()
            if mx.issubdtype(tensor.dtype, mx.floating):
                tensor = cast(name, tensor, types[name], source)
        except OSError as fault:  # else it would pass for a fault of the disk that is written to
            raise ModelError(f"{name} cannot be read: {fault}", where=source) from fault
        tally.tensors += 1
        owner = name.rpartition(".")[0]
        tally.parameters += 0 if owner in kept else tensor.size
        if quantization is not None and name in packed:
            yield from _quantized(name.removesuffix(".weight"), tensor, quantization, tally)
        else:
            yield name, tensor
        del tensor
        mx.clear_cache()


def _quantized(
    path: str, weight: mx.array, quantization: Choice, tally: _Tally
) -> Iterator[tuple[str, mx.array]]:
    """The tensors of one linear after the quantizer has had its say; the tally counts the error."""
    packed = pack(weight, quantization)
    if packed is None:
        tally.left_dense.append(path)
        yield f"{path}.weight", weight
        return
    exact = weight.astype(mx.float32)
    tally.quantized.append(path)
    tally.squared_error += float((packed.weight - exact).square().sum())
    tally.squared_weight += float(exact.square().sum())
    yield from ((f"{path}.{name}", part) for name, part in packed.parts.items())


def _check_takes_some(
    weights: Collection[tuple[tuple[int, ...], mx.Dtype]], count: int, quantization: Choice
) -> None:
    """Refuse, before any work, a quantizer that would take no linear, so that the model would be no smaller.

    Args:
        weights: shape and type of those that it will be asked about; small ones are tried first, with zeros
            in them, for whether it takes one is a matter of shape and type.
        count: of these weights.
        quantization: the quantizer.

    Raises:
        UsageError: it leaves all of them as they are.
    """
    small_first = sorted(weights, key=lambda weight: math.prod(weight[0]))
    if any(pack(mx.zeros(shape, dtype), quantization) for shape, dtype in small_first):
        return
    options = ", ".join(f"{key} {value}" for key, value in plain(quantization.options).items())
    widths = listing(sorted({shape[-1] for shape, _ in weights}))
    name = quantization.component.spec.name
    raise UsageError(
        f"nothing is quantized: quantizer '{name}' ({options}) leaves all {count} linears "
        f"as they are, which have {widths} inputs",
        fix="choose options that take them, such as a --q-group-size that divides these, or leave -q out",
    )


def _quantized_config(quantization: Choice | None, paths: Collection[str]) -> dict[str, Any]:
    """What config.json holds of a quantizer, if there was one, and of what it packed."""
    if quantization is None:
        return {}
    return {
        QUANTIZER: quantization.component.id,
        QUANTIZATION: plain(quantization.options),
        QUANTIZED: {path: {} for path in paths},
    }


def _report(target: Path, opened: OpenedModel, size: int, tally: _Tally) -> ConvertReport:
    return ConvertReport(
        folder=str(target),
        loader=opened.loader.id,
        architecture=opened.architecture.id,
        parameters=tally.parameters,
        bytes=size,
        quantized=len(tally.quantized) + len(tally.kept),
        left_dense=tuple(tally.left_dense),
        relative_error=(tally.squared_error / tally.squared_weight) ** 0.5 if tally.squared_weight else 0.0,
        left_out=tuple(opened.unread),
        padding=opened.model.vocab_size - opened.tokenizer.vocab_size,
        notes=tuple(opened.notes),
    )
