"""LoRA, rsLoRA and DoRA of PEFT, as adapters here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.api import ForeignAdapter, LazyTensor, ModelError, listing
from mlxlora_core.files import show_value
from mlxlora_peft import config as configs
from mlxlora_peft.names import EMBEDDING_A, EMBEDDING_B, LORA_A, LORA_B, MAGNITUDE, Held
from mlxlora_peft.patterns import Patterns, most_common

if TYPE_CHECKING:
    import mlx.core as mx

_RANK, _ALPHA = 8, 8.0  # what PEFT takes where a config does not say
_PAIRS = ((LORA_A, LORA_B), (EMBEDDING_A, EMBEDDING_B))


@dataclass(frozen=True)
class _Update:
    """What a module has: (R, inputs) and (outputs, R), and of DoRA the magnitudes (outputs,)."""

    down: LazyTensor
    up: LazyTensor
    magnitudes: LazyTensor | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def parameters(self) -> dict[str, LazyTensor]:
        """As they are called and stored here."""
        found = {"lora_a": transposed(self.down), "lora_b": transposed(self.up)}
        return found | ({} if self.magnitudes is None else {"m": self.magnitudes})


def low_rank(config: Mapping[str, Any], held: Held, where: Path) -> ForeignAdapter:
    """The adapter that a config and tensors of ``peft_type`` LORA are.

    Args:
        config: what it says; nothing where there is none.
        held: the tensors.
        where: of the config, for messages.

    Raises:
        ModelError: tensors that are missing or do not fit each other or the config.
    """
    updates = _updates(held)
    magnitudes = [path for path, update in updates.items() if update.magnitudes is not None]
    if magnitudes and len(magnitudes) < len(updates):
        alone = [f"{path}.{MAGNITUDE}" for path in updates if path not in magnitudes]
        raise ModelError(f"lacks {listing(alone, 4)}")
    if config and configs.flag(config, "use_dora", where) != bool(magnitudes):
        what = "there are magnitudes" if magnitudes else "there are no magnitudes"
        raise ModelError(f"use_dora is {show_value(config.get('use_dora'))}, but {what}", where=where)
    opened = ForeignAdapter(
        adapter="dora" if magnitudes else "lora",
        options={},
        linears={path: update.parameters() for path, update in updates.items()},
        outputs={"lora_b": 1, "m": 0} if magnitudes else {"lora_b": 1},
        embedding_alone=True,
    )
    embeddings = sorted(path for path in magnitudes if EMBEDDING_A in held.modules[path])
    if embeddings:
        raise ModelError(f"is a DoRA on {listing(embeddings)}, which nothing here computes for embeddings")
    ranks = {path: update.rank for path, update in updates.items()}
    if not config:
        common = most_common(ranks)
        return replace(
            opened,
            options={"rank": common},
            overrides={path: {"rank": rank} for path, rank in ranks.items() if rank != common},
            unstated=("scale",),
        )
    return _scaled(opened, config, ranks, where)


def _scaled(
    opened: ForeignAdapter, config: Mapping[str, Any], ranks: Mapping[str, int], where: Path
) -> ForeignAdapter:
    """The adapter with the ranks and scales that the config says."""
    rank = configs.number(config, "r", _RANK, where)
    alpha = configs.number(config, "lora_alpha", _ALPHA, where, least=-1e9)
    alphas = _alphas(config, ranks, rank, alpha, where)
    rooted = configs.flag(config, "use_rslora", where)
    dropout = configs.share(config, "lora_dropout", where)
    if rooted and opened.adapter == "lora":
        opened = replace(opened, adapter="rslora")

    def options(rank: float, alpha: float) -> dict[str, float]:
        if opened.adapter == "rslora":
            return {"rank": rank, "alpha": float(alpha)}
        return {"rank": rank, "scale": alpha / (math.sqrt(rank) if rooted else rank)}

    told = {path: options(held, alphas[path]) for path, held in ranks.items()}
    common = {
        key: most_common({path: found[key] for path, found in told.items()}, said)
        for key, said in options(rank, alpha).items()
    }
    overrides = {
        path: {key: value for key, value in found.items() if value != common[key]}
        for path, found in told.items()
    }
    return replace(
        opened,
        options={**common, "dropout": dropout},
        overrides={path: differing for path, differing in overrides.items() if differing},
    )


def _alphas(
    config: Mapping[str, Any], ranks: Mapping[str, int], rank: float, alpha: float, where: Path
) -> dict[str, float]:
    """path -> alpha, once the ranks of the config are those of the tensors."""
    try:
        rank_at = Patterns("rank_pattern", config.get("rank_pattern"), least=0)
        alpha_at = Patterns("alpha_pattern", config.get("alpha_pattern"), least=-1e9)
    except ModelError as fault:
        raise ModelError(fault.what, where=where) from fault
    odd = [
        f"{path} {held}, wanted {said:g}"
        for path, held in ranks.items()
        if (said := rank_at.get(path, rank)) != held
    ]
    if odd:
        raise ModelError(f"the tensors have other ranks than it says: {listing(odd, 4)}", where=where)
    return {path: alpha_at.get(path, alpha) for path in ranks}


def _updates(held: Held) -> dict[str, _Update]:
    """path -> its update.

    Raises:
        ModelError: parts that are missing, or that are no product; all of them.
    """
    found, alone, odd = {}, list[str](), list[str]()
    for path, parts in held.modules.items():
        pair = _PAIRS[EMBEDDING_A in parts or EMBEDDING_B in parts]
        missing = [f"{path}.{part}" for part in pair if part not in parts]
        if missing or len(parts) > 2 + (MAGNITUDE in parts):
            alone += missing or [f"{path} of which embeddings and linears are both there"]
            continue
        update = _Update(parts[pair[0]], parts[pair[1]], parts.get(MAGNITUDE))
        found[path] = update
        if not _fits(update):
            odd.append(f"{path} {update.down.shape} and {update.up.shape}")
    if alone:
        raise ModelError(f"lacks {listing(alone, 4)}")
    if odd:
        raise ModelError(f"has updates that are no product (outputs, R) times (R, inputs): {listing(odd, 4)}")
    return found


def _fits(update: _Update) -> bool:
    down, up = update.down.shape, update.up.shape
    product = len(down) == len(up) == 2 and down[0] == up[1] > 0
    return product and (update.magnitudes is None or update.magnitudes.shape == up[:1])


def transposed(tensor: LazyTensor) -> LazyTensor:
    """A matrix with its axes turned round."""

    def read() -> mx.array:
        return tensor.read().T

    return LazyTensor(tuple(reversed(tensor.shape)), tensor.dtype, read)
