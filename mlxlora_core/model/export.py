"""``model + adapter -> exporter -> the files of another tool``, a tensor at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.files import durable
from mlxlora_core.files.documents import read_form
from mlxlora_core.files.forms import Map, Table, Text, Whole
from mlxlora_core.files.targets import check_output_file, check_output_folder, paths_in
from mlxlora_core.machine.disk import require_disk
from mlxlora_core.machine.memory import require_memory
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.events import SpaceNeeded
from mlxlora_core.model.export_card import tuning_card
from mlxlora_core.model.export_check import ExportCheck, check_export
from mlxlora_core.model.export_source import Exported, Told, source_of
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.plugins.progress import notes_heard
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.values import ExportSource, LazyTensor
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
        path: the folder, or the one file.
        exporter: who wrote it.
        tensors: of the model; none where the adapter alone was exported.
        parameters: of the model, likewise.
        adapter: which adapter is fused in, or exported alone, or nothing.
        files: name -> bytes.
        notes: what was assumed of the adapter's file, whether it is of another base, and what the exporter
            says of its work.
        check: what was found when it was opened again; None where no plugin reads this form.
    """

    path: str
    exporter: str
    tensors: int
    parameters: int
    adapter: str
    files: Mapping[str, int]
    notes: tuple[str, ...] = ()
    check: ExportCheck | None = None


def export(
    folder: Path,
    target: Path,
    exporter: Choice,
    registry: Registry,
    *,
    fused: AdapterFile | None = None,
    quantization: Quantization | None = None,
    overwrite: bool = False,
    base: str = "",
    facts: Sequence[str] = (),
    told: Told = lambda what, done, count: None,
) -> Iterator[SpaceNeeded | ExportReport]:
    """Write a model, or an adapter, in another tool's form, in memory that does not grow with the model.

    Args:
        folder: the base.
        target: folder to make; or the file, where it has the ending of the one that the exporter writes.
        exporter: who writes it, with which options.
        registry: where plugins are looked up.
        fused: the adapter to put into the weights, or to write alone.
        quantization: how the base is quantized when it is opened, as it was when the adapter was trained.
        overwrite: whether an export that is there may be replaced.
        base: what the base was named by; nothing for its path.
        facts: how the adapter was trained: data, settings, losses; a line each for the card beside it.
        told: called with (what is done, tensors begun, all) while the exporter works, for it
            takes the tensors at its own pace, and while the export is checked.

    Yields:
        What disk and memory must hold, and the report.

    Raises:
        UsageError: the target is the base, or holds the adapter; or the exporter writes adapters and none is
            named.
        ModelError: the base or the adapter is damaged, they do not fit, the exporter's form cannot say
            what the model is, or what was written is another model.
        SafetyError: the target holds something else.
        ResourceError: disk or memory is too small.
        PluginError: the exporter leaves nothing, or what it must not.
    """
    place = _Place(target, exporter.component, overwrite)
    place.check([folder, *([fused.path] if fused else []), *paths_in(exporter.options)])
    exported = _opened(folder, fused, exporter, registry, quantization, base, facts)

    source = source_of(exported, told)
    yield SpaceNeeded(_needed(exported, source, target))
    with place.opened() as new:
        with notes_heard() as notes:
            files = _written(source, new, exporter)
        check = _check(exported, new, files, registry, told)
        if not place.is_file:
            durable.write_json(new / RECORD, _record(exported, files))
    yield _report(target, exported, source, files, check, notes)


def _report(
    target: Path,
    exported: Exported,
    source: ExportSource,
    files: Mapping[str, int],
    check: ExportCheck | None,
    notes: Sequence[str],
) -> ExportReport:
    """What an export wrote."""
    adapted = exported.adapted
    return ExportReport(
        path=str(target),
        exporter=exported.exporter.component.id,
        tensors=len(source.tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in source.tensors.values()),
        adapter=adapted.choice.component.id if adapted else "",
        files=files,
        notes=(*(adapted.notes if adapted else ()), *notes),
        check=check,
    )


def _opened(
    folder: Path,
    fused: AdapterFile | None,
    exporter: Choice,
    registry: Registry,
    quantization: Quantization | None,
    base: str,
    facts: Sequence[str],
) -> Exported:
    """The base, its tensors unread, with the adapter on it; the arguments are those of :func:`export`."""
    model, stored = loading.outline(folder, registry, quantization)
    adapted = adapters.load_file(fused, model, registry) if fused else None
    file = fused.path if fused else None
    card = tuning_card(adapted, model.fingerprint, facts)
    return Exported(model, stored, adapted, file, exporter, quantization, base or str(folder), card)


def _written(source: ExportSource, new: Path, exporter: Choice) -> dict[str, int]:
    """Let the exporter write into a folder; name -> bytes of what it has written.

    Raises:
        PluginError: it gives something, leaves nothing, or what it must not.
    """
    given = exporter.component.spec.export(source, new, exporter.options)
    if given is not None:
        raise exporter.component.breach("export", type(given).__name__, "None")
    return _left(new, exporter.component)


def _check(
    exported: Exported, new: Path, files: Mapping[str, int], registry: Registry, told: Told
) -> ExportCheck | None:
    """What is found when the export is opened again, where a plugin reads it."""
    spec = exported.exporter.component.spec
    if not spec.opens:
        return None
    return check_export(exported, new / next(iter(files)) if spec.ending else new, registry, told)


@dataclass(frozen=True)
class _Place:
    """Where an export goes.

    Attributes:
        target: folder or file.
        exporter: who writes it.
        overwrite: whether an export that is there may be replaced.
    """

    target: Path
    exporter: Component
    overwrite: bool

    @property
    def is_file(self) -> bool:
        """Whether it is the one file that the exporter writes, and no folder."""
        ending = self.exporter.spec.ending
        return bool(ending) and self.target.name.endswith(ending)

    def check(self, inputs: Iterable[Path] = ()) -> None:
        """Refuse a target that is an input, or holds what is not to be replaced."""
        if self.is_file:
            check_output_file(self.target, inputs, overwrite=self.overwrite, ours=self._wrote)
        else:
            ours = holds_only_an_export
            check_output_folder(self.target, inputs, overwrite=self.overwrite, ours=ours)

    def opened(self) -> AbstractContextManager[Path]:
        """A folder to write into, which becomes the target, or of which the one file does."""
        if self.is_file:
            return durable.new_single_file(self.target, self.check)
        return durable.new_folder(self.target, overwrite=self.overwrite, ours=holds_only_an_export)

    def _wrote(self, path: Path) -> bool:
        """Whether the exporter says that it has written a file."""
        wrote = self.exporter.spec.wrote
        return wrote is not None and self.exporter.checked("wrote", wrote(path), bool)


def holds_only_an_export(folder: Path) -> bool:
    """Whether everything in ``folder`` is what an export has written there."""
    try:
        record = read_form(folder / RECORD, RECORD_FORM, _RECORD_BYTES)
    except ModelError:
        return False
    found = {path for path in _walk(folder) if path.is_symlink() or not path.is_dir()}
    return found == {folder / name for name in (RECORD, *record["files"])}


def _needed(exported: Exported, source: ExportSource, target: Path) -> str:
    """What disk and memory must hold, in words: what is handed over, and the largest tensor at work.

    Raises:
        ResourceError: less is free.
    """
    adapter = source.adapter.tensors.values() if source.adapter else ()
    disk = require_disk(sum(map(_bytes_of, (*source.tensors.values(), *adapter))), target)
    fused = {f"{path}.weight" for path in exported.adapted.paths} if exported.adapted else set()
    packed = exported.model.quantization is not None
    # One that is expanded, or gets an adapter's change, is float32 on the way; a check has each twice.
    share = 3 if exported.exporter.component.spec.opens else 3 / 2
    each = (
        math.prod(t.shape) * (16 if packed or name in fused else int(getattr(mx, t.dtype).size * share))
        for name, t in exported.own_tensors().items()
    )
    memory = require_memory(max(each), "exporting", "export where there is more memory")
    return f"{disk}; {memory}"


def _bytes_of(tensor: LazyTensor) -> int:
    """What a tensor takes as it is handed over."""
    if tensor.packed is not None:
        return sum(map(_bytes_of, tensor.packed.parts.values()))
    size: int = getattr(mx, tensor.dtype).size
    return size * math.prod(tensor.shape)


# --- what the exporter leaves -------------------------------------------------


def _left(new: Path, exporter: Component) -> dict[str, int]:
    """name -> bytes of what an exporter has written, flushed to the disk.

    Raises:
        PluginError: nothing, or what cannot stand in the target.
    """
    ending = exporter.spec.ending
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
    if ending and (len(files) != 1 or not all(name.endswith(ending) for name in files)):
        raise exporter.breach("export", listing(sorted(files)), f"one file, which ends with {ending}")
    durable.flush_files(new / name for name in files)
    return dict(sorted(files.items()))


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder; links are not followed."""
    for root, folders, files in os.walk(folder):
        yield from (Path(root, name) for name in (*folders, *files))


def _record(exported: Exported, files: Mapping[str, int]) -> dict[str, Any]:
    """What export.json says: what was exported, by whom, and which files are its own."""
    exporter, adapted = exported.exporter, exported.adapted
    plugin = exporter.component.plugin
    return {
        "exporter": exporter.component.id,
        "options": plain(exporter.options),
        "model": exported.model.fingerprint,
        "adapter": adapted.choice.component.id if adapted else None,
        "versions": {"mlxlora": __version__, plugin.distribution: plugin.version},
        "files": dict(files),
    }
