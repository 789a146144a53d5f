"""The names of the tensors in a file of PEFT, taken apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlxlora_core.api import LazyTensor, ModelError, listing

LORA_A, LORA_B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
IA3 = "ia3_l"
VERA_B, VERA_D = "vera_lambda_b", "vera_lambda_d"
PROJECTIONS = ("vera_A", "vera_B")
_PARTS = (LORA_A, LORA_B, MAGNITUDE, EMBEDDING_A, EMBEDDING_B, IA3, VERA_B, VERA_D, *PROJECTIONS)
_NAME = re.compile(rf"(?:(.+)\.)?({'|'.join(_PARTS)})((?:\.[^.]+){{0,2}})", re.DOTALL)
_PREFIX = "base_model.model."
_MODULES, _LETTERS = 5_000, 256


@dataclass
class Held:
    """What a file of PEFT holds.

    Attributes:
        modules: path of a module, without ``base_model.model.`` -> part -> tensor.
        projections: the two matrices that all modules of a VeRA share.
        notes: what was left out and why that is right.
    """

    modules: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    projections: dict[str, LazyTensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def taken_apart(tensors: Mapping[str, LazyTensor]) -> Held:
    """The tensors by module and part.

    Raises:
        ModelError: tensors that are no part of an adapter that is read here, several adapters, or
            more modules than a model has.
    """
    held, other, adapters = Held(), list[str](), set[str]()
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        rest = match[3].split(".")[1:] if match else []
        named = [word for word in rest if word != "weight"]
        if match is None or len(named) > 1 or "bias" in named:
            other.append(name)
            continue
        adapters.update(named)
        path, part = match[1] or "", match[2]
        if len(path) > _LETTERS:
            raise ModelError(f"holds a module whose path has {len(path)} letters, wanted at most {_LETTERS}")
        place = held.projections if part in PROJECTIONS else held.modules.setdefault(_bare(path), {})
        if part in place:
            raise ModelError(f"holds {part} of {path} twice", fix="save one adapter alone")
        place[part] = tensor
    if len(adapters) > 1 or len(held.modules) > _MODULES:
        what = f"adapters {listing(sorted(adapters), 4)}" if len(adapters) > 1 else f"over {_MODULES} modules"
        raise ModelError(f"holds {what}", fix="save one adapter alone, with PEFT's save_pretrained")
    bases = [name for name in other if _is_base(name, held)]
    if refused := _refused([name for name in other if name not in bases]):
        raise ModelError("; ".join(refused))
    if bases:
        told = "weights of the base that PEFT has saved with the adapter are not looked at"
        held.notes.append(f"{told}: {listing(sorted(bases), 3)}")
    return held


def is_peft_name(name: str) -> bool:
    """Whether a tensor has a name that PEFT gives."""
    return _NAME.fullmatch(name) is not None


def _bare(path: str) -> str:
    return path.removeprefix(_PREFIX)


def _is_base(name: str, held: Held) -> bool:
    """Whether a tensor is the frozen weight inside a module that has an adapter on it."""
    path, _, end = name.rpartition(".base_layer.")
    return end == "weight" and _bare(path) in held.modules


def _refused(names: list[str]) -> list[str]:
    """Why tensors are not converted, by what they are."""
    kinds = {
        "modules_to_save (whole modules that were trained beside the adapter)": (".modules_to_save.",),
        "trainable tokens": ("trainable_tokens_",),
        "lora_bias": (f"{LORA_B}.bias", f"{EMBEDDING_B}.bias"),
        "biases that were trained": (".bias",),
        "whole embeddings or heads (save_embedding_layers)": ("embed_tokens.weight", "lm_head.weight"),
    }
    told, left = [], list(names)
    for kind, marks in kinds.items():
        found = sorted(name for name in left if any(mark in name for mark in marks))
        left = [name for name in left if name not in found]
        if found:
            told.append(f"holds {kind}, which no adapter here computes: {listing(found, 3)}")
    if left:
        told.append(f"holds {listing(sorted(left), 3)}, which nothing here computes")
    return told
