"""An adapter as mlx-lm reads it: one rank, one scale, and the same linears in each of the top layers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.api import ExportAdapter, ExportSource, LazyTensor, LowRank, ModelError, listing
from mlxlora_core.files import save_tensors, write_json, write_text
from mlxlora_core.ops import updates_there, vectors_there
from mlxlora_mlx_lm.opening import CONFIG, TENSORS

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
_WAY_OUT = "write it with --to peft, or fuse it into a model with --to mlx-lm"


def write(source: ExportSource, target: Path) -> None:
    """Write ``adapters.safetensors``, ``adapter_config.json`` and a card into a folder.

    Raises:
        ModelError: what mlx-lm cannot say of the adapter, by name.
    """
    adapter = source.adapter
    assert adapter is not None, "this exporter takes an adapter"
    kind = adapter.name.rpartition(":")[2]
    updates, magnitudes = _updates(adapter, kind)
    rank, scale = _one_size(kind, updates)
    top, keys = _places(list(updates), adapter.layers)
    dropout = adapter.options.get("dropout", 0.0)
    tensors = {f"{path}.lora_a": update.a for path, update in updates.items()}
    tensors |= {f"{path}.lora_b": update.b for path, update in updates.items()}
    tensors |= {f"{path}.m": magnitude for path, magnitude in magnitudes.items()}
    save_tensors(target / TENSORS, {name: _held(tensor) for name, tensor in sorted(tensors.items())})
    config = {
        "fine_tune_type": "dora" if magnitudes else "lora",
        "num_layers": top,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys},
        "model": source.base,
    }
    write_json(target / CONFIG, config)
    head = ["---", f"base_model: {json.dumps(source.base)}", "library_name: mlx", "---", ""]
    card = source.card or "An adapter, trained with mlxlora."
    write_text(target / "README.md", "\n".join([*head, card.rstrip("\n"), ""]))


def _updates(adapter: ExportAdapter, kind: str) -> tuple[dict[str, LowRank], dict[str, mx.array]]:
    """Module path there -> its update, and of a DoRA its magnitudes."""
    if adapter.low_rank:
        return updates_there(adapter, adapter.low_rank), {}
    if kind != "dora":
        raise ModelError(f"mlx-lm has no adapter like '{kind}'", fix=_WAY_OUT)
    held = {
        path: [adapter.tensors[f"{path}.{part}"].read() for part in ("lora_a", "lora_b", "m")]
        for path in adapter.paths
    }
    partly = _partly(adapter)
    if partly:
        what = f"a DoRA on a part of {listing(partly)} needs the magnitudes of all of it"
        raise ModelError(what, fix="fuse it into a model with --to mlx-lm")
    updates = {path: LowRank(a, b, _scale_at(adapter, path)) for path, (a, b, _) in held.items()}
    magnitudes = {path: m for path, (_, _, m) in held.items()}
    return updates_there(adapter, updates), vectors_there(adapter, magnitudes, 1.0)


def _partly(adapter: ExportAdapter) -> list[str]:
    """The modules there of which not all linears here have an adapter."""
    covered: dict[str, int] = {}
    for path in adapter.paths:
        name = adapter.places[path].foreign
        covered[name] = covered.get(name, 0) + int(adapter.tensors[f"{path}.m"].shape[0])
    return [name for name, height in adapter.heights.items() if covered.get(name, height) < height]


def _scale_at(adapter: ExportAdapter, path: str) -> float:
    return float({**adapter.options, **adapter.overrides.get(path, {})}["scale"])


def _one_size(kind: str, updates: Mapping[str, LowRank]) -> tuple[int, float]:
    """The rank and the scale of all updates.

    Raises:
        ModelError: they differ.
    """
    ranks = sorted({int(update.a.shape[1]) for update in updates.values()})
    scales = sorted({update.scale for update in updates.values()})
    for what, found in (("rank", ranks), ("scale", scales)):
        if len(found) > 1:
            several = f"mlx-lm has one {what} for all linears, this {kind} has {listing(found)}"
            raise ModelError(several, fix=_WAY_OUT)
    return ranks[0], scales[0]


def _places(paths: list[str], layers: int) -> tuple[int, list[str]]:
    """How many of the top layers are adapted, and the linears in each, and those in none.

    Raises:
        ModelError: layers that are not the top ones, or other linears in some than in others.
    """
    found: dict[int, set[str]] = {}
    keys = set()
    for path in paths:
        match = _LAYER.fullmatch(path)
        if match:
            found.setdefault(int(match[1]), set()).add(match[2])
        else:
            keys.add(path)
    wanted = range(min(found, default=layers), layers)
    absent = [layer for layer in wanted if layer not in found]
    if absent:
        told = f"mlx-lm adapts the top layers, this adapter leaves out {listing(absent)} of {layers}"
        raise ModelError(told, fix=_WAY_OUT)
    each = set().union(*found.values())
    odd = [layer for layer, held in found.items() if held != each]
    if odd:
        told = f"mlx-lm adapts the same linears in each layer, layer {min(odd)} lacks "
        raise ModelError(told + listing(sorted(each - found[min(odd)])), fix=_WAY_OUT)
    return len(wanted), sorted(each | keys)


def _held(tensor: Any) -> LazyTensor:
    """A tensor that is in memory already."""
    return LazyTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("mlx.core."), lambda: tensor)
