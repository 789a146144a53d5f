"""``model + adapter -> exporter -> the files of another tool``, a tensor at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.files import durable, tensor_file
from mlxlora_core.files.documents import read_form
from mlxlora_core.files.forms import Map, Table, Text, Whole
from mlxlora_core.files.targets import check_output_folder, paths_in
from mlxlora_core.files.tensor_checks import type_name
from mlxlora_core.machine.disk import require_disk
from mlxlora_core.machine.memory import require_memory
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.casting import DTYPES, cast
from mlxlora_core.model.events import SpaceNeeded
from mlxlora_core.model.linears import Quantized, linear_shape, linears
from mlxlora_core.model.loading import Model
from mlxlora_core.model.quantization import expanded, without_quantization
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.values import ExportAdapter, ExportSource, LazyTensor
from mlxlora_core.version import __version__

RECORD = "export.json"
_RECORD_BYTES = 16 << 20

#: what shows an export to be one of ours
RECORD_FORM = Table({"exporter": Text(), "versions": Map(Text()), "files": Map(Whole())})

_UNFINISHED = (".tmp", ".part", ".partial", "~")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        folder: the files.
        exporter: who wrote them.
        tensors: of the model.
        parameters: of the model.
        adapter: which adapter is fused in, or nothing.
        files: name -> bytes.
        notes: what was assumed of the adapter's file, and whether it is of another base.
    """

    folder: str
    exporter: str
    tensors: int
    parameters: int
    adapter: str
    files: Mapping[str, int]
    notes: tuple[str, ...] = ()


def export(
    folder: Path,
    target: Path,
    exporter: Choice,
    registry: Registry,
    *,
    fused: AdapterFile | None = None,
    quantization: Quantization | None = None,
    overwrite: bool = False,
    told: Callable[[int, int], None] = lambda done, count: None,
) -> Iterator[SpaceNeeded | ExportReport]:
    """Write a model in another tool's form, in memory that does not grow with the model.

    Args:
        folder: the base.
        target: folder to make.
        exporter: who writes it, with which options.
        registry: where plugins are looked up.
        fused: the adapter to put into the weights.
        quantization: how the base is quantized when it is opened, as it was when the adapter was trained.
        overwrite: whether an export that is there may be replaced.
        told: called with (tensors begun, all) while the exporter works, for it
            takes the tensors at its own pace.

    Yields:
        What disk and memory must hold, and the report.

    Raises:
        UsageError: the target is the base, or holds the adapter.
        ModelError: the base or the adapter is damaged, or they do not fit.
        SafetyError: the target holds something else.
        ResourceError: disk or memory is too small.
        PluginError: the exporter leaves nothing, or what it must not.
    """
    read = [folder, *([fused.path] if fused else []), *paths_in(exporter.options)]
    check_output_folder(target, read, overwrite=overwrite, ours=holds_only_an_export)
    model, stored = loading.outline(folder, registry, quantization)
    adapted = adapters.load_file(fused, model, registry) if fused else None
    source = _source(model, stored, adapted, fused, told)
    sizes = {name: math.prod(tensor.shape) for name, tensor in source.tensors.items()}
    need = sum(size * getattr(mx, source.tensors[name].dtype).size for name, size in sizes.items())
    yield SpaceNeeded(
        f"{require_disk(need, target)}; {_memory(source, adapted, packed=model.quantization is not None)}"
    )
    with durable.new_folder(target, overwrite=overwrite, ours=holds_only_an_export) as new:
        component = exporter.component
        given = component.spec.export(source, new, exporter.options)
        if given is not None:
            raise component.breach("export", type(given).__name__, "None")
        files = _left(new, component)
        durable.write_json(new / RECORD, _record(exporter, model, adapted, files))
    name = adapted.choice.component.id if adapted else ""
    notes = adapted.notes if adapted else ()
    yield ExportReport(str(target), component.id, len(sizes), sum(sizes.values()), name, files, notes)


def holds_only_an_export(folder: Path) -> bool:
    """Whether everything in ``folder`` is what an export has written there."""
    try:
        record = read_form(folder / RECORD, RECORD_FORM, _RECORD_BYTES)
    except ModelError:
        return False
    found = {path for path in _walk(folder) if path.is_symlink() or not path.is_dir()}
    return found == {folder / name for name in (RECORD, *record["files"])}


def _memory(source: ExportSource, adapted: adapters.Adapted | None, *, packed: bool) -> str:
    """What the largest tensor will need of memory, in words.

    Raises:
        ResourceError: less is free.
    """
    fused = {f"{path}.weight" for path in adapted.paths} if adapted else set()
    # One that is expanded, or gets an adapter's change, is float32 on the way.
    each = (
        math.prod(tensor.shape) * (16 if packed or name in fused else getattr(mx, tensor.dtype).size * 3 // 2)
        for name, tensor in source.tensors.items()
    )
    return require_memory(max(each), "exporting", "export where there is more memory")


# --- the source ---------------------------------------------------------------


def _source(
    model: Model,
    stored: Mapping[str, LazyTensor],
    adapted: adapters.Adapted | None,
    fused: AdapterFile | None,
    told: Callable[[int, int], None],
) -> ExportSource:
    """What the exporter gets."""
    tensors = _dense(model, stored, adapted)
    begun: set[str] = set()

    def read(name: str, tensor: LazyTensor) -> mx.array:
        begun.add(name)
        told(len(begun), len(tensors))
        mx.clear_cache()  # of the tensor before
        value = tensor.read()
        mx.eval(value)
        return value

    return ExportSource(
        config=without_quantization(model.config),
        tokenizer=model.tokenizer.files,
        tensors={
            name: LazyTensor(tensor.shape, tensor.dtype, partial(read, name, tensor))
            for name, tensor in tensors.items()
        },
        adapter=_adapter(model, adapted, fused.path) if adapted and fused else None,
    )


def _adapter(model: Model, adapted: adapters.Adapted, path: Path) -> ExportAdapter:
    """The adapter's own parameters; they are small, and stand in memory already."""
    _, metadata = tensor_file.load(path)
    tensors = {
        name: LazyTensor(tensor.shape, type_name(tensor.dtype), _giver(tensor))
        for name, tensor in adapters.own(model.module, adapted.paths).items()
    }
    return ExportAdapter(
        name=adapted.choice.component.id,
        options=plain(adapted.choice.options),
        paths=adapted.paths,
        tensors=tensors,
        metadata={key: value for key, value in metadata.items() if key == adapters.METADATA},
    )


def _giver(tensor: mx.array) -> Callable[[], mx.array]:
    return lambda: tensor


def _dense(
    model: Model, stored: Mapping[str, LazyTensor], adapted: adapters.Adapted | None
) -> dict[str, LazyTensor]:
    """The tensors of the model that the folder and the adapter are, every weight dense."""
    modules = dict(model.module.named_modules())
    wrapped = {path: modules[path] for path in (adapted.paths if adapted else ())}
    inner = dict(linears(model.module)) | {
        path: child for path, child in modules.items() if isinstance(child, Quantized)
    }
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        path, _, part = name.rpartition(".")
        linear = modules[path].linear if path in wrapped else inner.get(path)
        if linear is None or part == "bias":
            tensors[name] = tensor
            continue
        weight = f"{path}.weight"
        if weight in tensors:
            continue
        parts = {n: stored[f"{path}.{n}"] for n in linear if n != "bias" and f"{path}.{n}" in stored}
        tensors[weight] = _weight(weight, linear, parts, model.folder, adapted, wrapped.get(path))
    return tensors


def _weight(
    name: str,
    linear: nn.Module,
    parts: Mapping[str, LazyTensor],
    folder: Path,
    adapted: adapters.Adapted | None,
    wrapped: nn.Module | None,
) -> LazyTensor:
    """The dense weight of one linear, the adapter in it if it is ``wrapped``, in the type that is stored."""
    if wrapped is None and not isinstance(linear, Quantized):
        return parts["weight"]
    dtype = next((part.dtype for part in parts.values() if part.dtype in DTYPES), "float32")

    def read() -> mx.array:
        weight = _expanded(linear, parts)
        if adapted is not None and wrapped is not None:
            weight = adapters.fused_weight(adapted.choice.component, wrapped, weight.astype(mx.float32))
        return cast(name, weight, DTYPES[dtype], folder)

    shape = linear.shape if isinstance(linear, Quantized) else linear_shape(linear)
    return LazyTensor(tuple(shape), dtype, read)


def _expanded(linear: nn.Module, parts: Mapping[str, LazyTensor]) -> mx.array:
    """The dense weight that is stored in parts, in the shape of ``linear_shape``."""
    read = {name: part.read() for name, part in parts.items()}
    if isinstance(linear, Quantized):
        return expanded(read, linear.quantization, linear.shape)
    return read["weight"]


# --- what the exporter leaves -------------------------------------------------


def _left(new: Path, exporter: Component) -> dict[str, int]:
    """name -> bytes of what an exporter has written, flushed to the disk.

    Raises:
        PluginError: nothing, or what cannot stand in the target.
    """
    files: dict[str, int] = {}
    odd: list[str] = []
    for path in _walk(new):
        name = path.relative_to(new).as_posix()
        if path.is_symlink():
            odd.append(f"{name} (a link)")
        elif path.is_dir():
            continue
        elif not path.is_file():
            odd.append(f"{name} (no regular file)")
        elif name == RECORD:
            odd.append(f"{name} (a name that mlxlora uses itself)")
        elif name.endswith(_UNFINISHED):
            odd.append(f"{name} (an unfinished file)")
        else:
            files[name] = path.stat().st_size
    if odd:
        raise exporter.breach("export", listing(odd), "whole files in the folder that it was given")
    if not any(files.values()):
        raise exporter.breach("export", "no file" if not files else "empty files", "at least one file")
    durable.flush_files(new / name for name in files)
    return dict(sorted(files.items()))


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder; links are not followed."""
    for root, folders, files in os.walk(folder):
        yield from (Path(root, name) for name in (*folders, *files))


def _record(
    exporter: Choice, model: Model, adapted: adapters.Adapted | None, files: Mapping[str, int]
) -> dict[str, Any]:
    """What export.json says: what was exported, by whom, and which files are its own."""
    plugin = exporter.component.plugin
    return {
        "exporter": exporter.component.id,
        "options": plain(exporter.options),
        "model": model.fingerprint,
        "adapter": adapted.choice.component.id if adapted else None,
        "versions": {"mlxlora": __version__, plugin.distribution: plugin.version},
        "files": dict(files),
    }
