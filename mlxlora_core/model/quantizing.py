"""Quantizes the dense weights of a model as each is read, to convert it or to open it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.errors import UsageError, listing
from mlxlora_core.files.tensor_checks import type_name
from mlxlora_core.machine.memory import require_memory
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import embeddings, linears
from mlxlora_core.model.quantization import QUANTIZER, pack, packed_already, packed_config
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.defaults import DEFAULT_QUANTIZER
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.values import LazyTensor

#: part -> its shape and type, of what a quantizer makes of a weight; None where it leaves it as it is
_Form = Mapping[str, tuple[tuple[int, ...], str]] | None


@dataclass(frozen=True)
class Packing:
    """What a quantizer does to a model while its tensors are read.

    Attributes:
        choice: the quantizer with its options.
        tensors: those of the model, the parts of a weight in its place; reading the first part packs it.
        config: config.json of the model when they are read.
        taken: paths of the weights that are packed on the way.
        kept: paths of those that were packed before.
        left_dense: paths of those that the quantizer leaves as they are.
        work_bytes: what packing the largest takes of memory.
        errors: path -> ‖w - ŵ‖² and ‖w‖² of each weight that has been packed so far.
    """

    choice: Choice
    tensors: dict[str, LazyTensor]
    config: dict[str, Any]
    taken: tuple[str, ...]
    kept: tuple[str, ...]
    left_dense: tuple[str, ...]
    work_bytes: int
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def relative_error(self) -> float:
        """‖w - ŵ‖ / ‖w‖ over all weights that have been packed so far."""
        off, all_ = (sum(pair[n] for pair in self.errors.values()) for n in (0, 1))
        return float((off / all_) ** 0.5) if all_ else 0.0

    def words(self) -> str:
        """What was done, in a line."""
        options = ", ".join(f"{key} {value}" for key, value in plain(self.choice.options).items())
        said = f"{len(self.taken)} weights are quantized by {self.choice.component.spec.name} ({options})"
        if self.errors:
            said += f", relative error {self.relative_error:.2%}"
        if self.kept:
            said += f"; {len(self.kept)} that were packed stay as they are"
        if self.left_dense:
            said += f"; left dense by the quantizer: {listing(self.left_dense)}"
        return said


def pack_on_reading(
    model: LanguageModel,
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    asked: Quantization,
    registry: Registry,
    where: Path,
) -> Packing:
    """The tensors of a model, its dense linears packed by a quantizer when they are read.

    Weights that are packed stay so. The output head is left out unless it is asked for;
    what the checkpoint stores in fewer bits, and no quantizer has the form of, is taken
    in any case, head and embedding too.

    Args:
        model: with dense linears.
        tensors: as a model folder holds them, in the types that they are to have.
        config: config.json of the model as it is.
        asked: by whom it is quantized, with which options.
        registry: where quantizers are looked up.
        where: the model, for messages.

    Raises:
        UsageError: nothing is left to quantize, the quantizer takes none of it, or another one has
            packed the rest.
        ResourceError: there is too little memory to pack the largest.
        PluginError: the quantizer breaks its contract.
    """
    kept = packed_already(model, tensors, config, where)
    if kept:
        _require_same(config, asked.choice, registry, where)
    weights = _wanted(model, tensors, kept, head=asked.config.head)
    if kept and not weights:
        raise UsageError(f"{where} is quantized already", fix="leave -q out: its bits are kept as they are")
    forms = _forms(weights, asked.choice)
    words = {path for path, _ in embeddings(model)}
    taken = [p for p, weight in weights.items() if _is_taken(weight, forms[_kind(weight)], p in words)]
    if not taken:
        raise _takes_nothing(weights, asked.choice)
    options = plain(asked.choice.options)
    quantizer = config.get(QUANTIZER, DEFAULT_QUANTIZER) if kept else asked.choice.component.id
    errors: dict[str, tuple[float, float]] = {}
    return Packing(
        choice=asked.choice,
        tensors=_with_parts(tensors, {path: weights[path] for path in taken}, forms, asked.choice, errors),
        config={**config, **packed_config(quantizer, kept | dict.fromkeys(taken, options))},
        taken=tuple(taken),
        kept=tuple(kept),
        left_dense=tuple(path for path in weights if path not in taken),
        work_bytes=_work_bytes(weights),
        errors=errors,
    )


def _require_same(config: Mapping[str, Any], choice: Choice, registry: Registry, where: Path) -> None:
    """Refuse another quantizer than the one that has packed some of the weights: config.json names one."""
    name = config.get(QUANTIZER, DEFAULT_QUANTIZER)
    if registry.find("quantizer", name) != choice.component:
        raise UsageError(
            f"{where} has weights that '{name}' has packed, and a model has one quantizer, "
            f"not '{choice.component.id}' too",
            fix=f"leave -q out, or add -q {name}",
        )


def _wanted(
    model: LanguageModel, tensors: Mapping[str, LazyTensor], kept: Collection[str], *, head: bool
) -> dict[str, LazyTensor]:
    """path -> weight, of those that the quantizer is asked about."""
    module: nn.Module = model
    found = {path for path, _ in linears(module) if head or path != model.head_path}
    for path, _ in (*linears(module), *embeddings(module)):
        weight = tensors.get(f"{path}.weight")
        if weight is not None and weight.expanded:
            found.add(path)
    names = ((name.removesuffix(".weight"), tensor) for name, tensor in tensors.items())
    return {path: tensor for path, tensor in names if path in found and path not in kept}


def _kind(weight: LazyTensor) -> tuple[tuple[int, ...], str]:
    """What decides whether a quantizer takes a weight, and what becomes of it."""
    return weight.shape, weight.dtype


def _work_bytes(weights: Mapping[str, LazyTensor]) -> int:
    """What packing the largest weight takes: it, its parts, and the numbers that it is compared by."""
    return max(
        (math.prod(w.shape) * (2 * getattr(mx, w.dtype).size + 13) for w in weights.values()), default=0
    )


def _forms(weights: Mapping[str, LazyTensor], choice: Choice) -> dict[tuple[tuple[int, ...], str], _Form]:
    """What the quantizer makes of each kind of weight; it is asked about zeros, for only that matters."""
    require_memory(_work_bytes(weights), "quantizing", "quantize it where there is more memory")
    forms: dict[tuple[tuple[int, ...], str], _Form] = {}
    for shape, dtype in sorted({_kind(weight) for weight in weights.values()}):
        packed = pack(mx.zeros(shape, getattr(mx, dtype)), choice)
        forms[shape, dtype] = _form(packed.parts) if packed is not None else None
        del packed
        mx.clear_cache()
    return forms


def _is_taken(weight: LazyTensor, form: _Form, looked_up: bool) -> bool:
    """Whether a weight is packed; one whose rows are looked up is only by parts that have the same rows."""
    rows = weight.shape[:1]
    return form is not None and not (looked_up and any(shape[:1] != rows for shape, _ in form.values()))


def _form(parts: Mapping[str, mx.array]) -> dict[str, tuple[tuple[int, ...], str]]:
    """part -> its shape and type."""
    return {name: (part.shape, type_name(part.dtype)) for name, part in parts.items()}


def _takes_nothing(weights: Mapping[str, LazyTensor], choice: Choice) -> UsageError:
    """The error of a quantizer that would take no linear, so that the model would be no smaller."""
    options = ", ".join(f"{key} {value}" for key, value in plain(choice.options).items())
    widths = listing(sorted({weight.shape[-1] for weight in weights.values()}))
    return UsageError(
        f"nothing is quantized: quantizer '{choice.component.spec.name}' ({options}) leaves all "
        f"{len(weights)} linears as they are, which have {widths} inputs",
        fix="choose options that take them, such as a --q-group-size that divides these, or leave -q out",
    )


def _with_parts(
    tensors: Mapping[str, LazyTensor],
    taken: Mapping[str, LazyTensor],
    forms: Mapping[tuple[tuple[int, ...], str], _Form],
    choice: Choice,
    errors: dict[str, tuple[float, float]],
) -> dict[str, LazyTensor]:
    """The tensors, with the parts of each weight that is taken in its place."""
    made: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        if path not in taken or path == name:
            made[name] = tensor
            continue
        form = forms[_kind(tensor)] or {}
        weight = _Weight(path, tensor, form, choice, errors)
        for part, (shape, dtype) in form.items():
            made[f"{path}.{part}"] = LazyTensor(shape, dtype, partial(weight.read, part))
    return made


class _Weight:
    """A weight that is packed when the first of its parts is read, and again when one is read twice."""

    def __init__(
        self,
        path: str,
        weight: LazyTensor,
        form: Mapping[str, tuple[tuple[int, ...], str]],
        choice: Choice,
        errors: dict[str, tuple[float, float]],
    ) -> None:
        self._path, self._weight, self._form = path, weight, form
        self._choice, self._errors = choice, errors
        self._parts: dict[str, mx.array] = {}  # those that nobody has taken yet

    def read(self, part: str) -> mx.array:
        """A part, which is not kept here."""
        if part not in self._parts:
            self._parts = self._pack()
            mx.clear_cache()
        return self._parts.pop(part)

    def _pack(self) -> dict[str, mx.array]:
        weight = self._weight.read()
        packed = pack(weight, self._choice)
        parts = dict(packed.parts) if packed is not None else {}
        if _form(parts) != self._form:
            got = f"other parts of {self._path} than of zeros in its shape and type"
            raise self._choice.component.breach("quantize", got, "what shape and type alone decide")
        assert packed is not None, "a form has parts"
        mx.eval(list(parts.values()))
        exact = weight.astype(mx.float32)
        off, all_ = (packed.weight - exact).square().sum(), exact.square().sum()
        self._errors[self._path] = float(off), float(all_)
        return parts
