"""The record in an adapter file: written, read, and compared with what the caller wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import ModelError, UsageError, listing
from mlxlora_core.files import tensor_file
from mlxlora_core.files.documents import parse_form
from mlxlora_core.files.forms import Items, Map, Maybe, Number, Option, Plain, Strict, Table, Text, Whole
from mlxlora_core.model.loading import Model
from mlxlora_core.options import divide, plain
from mlxlora_core.plugins import Choice, Component
from mlxlora_core.plugins.sections import AdapterConfig, configure

METADATA = "mlxlora"

_LOSS = Maybe(Number(least=0))
_TRAINING_FORM = Table(
    {
        "step": Whole(),
        "train_loss": _LOSS,
        "first_valid_loss": _LOSS,
        "best_valid_loss": _LOSS,
        "data": Map(Text()),
        "settings": Map(Plain()),
    }
)
#: the record in an adapter file; in older files, the options hold the config
RECORD_FORM = Table(
    {
        "adapter": Text(),
        "options": Strict(Map(Plain())),
        "config": Option(Strict(Map(Plain()))),
        "paths": Items(Text()),
        "base": Text(),
        "shared": Option(Map(Text())),
        "training": Option(Strict(_TRAINING_FORM)),
    }
)


@dataclass(frozen=True)
class TrainingRecord:
    """What an adapter file says about its training; the same whether or not that was resumed.

    Attributes:
        step: the step that the adapter is from.
        train_loss: nats per counted token, the mean of the last finite losses up to that step; or None.
        first_valid_loss: of the validation before the first step, or None.
        best_valid_loss: the lowest of any validation up to that step, or None.
        data: split -> fingerprint of its tokens and masks.
        settings: every setting by name.
    """

    step: int
    train_loss: float | None
    first_valid_loss: float | None
    best_valid_loss: float | None
    data: Mapping[str, str]
    settings: Mapping[str, Any]


def read_record(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """The record in the file, in its present form; None if it has none."""
    if METADATA not in metadata:
        return None
    said = metadata[METADATA].encode("utf-8", "surrogatepass")
    record: dict[str, Any] = parse_form(said, RECORD_FORM, f"{path} (what it says of itself)")
    if "config" not in record:  # an older file, with targets and layers among the options
        record["config"], record["options"] = divide(record["options"], AdapterConfig)
    return record


def of_another_base(base: str, model: Model, path: Path, allowed: bool) -> list[str]:
    """Notes for an adapter that was trained on another base; empty if it is this one.

    Raises:
        ModelError: it is another base, and that is not allowed.
    """
    if base == model.fingerprint:
        return []
    what = f"made for another base ({base[:12]}, this one is {model.fingerprint[:12]})"
    if allowed:
        return [f"{path}: {what}, and put on this one all the same: what it does here is not what it learnt"]
    fix = (
        f"use the model folder that it was trained on, not {model.folder}; "
        "if this is the same model in other bits, give the --quantize that it was trained with, "
        "or add --base-mismatch allow"
    )
    raise ModelError(what, where=path, fix=fix)


def recorded_choice(
    record: Mapping[str, Any], component: Component, wanted: Mapping[str, Any], path: Path
) -> tuple[Choice, AdapterConfig]:
    """The options and the config in a file, which must agree with what the caller wants."""
    try:
        choice, config = configure(component, {**record["options"], **record["config"]})
    except UsageError as fault:
        raise ModelError(f"was made with options that cannot be: {fault.what}", where=path) from fault
    asked_choice, asked_config = configure(component, wanted)
    held, asked = (
        {**plain(c.options), **plain(g)} for c, g in ((choice, config), (asked_choice, asked_config))
    )
    other = [f"{key} is {held[key]!r}, wanted {asked[key]!r}" for key in wanted if held[key] != asked[key]]
    if other:
        raise ModelError(f"the adapter has other options: {listing(other)}", where=path)
    return choice, config


def check_whole(tensors: Mapping[str, mx.array], stated: str, path: Path) -> None:
    """Refuse a file whose tensors are not the ones that were written."""
    if tensor_file.fingerprint(tensors) != stated:
        raise ModelError("is damaged: its tensors are not those that were written", where=path)


def shared_names(tensors: Mapping[str, mx.array]) -> dict[str, str]:
    """name -> the first name of the same array, for arrays that have several names."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensors[name]), name) for name in sorted(tensors)}
    return {name: of for name, of in names.items() if name != of}


def with_shared(
    tensors: Mapping[str, mx.array], record: Mapping[str, Any], path: Path
) -> dict[str, mx.array]:
    """All tensors of an adapter, with those that the file holds once for several names under each.

    Raises:
        ModelError: a shared tensor is missing, or the file holds it twice.
    """
    shared: Mapping[str, str] = record.get("shared") or {}
    odd = sorted(name for name, of in shared.items() if of not in tensors or name in tensors)
    if odd:
        raise ModelError(f"shares tensors that it does not hold, or holds itself: {listing(odd)}", where=path)
    return {**tensors, **{name: tensors[of] for name, of in shared.items()}}
