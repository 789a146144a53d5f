"""The adapter_config.json of PEFT: what it says of an adapter that is read here, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, listing
from mlxlora_core.files import read_json, show_key, show_value

CONFIG = "adapter_config.json"
_CONFIG_BYTES = 4 << 20
TYPES = ("LORA", "IA3", "VERA")
_LARGEST = 1e9
#: initial values of a LoRA that leave the base's weights as they are
_STARTS = ("gaussian", "orthogonal", "eva", "mica")
_MAKES_PLAIN = "save it again with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"


def _is_set(value: Any) -> bool:
    return bool(value)


def _changes_base(value: Any) -> bool:
    """Whether the initial values of an adapter were taken from the base's weights, and out of them."""
    return value is not None and not isinstance(value, bool) and value not in _STARTS


#: key -> (whether its value asks for what is not computed here, what that is)
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "modules_to_save": (_is_set, "whole modules that are trained beside the adapter"),
    "bias": (lambda value: value not in (None, "none"), "biases that are trained"),
    "lora_bias": (_is_set, "biases in the updates"),
    "fan_in_fan_out": (_is_set, "weights that are stored transposed"),
    "init_lora_weights": (_changes_base, f"weights of the base were changed at the start; {_MAKES_PLAIN}"),
    "target_parameters": (_is_set, "parameters of stacked experts"),
    "trainable_token_indices": (_is_set, "single tokens that are trained"),
    "layer_replication": (_is_set, "layers that are there several times"),
    "use_qalora": (_is_set, "QALoRA, whose inputs are pooled"),
    "alora_invocation_tokens": (_is_set, "an activated LoRA, which begins at a token"),
    "use_bdlora": (_is_set, "updates in blocks"),
    "arrow_config": (_is_set, "routing between adapters"),
    "kasa_config": (_is_set, "KaSA, which has singular values in the update"),
    "monteclora_config": (_is_set, "updates that are drawn at random"),
    "ensure_weight_tying": (_is_set, "adapters that are tied to each other"),
}
#: keys that do not change what an adapter of known tensors computes, or that are looked at elsewhere
_KNOWN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "d_initial",
        "eva_config",
        "exclude_modules",
        "feedforward_modules",
        "inference_mode",
        "init_ia3_weights",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "projection_prng_key",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "save_projection",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
        "velora_config",
        "vera_dropout",
    }
)


def read(path: Path) -> dict[str, Any]:
    """What a config says; nothing where there is none.

    Raises:
        ModelError: it is damaged.
    """
    if not path.is_file():
        return {}
    held = read_json(path, _CONFIG_BYTES)
    return held if isinstance(held, dict) else {}


def is_of_peft(config: Mapping[str, Any]) -> bool:
    """Whether a config is one of PEFT's."""
    return "peft_type" in config


def check(config: Mapping[str, Any], where: Path) -> str:
    """The kind of adapter, one of :data:`TYPES`, if everything that the config asks for is computed here.

    Raises:
        ModelError: all that is not, by the name of its key.
    """
    kind = config["peft_type"]
    if kind not in TYPES:
        raise ModelError(f"peft_type is {show_value(kind)}, wanted {listing(TYPES)}", where=where)
    told = [
        f"{key} {show_value(config[key])} ({what})"
        for key, (asks, what) in _REFUSED.items()
        if key in config and asks(config[key])
    ]
    if told:
        fix = "put the adapter into the model with PEFT's merge_and_unload, and open that"
        raise ModelError(f"asks for what no adapter here computes: {'; '.join(told)}", where=where, fix=fix)
    return str(kind)


def notes(config: Mapping[str, Any]) -> list[str]:
    """What the owner of an adapter may not expect, in words."""
    told = []
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and base:
        told.append(f"its config names the base {show_value(base)}")
    strange = [key for key in config if key not in _KNOWN and key not in _REFUSED and config[key]]
    if strange:
        told.append(f"keys of its config that are not known were not looked at: {_keys(strange)}")
    return told


def number(config: Mapping[str, Any], key: str, default: float, where: Path, least: float = 0.0) -> float:
    """A number above ``least``.

    Raises:
        ModelError: it is none.
    """
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < _LARGEST:
        raise ModelError(f"{key} is {show_value(value)}, wanted a number above {least:g}", where=where)
    return value


def share(config: Mapping[str, Any], key: str, where: Path) -> float:
    """A number from 0 up to 1.

    Raises:
        ModelError: it is none.
    """
    value = config.get(key)
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ModelError(f"{key} is {show_value(value)}, wanted a number from 0 up to 1", where=where)
    return float(value)


def flag(config: Mapping[str, Any], key: str, where: Path) -> bool:
    """Whether a key is set.

    Raises:
        ModelError: it is neither true nor false.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{key} is {show_value(value)}, wanted true or false", where=where)
    return bool(value)


def names(config: Mapping[str, Any], key: str, where: Path) -> list[str]:
    """A list of module names, which may stand there as one.

    Raises:
        ModelError: it is none, or an expression.
    """
    value = config.get(key)
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list) or not all(
        isinstance(n, str) and re.fullmatch(r"[\w.]+", n) for n in found
    ):
        raise ModelError(f"{key} is {show_value(value)}, wanted a list of names", where=where)
    return found


def _keys(keys: list[str]) -> str:
    return listing((show_key(key) for key in sorted(keys)), 5)
