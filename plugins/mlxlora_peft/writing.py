"""An adapter as PEFT reads it: ``adapter_config.json``, ``adapter_model.safetensors`` and a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.api import ExportAdapter, ExportSource, LazyTensor, LowRank, ModelError, listing
from mlxlora_core.files import save_tensors, write_json, write_text
from mlxlora_core.ops import updates_there, vectors_there
from mlxlora_peft.config import CONFIG
from mlxlora_peft.names import EMBEDDING_A, EMBEDDING_B, IA3, LORA_A, LORA_B, MAGNITUDE
from mlxlora_peft.opening import TENSORS
from mlxlora_peft.places import is_embedding, number_patterns, targets
from mlxlora_peft.sharing import projections

_PREFIX = "base_model.model."
Tensors = dict[str, mx.array]


def write(source: ExportSource, target: Path, base: str) -> None:
    """Write all files into a folder.

    Args:
        source: the adapter, its linears placed as Hugging Face names them.
        target: the folder.
        base: name or path of the model that it goes on; nothing for that which it was opened from.

    Raises:
        ModelError: an adapter that PEFT has not.
    """
    adapter = source.adapter
    assert adapter is not None, "this exporter takes an adapter"
    _refuse_tied(source, adapter)
    told, tensors = _converted(adapter)
    named = base or source.base
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": named, "inference_mode": True}
    write_json(target / CONFIG, {**common, **told})
    held = {name: _held(tensor) for name, tensor in sorted(tensors.items())}
    save_tensors(target / TENSORS, held, {"format": "pt"})
    write_text(target / "README.md", _card(named, source.card))


def _converted(adapter: ExportAdapter) -> tuple[dict[str, Any], Tensors]:
    """The config and the tensors of the kind that PEFT has for an adapter."""
    kind = adapter.name.rpartition(":")[2]
    if kind == "ia3":
        return _ia3(adapter)
    if kind == "dora":
        return _dora(adapter)
    shared = projections(adapter) if kind == "vera" else None
    if shared is not None:
        return _vera(adapter, *shared)
    if not adapter.low_rank:
        what = f"adapter '{kind}' is neither a low-rank update nor one that PEFT knows"
        raise ModelError(what, fix="fuse it into a model: export --to hf")
    updates = updates_there(adapter, adapter.low_rank)
    # An alpha of its own, so that PEFT divides by the root of the rank as it is done here.
    rooted = kind == "rslora" and not adapter.heights
    return {**_lora_config(adapter, updates, rooted=rooted), "use_dora": False}, _pairs(updates)


def _dora(adapter: ExportAdapter) -> tuple[dict[str, Any], Tensors]:
    """A DoRA: pairs, and the norm that each row of the adapted weight has."""
    parts = {path: {n: _read(adapter, path, n) for n in ("lora_a", "lora_b", "m")} for path in adapter.paths}
    updates = updates_there(
        adapter,
        {
            p: LowRank(held["lora_a"], held["lora_b"], _option(adapter, p, "scale"))
            for p, held in parts.items()
        },
    )
    magnitudes = {path: held["m"] for path, held in parts.items()}
    _refuse_partly(adapter, magnitudes)
    tensors = {
        f"{_PREFIX}{path}.{MAGNITUDE}": m for path, m in vectors_there(adapter, magnitudes, 1.0).items()
    }
    return {**_lora_config(adapter, updates, rooted=False), "use_dora": True}, _pairs(updates) | tensors


def _lora_config(adapter: ExportAdapter, updates: Mapping[str, LowRank], *, rooted: bool) -> dict[str, Any]:
    """The config of ``peft_type`` LORA."""
    ranks = {path: int(update.a.shape[1]) for path, update in updates.items()}
    alphas = {
        path: _alpha(update.scale * (ranks[path] ** 0.5 if rooted else ranks[path]))
        for path, update in updates.items()
    }
    rank, rank_pattern = number_patterns(ranks)
    alpha, alpha_pattern = number_patterns(alphas)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.options.get("dropout", 0.0),
        **targets(list(updates), adapter.layers),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rooted,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _pairs(updates: Mapping[str, LowRank]) -> Tensors:
    """The matrices of updates, as PEFT stores them: turned round."""
    tensors = {}
    for path, update in updates.items():
        if is_embedding(path):
            tensors[f"{_PREFIX}{path}.{EMBEDDING_A}"] = update.a.T
            tensors[f"{_PREFIX}{path}.{EMBEDDING_B}"] = update.b.T
        else:
            tensors[f"{_PREFIX}{path}.{LORA_A}.weight"] = update.a.T
            tensors[f"{_PREFIX}{path}.{LORA_B}.weight"] = update.b.T
    return tensors


def _ia3(adapter: ExportAdapter) -> tuple[dict[str, Any], Tensors]:
    """An IA3: factors on the inputs of some linears, and on the outputs of the others."""
    inputs = [path for path in adapter.paths if _scales_inputs(adapter, path)]
    fused = [path for path in inputs if adapter.places[path].start is not None]
    if fused:
        what = f"factors on the inputs of {listing(fused, 4)}, which PEFT has in one linear with others"
        raise ModelError(what, fix="fuse the adapter into a model: export --to hf")
    vectors = {path: _read(adapter, path, "ia3_l") for path in adapter.paths}
    outputs = vectors_there(adapter, {p: v for p, v in vectors.items() if p not in inputs}, 1.0)
    tensors = {f"{_PREFIX}{path}.{IA3}": vector[:, None] for path, vector in outputs.items()}
    named = {adapter.places[path].foreign.removesuffix(".weight"): vectors[path][None] for path in inputs}
    tensors |= {f"{_PREFIX}{path}.{IA3}": vector for path, vector in named.items()}
    paths = [*outputs, *named]
    where = targets(paths, adapter.layers, can_choose_layers=False)
    ends = {path.rpartition(".")[2] for path in named}
    if not ends <= set(where["target_modules"]) or ends & {path.rpartition(".")[2] for path in outputs}:
        where, ends = {"target_modules": sorted(paths)}, set(named)  # by whole paths, both of them
    told = {"peft_type": "IA3", **where, "feedforward_modules": sorted(ends)}
    return {**told, "init_ia3_weights": True, "fan_in_fan_out": False, "modules_to_save": None}, tensors


def _scales_inputs(adapter: ExportAdapter, path: str) -> bool:
    scales = _option(adapter, path, "scales")
    if scales == "auto":
        return adapter.places[path].foreign.endswith("down_proj.weight")
    return bool(scales == "inputs")


def _vera(adapter: ExportAdapter, a: mx.array, b: mx.array) -> tuple[dict[str, Any], Tensors]:
    """A VeRA whose linears share their projections."""
    tensors = {"base_model.vera_A": a, "base_model.vera_B": b}
    for path in adapter.paths:
        name = _PREFIX + adapter.places[path].foreign.removesuffix(".weight")
        tensors[f"{name}.vera_lambda_d"] = _read(adapter, path, "lambda_d")
    outputs = vectors_there(adapter, {path: _read(adapter, path, "lambda_b") for path in adapter.paths}, 0.0)
    tensors |= {f"{_PREFIX}{path}.vera_lambda_b": vector for path, vector in outputs.items()}
    told = {
        "peft_type": "VERA",
        "r": int(a.shape[0]),
        "vera_dropout": adapter.options["dropout"],
        "d_initial": adapter.options["d_initial"],
        "save_projection": True,
        "projection_prng_key": adapter.options["projection_seed"],
        **targets(list(outputs), adapter.layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }
    return told, tensors


def _refuse_tied(source: ExportSource, adapter: ExportAdapter) -> None:
    """Refuse an update of an embedding that is the output head too: PEFT would change one of them."""
    held = [path for path in adapter.paths if is_embedding(adapter.places[path].foreign)]
    if held and source.config.get("tie_word_embeddings"):
        what = (
            f"{listing(held)} is embedding and output head in one, of which PEFT adapts the embedding alone"
        )
        raise ModelError(what, fix="fuse the adapter into a model: export --to hf")


def _refuse_partly(adapter: ExportAdapter, magnitudes: Mapping[str, mx.array]) -> None:
    """Refuse a DoRA on a part of a linear, whose other rows have magnitudes that nobody has told."""
    covered: dict[str, int] = {}
    for path, vector in magnitudes.items():
        name = adapter.places[path].foreign
        covered[name] = covered.get(name, 0) + int(vector.shape[0])
    partly = [name for name, height in adapter.heights.items() if covered.get(name, height) < height]
    if partly:
        what = f"a DoRA on a part of {listing(partly, 4)} needs the magnitudes of all of it"
        raise ModelError(what, fix="fuse the adapter into a model: export --to hf")


def _option(adapter: ExportAdapter, path: str, name: str) -> Any:
    return {**adapter.options, **adapter.overrides.get(path, {})}[name]


def _read(adapter: ExportAdapter, path: str, name: str) -> mx.array:
    return adapter.tensors[f"{path}.{name}"].read()


def _alpha(value: float) -> float:
    """An alpha, whole where it can only have been that: scale times rank rounds."""
    whole = round(value)
    return whole if whole and abs(value - whole) <= 1e-12 * abs(value) else value


def _card(base: str, card: str) -> str:
    """A card that says which library reads this, and for which model."""
    head = ["---", f"base_model: {json.dumps(base)}", "library_name: peft", "---"]
    return "\n".join([*head, "", (card or "An adapter, trained with mlxlora.").rstrip("\n"), ""])


def _held(tensor: mx.array) -> LazyTensor:
    """A tensor that is in memory already."""
    return LazyTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("mlx.core."), lambda: tensor)
