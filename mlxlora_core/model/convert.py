"""``loader.open -> architecture.tensors -> cast -> quantizer -> model folder``, a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import ModelError, UsageError
from mlxlora_core.files import durable, tensor_file
from mlxlora_core.files.targets import check_output_folder, paths_in
from mlxlora_core.machine.disk import require_disk
from mlxlora_core.machine.memory import require_memory
from mlxlora_core.model import folder as model_folder
from mlxlora_core.model.events import SpaceNeeded, TensorWritten
from mlxlora_core.model.folder import CONFIG, SOURCE
from mlxlora_core.model.linears import Quantized
from mlxlora_core.model.stored import StoredModel, bytes_of, is_part, open_to_convert
from mlxlora_core.model.weights import WEIGHTS
from mlxlora_core.options import plain
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.values import LazyTensor


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
    quantization: Quantization | None = None,
    overwrite: bool = False,
    name: str = "",
) -> Iterator[SpaceNeeded | TensorWritten | ConvertReport]:
    """Turn a model into a model folder, in memory that does not grow with the model.

    Args:
        source: folder or file of the checkpoint, or a model folder.
        target: model folder to make.
        registry: where loaders and architectures are looked up.
        loader: which weight loader; None asks each whether it knows the folder.
        loader_options: of the loader; None for its defaults.
        dtype: a type, or ``stored`` for that of each tensor as it is; None for what the loader says.
        file_format: ``safetensors`` or ``npz``.
        quantization: how to quantize the linears, or None.
        overwrite: whether a model folder that is there may be replaced.
        name: by which the source is found again, such as ``org/name@commit``, to be kept in config.json.

    Yields:
        What disk and memory must hold, each tensor as it is written, and the report.

    Raises:
        UsageError: the target is the source, or holds it; nothing is left to quantize, or the
            quantizer takes none of it.
        ModelError: a part is absent or damaged, or tensors do not fit (all listed).
        SafetyError: the target holds something else, or a file wants to run code.
        ResourceError: disk or memory is too small.
    """
    ours = model_folder.holds_only_a_model
    check_output_folder(target, [source, *paths_in(loader_options)], overwrite=overwrite, ours=ours)
    stored = open_to_convert(
        source,
        registry,
        loader=loader,
        loader_options=loader_options,
        dtype=dtype,
        quantization=quantization,
    )
    tensors = stored.tensors
    if file_format == "npz" and any(tensor.dtype == "bfloat16" for tensor in tensors.values()):
        raise UsageError("npz cannot hold bfloat16", fix="use --dtype float16, or --format safetensors")
    disk = require_disk(sum(map(bytes_of, tensors.values())), target)
    yield SpaceNeeded(f"{disk}; {_memory(stored)}")
    with durable.new_folder(target, overwrite=overwrite, ours=ours) as folder:
        yield from _write_weights(folder / WEIGHTS[file_format], tensors, source)
        for file, path in stored.tokenizer.files.items():
            durable.copy_file(path, folder / file)
        durable.write_json(folder / CONFIG, {**stored.config, **({SOURCE: name} if name else {})})
    yield _report(target, stored)


def _memory(stored: StoredModel) -> str:
    """What the largest tensor will need of memory, in words, once the loader has what it reads with.

    Raises:
        ResourceError: less is free.
    """
    taken = stored.packing.taken if stored.packing is not None else ()
    whole = {name: t for name, t in stored.tensors.items() if name.rpartition(".")[0] not in taken}
    sizes = {name: math.prod(tensor.shape) for name, tensor in whole.items()}
    if sizes:
        mx.eval(whole[min(sizes, key=sizes.__getitem__)].read())
    # Each is read, in whatever type it has there, cast, and written.
    need = max((4 * math.prod(t.shape) + 2 * bytes_of(t) for t in whole.values()), default=0)
    packing = stored.packing.work_bytes if stored.packing is not None else 0
    return require_memory(max(need, packing), "converting", "convert where there is more memory")


def _write_weights(path: Path, tensors: Mapping[str, LazyTensor], source: Path) -> Iterator[TensorWritten]:
    """Write the weight file, and tell of each tensor."""
    events = tensor_file.saving(path, _read(tensors, source), {}, most=len(tensors))
    for done, written in enumerate(events, start=1):
        if isinstance(written, str):
            yield TensorWritten(written, done, len(tensors))


def _read(tensors: Mapping[str, LazyTensor], source: Path) -> Iterator[tuple[str, mx.array]]:
    """(name, tensor) as the weight file will hold them, one at a time."""
    for name, lazy in tensors.items():
        try:
            tensor = lazy.read()
        except OSError as fault:  # else it would pass for a fault of the disk that is written to
            raise ModelError(f"{name} cannot be read: {fault}", where=source) from fault
        yield name, tensor
        del tensor
        mx.clear_cache()


def _report(target: Path, stored: StoredModel) -> ConvertReport:
    """What was done, once all tensors are read."""
    packing = stored.packing
    packed = {path: child for path, child in stored.module.named_modules() if isinstance(child, Quantized)}
    dense = (t for name, t in stored.tensors.items() if not is_part(name, packed))
    kept = (
        [f"{len(packing.kept)} weights were packed and stay as they are"] if packing and packing.kept else []
    )
    return ConvertReport(
        folder=str(target),
        loader=stored.loader.id if stored.loader is not None else "model folder",
        architecture=stored.architecture.id,
        parameters=sum(math.prod(child.shape) for child in packed.values())
        + sum(math.prod(tensor.shape) for tensor in dense),
        bytes=sum(map(bytes_of, stored.tensors.values())),
        quantized=len(packed),
        left_dense=packing.left_dense if packing else (),
        relative_error=packing.relative_error if packing else 0.0,
        left_out=tuple(stored.unread),
        padding=stored.language_model.vocab_size - stored.tokenizer.vocab_size,
        notes=(*stored.notes, *kept),
    )
