"""Files of other tools that hold low-rank updates: Apple's LoRA example for MLX, mlx-lm, PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlxlora_core.api import FoundAdapter, ModelError, listing
from mlxlora_core.files import read_json

_A, _B = ".lora_a", ".lora_b"
_MLX_LM = ".self_attn."
_CONFIG_BYTES = 1 << 20
#: what names of tensors tell of their writer, and why they are not read; DoRA first, which PEFT writes too
_FOREIGN = (
    (re.compile(r".*\.(m|lora_magnitude_vector.*)"), "a DoRA, which has a magnitude beside the update"),
    (re.compile(r".*\.lora_[AB](\..*)?"), "PEFT, whose matrices are transposed and rows otherwise ordered"),
)


def recognise(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> FoundAdapter | None:
    """What a file tells of a low-rank update: the linears and the rank, and beside mlx-lm's the scale.

    Args:
        path: the file.
        shapes: of the tensors by name: ``PATH.lora_a`` (inputs, R) and ``PATH.lora_b`` (R, outputs).

    Raises:
        ModelError: half an update, updates of several ranks, or those of a tool whose files are not read.
    """
    for mark, whose in _FOREIGN:
        theirs = [name for name in shapes if mark.fullmatch(name)]
        if theirs:
            raise ModelError(f"holds {listing(theirs, 2)} as written by {whose}: not read")
    paths = sorted({name.removesuffix(end) for name in shapes for end in (_A, _B) if name.endswith(end)})
    if not paths or any(not name.endswith((_A, _B)) for name in shapes):
        return None
    alone = [path + end for path in paths for end in (_A, _B) if path + end not in shapes]
    if alone:
        raise ModelError(f"lacks {listing(alone)}")
    pairs = {path: (shapes[path + _A], shapes[path + _B]) for path in paths}
    odd = [f"{path} {a} and {b}" for path, (a, b) in pairs.items() if not _fit(a, b)]
    if odd:
        raise ModelError(f"has updates that are no product (inputs, R) times (R, outputs): {listing(odd)}")
    ranks = sorted({a[1] for a, _ in pairs.values()})
    if len(ranks) > 1:
        raise ModelError(f"has updates of several ranks: {listing(ranks)}; one is wanted")
    told = {"rank": ranks[0]} | _beside(path, paths)
    return FoundAdapter(tuple(paths), told, () if "scale" in told else ("scale",), {_B.strip("."): 1})


def _beside(path: Path, paths: Sequence[str]) -> dict[str, float]:
    """The scale that mlx-lm writes into a file beside those of its adapters."""
    config = path.parent / "adapter_config.json"
    if not any(_MLX_LM in name for name in paths) or not config.is_file():
        return {}
    held = read_json(config, _CONFIG_BYTES)
    parameters = held.get("lora_parameters") if isinstance(held, dict) else None
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    return {"scale": float(scale)} if isinstance(scale, int | float) and not isinstance(scale, bool) else {}


def _fit(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) == 2 and a[1] == b[0] > 0
