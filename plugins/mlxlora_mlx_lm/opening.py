"""What an adapter of mlx-lm, or of Apple's LoRA example for MLX, holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.api import ForeignAdapter, LazyTensor, MlxloraError, ModelError, listing
from mlxlora_core.files import lazy_tensors, open_regular, read_json, read_zip_layout, show_value

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
_CONFIG_BYTES = 1 << 20
_LARGEST = 1e9  # that a scale may be
_A, _B, _M = "lora_a", "lora_b", "m"
_PAIR = (_A, _B)
#: the linears as the first version of Apple's example calls them, which are Meta's names
_META = re.compile(r"layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])")
#: what fine_tune_type may say, which is what the adapters are called here
_TYPES = ("lora", "dora")


def detect(path: Path) -> bool:
    """Whether a path is one of mlx-lm's folders, or a file with updates under its names."""
    try:
        if path.is_dir():
            return _is_folder_of_mlx_lm(path)
        if any(name.endswith((f".{_A}", f".{_B}")) for name in _names(path)):
            return True
        return path.name == TENSORS and _is_of_mlx_lm(_config_of(path.parent / CONFIG))
    except (MlxloraError, OSError):
        return False


def open_adapter(path: Path) -> ForeignAdapter:
    """The adapter in a folder of mlx-lm, or in a file.

    The file says the linears and the rank. The scale is what the config beside it says; without
    one it is not known. ``adapters.npz`` of Apple's first example has none and Meta's names.

    Args:
        path: the folder, or the file.

    Raises:
        ModelError: half an update, updates of several ranks, tensors beside the updates, a config
            that is none of mlx-lm's or says something else, or a whole fine-tuned model.
    """
    file = path / TENSORS if path.is_dir() else path
    config: Mapping[str, Any] = _config_of(file.parent / CONFIG)
    if not path.is_dir() and not _is_of_mlx_lm(config):
        config = {}  # of another tool, or of nobody
    kind = _kind(config, file)
    linears = _linears(lazy_tensors(file))
    if all(_META.fullmatch(linear) for linear in linears):
        config = {}  # what lies beside it is of another file
    magnitudes = [linear for linear, tensors in linears.items() if _M in tensors]
    if (magnitudes and len(magnitudes) < len(linears)) or (kind == "dora" and not magnitudes):
        raise ModelError(f"lacks {listing(f'{p}.{_M}' for p in linears if p not in magnitudes)}", where=file)
    if magnitudes and kind == "lora" and config:
        raise ModelError(f"has magnitudes (.{_M}), but fine_tune_type is lora", where=file.parent / CONFIG)
    rank = _rank(linears)
    told = _parameters(config, rank, file.parent / CONFIG)
    return ForeignAdapter(
        adapter="dora" if magnitudes else "lora",
        options={"rank": rank, **told},
        linears=linears,
        outputs={_B: 1, _M: 0} if magnitudes else {_B: 1},
        unstated=() if "scale" in told else ("scale",),
        layout="hf",
        notes=_notes(config),
    )


def _names(path: Path) -> list[str]:
    """Names of the tensors of a file, of which nothing else is read."""
    if path.suffix == ".npz":
        with open_regular(path) as file:
            return [member.name.removesuffix(".npy") for member in read_zip_layout(file, path).members]
    return list(lazy_tensors(path)) if path.suffix == ".safetensors" else []


def _config_of(path: Path) -> dict[str, Any]:
    """What a config says; nothing where there is none."""
    if not path.is_file():
        return {}
    held = read_json(path, _CONFIG_BYTES)
    return held if isinstance(held, dict) else {}


def _is_of_mlx_lm(config: Mapping[str, Any]) -> bool:
    return "peft_type" not in config and bool({"lora_parameters", "fine_tune_type"} & config.keys())


def _is_folder_of_mlx_lm(path: Path) -> bool:
    try:
        return _is_of_mlx_lm(_config_of(path / CONFIG))
    except MlxloraError:  # a damaged one, which is told of when it is opened
        return (path / TENSORS).is_file()


def _kind(config: Mapping[str, Any], file: Path) -> str:
    """``lora`` or ``dora``."""
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise ModelError(
            "holds whole weights (fine_tune_type full) and no adapter",
            where=file,
            fix="put them into the model with mlx_lm.fuse, and open that",
        )
    if not isinstance(kind, str) or kind not in _TYPES:
        what = f"fine_tune_type is {show_value(kind)}, wanted {listing(_TYPES)}"
        raise ModelError(what, where=file.parent / CONFIG)
    return kind


def _linears(tensors: Mapping[str, LazyTensor]) -> dict[str, dict[str, LazyTensor]]:
    """Module path -> its tensors, whole updates each.

    Raises:
        ModelError: something else is there, or something is missing; all of it.
    """
    linears: dict[str, dict[str, LazyTensor]] = {}
    other = []
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if path and part in (*_PAIR, _M):
            linears.setdefault(path, {})[part] = tensor
        else:
            other.append(name)
    if other:
        raise ModelError(f"holds {listing(sorted(other), 4)} beside the updates, which nothing here computes")
    if not linears:
        raise ModelError("holds no updates")
    alone = [f"{path}.{part}" for path, held in linears.items() for part in _PAIR if part not in held]
    if alone:
        raise ModelError(f"lacks {listing(alone)}")
    odd = [f"{path} {h[_A].shape} and {h[_B].shape}" for path, h in linears.items() if not _fit(h)]
    if odd:
        raise ModelError(f"has updates that are no product (inputs, R) times (R, outputs): {listing(odd)}")
    return linears


def _fit(held: Mapping[str, LazyTensor]) -> bool:
    a, b = held[_A].shape, held[_B].shape
    product = len(a) == len(b) == 2 and a[1] == b[0] > 0
    return product and (_M not in held or held[_M].shape == b[1:])


def _rank(linears: Mapping[str, Mapping[str, LazyTensor]]) -> int:
    """The rank of all updates."""
    ranks = sorted({held[_A].shape[1] for held in linears.values()})
    if len(ranks) > 1:
        raise ModelError(f"has updates of several ranks: {listing(ranks)}; one is wanted")
    return ranks[0]


def _parameters(config: Mapping[str, Any], rank: int, where: Path) -> dict[str, float]:
    """Scale and dropout, where the config says them."""
    held = config.get("lora_parameters", {})
    if not isinstance(held, dict):
        raise ModelError(f"lora_parameters is {show_value(held)}, wanted a table", where=where)
    if held.get("rank", rank) != rank:
        raise ModelError(f"rank is {show_value(held['rank'])}, but the tensors have {rank}", where=where)
    told = {}
    for key in ("scale", "dropout"):
        value = held.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
            raise ModelError(f"{key} is {show_value(value)}, wanted a number", where=where)
        told[key] = float(value)
    return told


def _notes(config: Mapping[str, Any]) -> list[str]:
    model = config.get("model")
    return [f"its config names the model {show_value(model)}"] if isinstance(model, str) and model else []
