"""The adapter files below a path: what each says of itself, and which bases it fits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlxlora_core.errors import MlxloraError, ModelError
from mlxlora_core.files import tensor_file
from mlxlora_core.model.adapter_record import METADATA, read_record
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.foreign_adapters import find_adapter_loader, open_adapter
from mlxlora_core.model.loading import Model
from mlxlora_core.model.several import AdapterSet
from mlxlora_core.plugins import Registry

_ENDINGS = (".safetensors", ".npz", ".gguf")
FITS, SAME_LINEARS, DOES_NOT_FIT = "yes", "same linears", "no"


@dataclass(frozen=True)
class ListedAdapter:
    """An adapter file.

    Attributes:
        path: the file, or the folder of another tool.
        adapter: which adapter it holds.
        rank: of its updates, where they have one.
        linears: how many it changes.
        base: the name of the base that it was made for, or the first letters of its fingerprint;
            nothing where the file does not say.
        step: of the training that it was taken after, or None.
        loss: lowest validation loss up to there, or else the last training loss, or None.
        loader: which adapter loader reads it, or nothing for a file of mlxlora.
        fits: base that was asked about -> ``yes``; ``same linears`` where it goes on and is of another
            base (``--base-mismatch allow``), or does not say of which; or ``no``.
        fault: what is wrong with the file, or nothing.
    """

    path: str
    adapter: str = ""
    rank: int | None = None
    linears: int = 0
    base: str = ""
    step: int | None = None
    loss: float | None = None
    loader: str = ""
    fits: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""


def list_adapters(paths: Iterable[Path], registry: Registry) -> Iterator[ListedAdapter]:
    """Every adapter at or below some paths, in the order of their names.

    A file that is no adapter is passed over below a folder, and told where it is named itself.

    Raises:
        ModelError: there is nothing at a path.
    """
    for path in paths:
        if not path.exists():
            raise ModelError("there is no such file or folder", where=path)
        for place in _places(path, registry):
            found = _listed(place, registry, told=place == path)
            if found is not None:
                yield found


def on_base(found: ListedAdapter, name: str, model: Model, registry: Registry) -> ListedAdapter:
    """The same, with what is known of whether it fits a base.

    Args:
        found: an adapter file.
        name: of the base, as the user has it.
        model: the base; its parameters are not asked for.
        registry: where plugins are looked up.
    """
    if found.fault:
        return found
    several, path = AdapterSet(model), Path(found.path)
    try:
        several.load(name, AdapterFile(path, any_base=True), registry)
    except MlxloraError:
        fit = DOES_NOT_FIT
    else:
        record = None if found.loader else _record(path)
        fit = FITS if record is not None and record["base"] == model.fingerprint else SAME_LINEARS
    finally:
        several.take_off()
    return replace(found, fits={**found.fits, name: fit})


def _places(path: Path, registry: Registry) -> Iterator[Path]:
    """The files and folders that may be adapters; what stands in an adapter's folder is a part of it."""
    if not path.is_dir() or find_adapter_loader(path, registry) is not None:
        yield path
        return
    for root, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        whole = [name for name in folders if find_adapter_loader(Path(root, name), registry) is not None]
        folders[:] = [name for name in folders if name not in whole]
        loose = [name for name in files if name.endswith(_ENDINGS) and not name.startswith(".")]
        yield from (Path(root, name) for name in sorted([*whole, *loose]))


def _listed(path: Path, registry: Registry, *, told: bool) -> ListedAdapter | None:
    """What is known of an adapter, or None for a file that is none."""
    try:
        record = None if path.is_dir() or path.suffix == ".gguf" else _record(path)
        if record is not None:
            return _of_record(path, record)
        loader = find_adapter_loader(path, registry)
        if loader is None:
            return ListedAdapter(str(path), fault="is no adapter that is known here") if told else None
        found = open_adapter(loader, path)
    except MlxloraError as fault:
        return ListedAdapter(str(path), fault=fault.what)
    ranks = {tensor.shape[1] for parts in found.linears.values() if (tensor := parts.get("lora_a"))}
    return ListedAdapter(
        path=str(path),
        adapter=found.adapter,
        rank=_rank({"rank": max(ranks, default=None), **found.options}),
        linears=len(found.linears),
        loader=loader.id,
    )


def _record(path: Path) -> dict[str, Any] | None:
    """What a file of mlxlora says of itself, or None for another one."""
    metadata = tensor_file.stated(path)
    return read_record(metadata, path) if METADATA in metadata else None


def _of_record(path: Path, record: Mapping[str, Any]) -> ListedAdapter:
    training = record.get("training") or {}
    losses = [training.get(name) for name in ("best_valid_loss", "train_loss")]
    return ListedAdapter(
        path=str(path),
        adapter=record["adapter"],
        rank=_rank(record["options"]),
        linears=len(record["paths"]),
        base=str(record.get("base_name") or record["base"][:12]),
        step=training.get("step"),
        loss=next((loss for loss in losses if loss is not None and math.isfinite(loss)), None),
    )


def _rank(options: Mapping[str, Any]) -> int | None:
    rank = options.get("rank")
    return rank if type(rank) is int else None
