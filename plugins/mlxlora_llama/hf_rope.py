"""How a config.json of Hugging Face states rotary positions: ``rope_parameters``, or the older two keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from mlxlora_core.files import show_key, show_value, stated_rope
from mlxlora_llama.config import SCALINGS, ModelArgs
from mlxlora_llama.rope import turning, yarn_attention

_NEW, _THETA, _LONGEST = "rope_parameters", "rope_theta", "max_position_embeddings"
_ORIGINAL = "original_max_position_embeddings"
#: keys of the config that say it
KEYS = (_NEW, "rope_scaling", _THETA, _ORIGINAL)
#: argument -> what it is called there
NAMES = {
    "rope_scaling": "rope_type",
    "rope_theta": _THETA,
    "rope_factor": "factor",
    "rope_original_len": _ORIGINAL,
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
    "rope_truncate": "truncate",
    "rope_attention_factor": "attention_factor",
}
_KNOWN = {*NAMES.values(), "mscale", "mscale_all_dim", "partial_rotary_factor", "finetuned"}
_THETA_OF_LLAMA = 1e4
_DYNAMIC = "dynamic"
#: the scalings of Llama 3.1 and 3.2, which GGUF has as divisors: factors; all else is the same
_LLAMA3_FACTORS = (8.0, 32.0)
_NEAR = 1e-5


def read(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """argument -> value of all that is about rotary positions, and what is wrong.

    A scaling that is ``dynamic`` depends on how long the text is. Up to the stated
    length it is none, so that the model is taken to be no longer than that.
    """
    stated, told = stated_rope(raw)
    theta = stated.get(_THETA)
    if theta is None and raw.get("model_type") == "llama":
        theta = _THETA_OF_LLAMA
    if theta is None:
        told.append(f"{_THETA} is required: base of the rotary wavelengths, there or in {_NEW}")
        theta = _THETA_OF_LLAMA
    found: dict[str, Any] = {_THETA: theta}
    kind = stated.get("rope_type") or "default"
    told += [
        f"{_NEW}: unknown: {show_key(str(key))} {show_value(value)}"
        for key, value in stated.items()
        if key not in _KNOWN and value is not None
    ][:4]
    if stated.get("partial_rotary_factor") not in (None, 1):
        told.append(f"partial_rotary_factor: got {show_value(stated['partial_rotary_factor'])}, wanted 1")
    if kind == _DYNAMIC and raw.get(_LONGEST) is None:
        told.append(f"{_LONGEST} is required: up to there a rope_type dynamic changes nothing")
    if kind in ("default", _DYNAMIC):
        return found, told
    if kind not in ("linear", "llama3", "yarn"):
        told.append(
            f"rope_type: got {show_value(kind)}, but only default, linear, llama3 and yarn are built here"
        )
        return found, told
    return found | _scaling(kind, stated, raw), told


def written(args: ModelArgs) -> tuple[dict[str, Any], str]:
    """The keys that state the rotary positions of a model, in both spellings, and what cannot be said."""
    named: ModelArgs | None = args if args.rope_divisors is None else _named(args)
    if named is None:
        return {}, "rotary frequencies divided by numbers of the model's own (rope_divisors)"
    kind = named.rope_scaling
    if kind is None:
        table = {"rope_type": "default", _THETA: args.rope_theta}
        return {_THETA: args.rope_theta, "rope_scaling": None, _NEW: table}, ""
    arguments = (*SCALINGS[kind], "rope_truncate")
    held = {NAMES[name]: value for name in arguments if (value := getattr(named, name)) is not None}
    scaling = {"rope_type": kind, **held}
    return {_THETA: args.rope_theta, "rope_scaling": scaling, _NEW: {**scaling, _THETA: args.rope_theta}}, ""


def _named(args: ModelArgs) -> ModelArgs | None:
    """The same model with a scaling that has a name, where one turns by the same angles."""
    by = args.rope_divisors or ()
    plain = replace(args, rope_scaling=None, rope_divisors=None)
    known = [replace(plain, rope_scaling="linear", rope_factor=by[0])]
    known += [
        replace(
            plain,
            rope_scaling="llama3",
            rope_factor=factor,
            rope_low_freq_factor=1.0,
            rope_high_freq_factor=4.0,
            rope_original_len=8192,
        )
        for factor in _LLAMA3_FACTORS
    ]
    wanted = turning(args)
    assert isinstance(wanted, tuple), "divisors make an angle for each pair"
    return next((found for found in known if _same(turning(found), wanted)), None)


def _same(angles: float | tuple[float, ...], wanted: tuple[float, ...]) -> bool:
    """Whether angles are the same but for the rounding of a file."""
    assert isinstance(angles, tuple), "a scaling makes an angle for each pair"
    return all(abs(one / other - 1) <= _NEAR for one, other in zip(angles, wanted, strict=True))


def notes(raw: Mapping[str, Any]) -> list[str]:
    """What was assumed of the rotary positions, in words."""
    stated, _ = stated_rope(raw)
    told = []
    if stated.get(_THETA) is None:
        told.append(
            f"config.json states no {_THETA}: {_THETA_OF_LLAMA} is taken, as the first Llama has it; "
            "state it there if the model was trained with another"
        )
    if stated.get("rope_type") == _DYNAMIC:
        told.append(
            f"rotary positions are scaled by the length of the text (dynamic) beyond {_LONGEST} "
            f"{raw.get(_LONGEST)}, where the model ends here"
        )
    return told


def _scaling(kind: str, stated: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a scaling, with what transformers takes where they are not stated."""
    found = {"rope_scaling": kind, "rope_factor": stated.get("factor")}
    original = stated.get(_ORIGINAL, raw.get(_LONGEST))
    if kind == "llama3":
        found |= {name: stated.get(NAMES[name]) for name in ("rope_low_freq_factor", "rope_high_freq_factor")}
        found["rope_original_len"] = original
    if kind == "yarn":
        found["rope_original_len"] = original
        if found["rope_factor"] is None and _positive(original) and _positive(raw.get(_LONGEST)):
            found["rope_factor"] = raw[_LONGEST] / original
        found["rope_beta_fast"] = stated.get("beta_fast") or 32.0
        found["rope_beta_slow"] = stated.get("beta_slow") or 1.0
        found["rope_truncate"] = stated.get("truncate")
        found["rope_attention_factor"] = _attention(stated, found["rope_factor"])
    return found


def _attention(stated: Mapping[str, Any], factor: Any) -> Any:
    """What YaRN multiplies queries and keys by."""
    told = stated.get("attention_factor")
    if told is not None or not _positive(factor):
        return told
    usual = yarn_attention(factor)
    one, other = stated.get("mscale"), stated.get("mscale_all_dim")
    if not _positive(one) or not _positive(other):
        return usual
    return (1 + one * (usual - 1)) / (1 + other * (usual - 1))


def _positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
