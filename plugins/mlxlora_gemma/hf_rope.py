"""How a config.json states a Gemma's rotary positions: a table a kind of layer, or the older keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxlora_core.files import show_key, show_value, stated_rope
from mlxlora_gemma.config import GEMMA3, ModelArgs

_TABLE, _OLD, _THETA, _LOCAL = "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"
_FULL, _SLIDING = "full_attention", "sliding_attention"
#: keys of the config that this module reads
KEYS = (_TABLE, _OLD, _THETA, _LOCAL)
#: argument -> what it is called there
NAMES = {"rope_theta": _THETA, "rope_factor": "factor", "sliding_rope_theta": _LOCAL}
_KNOWN = {"rope_type", _THETA, "factor", "partial_rotary_factor", "finetuned"}
_THETA_OF_GEMMA2, _THETA_OF_GEMMA3, _LOCAL_OF_GEMMA3 = 1e4, 1e6, 1e4


def read(raw: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], list[str]]:
    """argument -> value of all that is about rotary positions, and what is wrong."""
    if kind != GEMMA3:
        stated, told = stated_rope(raw)
        found, faults = _of_layers(stated, _THETA_OF_GEMMA2)
        if raw.get(_LOCAL) is not None:
            faults.append(f"{_LOCAL}: got {show_value(raw[_LOCAL])}, which a {kind} has none of")
        return found, told + faults
    full, sliding, told = _tables(raw)
    found, faults = _of_layers(full, _THETA_OF_GEMMA3)
    local, more = _of_layers(sliding, _LOCAL_OF_GEMMA3)
    if local.pop("rope_factor", None) is not None:
        more.append(f"{_TABLE}: got {_SLIDING} that are scaled, which is not built here")
    return found | {"sliding_rope_theta": local["rope_theta"]}, told + faults + more


def written(args: ModelArgs) -> dict[str, Any]:
    """The keys that state the rotary positions of a model, in both spellings."""
    linear = None if args.rope_factor is None else {"rope_type": "linear", "factor": args.rope_factor}
    full = {"rope_type": "default", **(linear or {}), _THETA: args.rope_theta}
    found = {_THETA: args.rope_theta, _OLD: linear}
    if args.model_type != GEMMA3:
        return {**found, _TABLE: full}
    local = args.sliding_rope_theta or _LOCAL_OF_GEMMA3
    sliding = {"rope_type": "default", _THETA: local}
    return {**found, _LOCAL: local, _TABLE: {_FULL: full, _SLIDING: sliding}}


def assumed(raw: Mapping[str, Any], kind: str) -> dict[str, float]:
    """What a config does not say of rotary positions, by its keys -> what is taken."""
    if kind != GEMMA3:
        return {} if stated_rope(raw)[0].get(_THETA) is not None else {_THETA: _THETA_OF_GEMMA2}
    full, sliding, _ = _tables(raw)
    taken = {} if full.get(_THETA) is not None else {_THETA: _THETA_OF_GEMMA3}
    return taken if sliding.get(_THETA) is not None else taken | {_LOCAL: _LOCAL_OF_GEMMA3}


def _of_layers(stated: Mapping[str, Any], theta: float) -> tuple[dict[str, Any], list[str]]:
    """Base and scaling of one kind of layers."""
    told = [
        f"{_TABLE}: unknown: {show_key(str(key))} {show_value(value)}"
        for key, value in stated.items()
        if key not in _KNOWN and value is not None
    ][:4]
    if stated.get("partial_rotary_factor") not in (None, 1):
        told.append(f"partial_rotary_factor: got {show_value(stated['partial_rotary_factor'])}, wanted 1")
    found: dict[str, Any] = {"rope_theta": stated.get(_THETA, theta)}
    scaling = stated.get("rope_type", "default")
    if scaling == "linear":
        found["rope_factor"] = stated.get("factor")
        if found["rope_factor"] is None:
            told.append("factor is required: what a rope_type linear divides frequencies by")
    elif scaling != "default":
        told.append(f"rope_type: got {show_value(scaling)}, but only default and linear are built here")
    return found, told


def _tables(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What is stated of layers that see all and of those with a window; the spellings must not differ."""
    table = raw.get(_TABLE)
    old = {key: raw[key] for key in (_OLD, _THETA) if raw.get(key) is not None}
    local = {_THETA: raw[_LOCAL]} if raw.get(_LOCAL) is not None else {}
    if table is None or table == {}:
        full, told = stated_rope(old)
        sliding, faults = stated_rope(local)
        return full, sliding, told + faults
    if not isinstance(table, Mapping) or not table.keys() <= {_FULL, _SLIDING}:
        wanted = f"wanted a table for each of {_FULL} and {_SLIDING}"
        return {}, {}, [f"{_TABLE}: got {show_value(table)}, {wanted}"]
    full, told = stated_rope({**old, _TABLE: table.get(_FULL)})
    sliding, faults = stated_rope({**local, _TABLE: table.get(_SLIDING)})
    return full, sliding, told + faults
