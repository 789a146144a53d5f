"""An export, opened again before anybody sees it, held against the model that it was made of.

Its tensors, what its model computes on a text, and its tokenizer: each must be the same, but for what
the types of the format round. Neither of the two models is ever in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import DataError, ModelError, SafetyError, UsageError, listing
from mlxlora_core.machine.device import on_cpu
from mlxlora_core.model import adapters, architectures, loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.export_source import Exported
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.own_weights import own_tensors, weights_of
from mlxlora_core.model.same_tensors import Compared, compare, distance_of
from mlxlora_core.model.same_tokens import require_same_tokens
from mlxlora_core.model.stored import StoredModel, open_stored
from mlxlora_core.model.streaming import stream
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.options import plain
from mlxlora_core.plugins import Registry
from mlxlora_core.values import LazyTensor

TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on. In 1969 people walked on the Moon; "
    "what would they have said of a machine that answers in whole sentences?"
)
_TOKENS = 64
#: how far the logits of two models may be apart that have the same weights. GPUs multiply float32 in
#: fewer bits, and what an adapter adds apart from a weight is then rounded otherwise than inside it.
_SAME, _SAME_ON_GPU = 1e-5, 2e-3
#: how far an adapter's change in a weight may be off, whose factors may be stored as bfloat16; and which
#: share of the weight a change is measured by that is less
_UPDATE, _LEAST = 2.0**-6, 1e-4
#: the names of arguments of rotary positions, which other libraries spell in several ways
_ROPE = "rope_"
#: layouts whose readers take some tokens for ends by how they are written, whatever the file says
_ENDS_BY_SPELLING = ("gguf",)
_LONGEST, _WINDOW, _WINDOWED = "max_seq_len", "sliding_window", "window_layers"

Told = Callable[[str, int, int], None]
CHECKING = "checking the export"


@dataclass(frozen=True)
class ExportCheck:
    """What was found when an export was opened again.

    Attributes:
        exact: tensors, or updates of an adapter, that are the same to the bit.
        rounded: those that the format rounds.
        largest_rounding: ‖there - here‖ / ‖here‖ of the one that is rounded most.
        tokens: of the text whose logits were compared.
        distance: ‖there - here‖ / ‖here‖ of the logits; here is the base with the adapter beside it.
        largest_difference: the largest single difference of the logits.
        same_argmax: share of positions with the same most likely token.
    """

    exact: int
    rounded: int
    largest_rounding: float
    tokens: int
    distance: float
    largest_difference: float
    same_argmax: float


def check_export(exported: Exported, written: Path, registry: Registry, told: Told) -> ExportCheck:
    """Open what was written again, and compare it with the model in memory.

    Args:
        exported: what was exported; its model is no good for anything else afterwards.
        written: the folder or the file.
        registry: where loaders are looked up.
        told: called with (what is done, tensors compared, all).

    Raises:
        ModelError: what was written is another model, or is not read again.
    """
    component = exported.exporter.component
    check = _check_adapter if component.spec.opens == "adapter" else _check_model
    try:
        return check(exported, written, registry, told)
    except (ModelError, DataError, UsageError, SafetyError) as fault:
        # Where it was found is not told: nothing is left there.
        said = f"exporter '{component.id}' has written another model, which was not kept"
        raise ModelError(
            f"{said}: {fault.what}",
            fix="report this, with the names of the model and of the exporter",
        ) from fault


# --- a model ------------------------------------------------------------------


def _check_model(exported: Exported, written: Path, registry: Registry, told: Told) -> ExportCheck:
    """The tensors, the arguments, the logits and the tokenizer of a model that was exported."""
    opened = open_stored(written, registry)
    model = exported.model
    more_ends = exported.exporter.component.spec.layout in _ENDS_BY_SPELLING
    require_same_tokens(model.tokenizer, opened.tokenizer, more_ends=more_ends)
    args = architectures.folder_args(opened.architecture.spec, opened.config)
    _require_same_args(exported, opened, args)
    file = own_tensors(loading.model_of(opened, "", ""), opened.tensors, None, packed=True)
    compared = compare(exported.own_tensors(), file, exported.shifts(), partial(told, CHECKING))
    if opened.unread:
        raise ModelError(f"holds tensors that no model has: {listing(sorted(opened.unread))}")
    ids = text_of(model.tokenizer, model.language_model)
    exact = not compared.rounded and not _rounds(exported)
    wanted = _adapted_logits(exported, ids)
    found = _logits(opened.language_model, file, ids)
    if args != exported.args:
        again = architectures.build(model.architecture, exported.args)
        _require_same(_logits(again, file, ids), found, "by its config the model computes something else")
    if exact:
        _require_same(wanted, found, "the logits differ, though every tensor is the same")
    return _checked(compared, wanted, found)


def _require_same_args(exported: Exported, opened: StoredModel, args: Any) -> None:
    """Refuse a config by which the model is another one, where the logits of a text need not show it.

    Raises:
        ModelError: with the arguments that differ.
    """
    if opened.architecture != exported.model.architecture:
        raise ModelError(f"is a model of {opened.architecture.id}, wanted {exported.model.architecture.id}")
    here, there = plain(exported.args), plain(args)
    del here["model_type"]  # llama.cpp has one name for several families
    _drop_unbounded(here)
    respelt = _ropes(here) != _ropes(there)  # what they come to shows in the logits
    other = [
        f"{name} is {there[name]!r}, wanted {value!r}"
        for name, value in here.items()
        if not (respelt and name.startswith(_ROPE)) and not _equal(value, there[name])
    ]
    if other:
        raise ModelError("its config says otherwise: " + listing(other))


def _drop_unbounded(args: dict[str, Any]) -> None:
    """Leave out what bounds no text: a length that nobody states, a window that no text fills.

    Formats that must state a length, or know no window, say something else.
    """
    longest, window = args.get(_LONGEST), args.get(_WINDOW)
    if longest is None:
        args.pop(_LONGEST, None)
    elif window is not None and window >= longest:
        del args[_WINDOW]
        args.pop(_WINDOWED, None)


def _ropes(args: Mapping[str, Any]) -> set[str]:
    """The arguments of rotary positions that are stated."""
    return {name for name, value in args.items() if name.startswith(_ROPE) and value is not None}


def _equal(here: Any, there: Any) -> bool:
    """Whether two arguments are the same, but for a number that is kept as float32."""
    if isinstance(here, float) and isinstance(there, float):
        return abs(here - there) <= 1e-6 * abs(here)
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(map(_equal, here, there))
    return bool(here == there)


def _rounds(exported: Exported) -> bool:
    """Whether weights were rounded before they were written: to a type, or to bits."""
    weights = weights_of(exported.model, exported.stored, exported.adapted)
    return any(weight.rounds(packed=exported.packed, exact=exported.exact) for weight in weights.values())


# --- an adapter ---------------------------------------------------------------


def _check_adapter(exported: Exported, written: Path, registry: Registry, told: Told) -> ExportCheck:
    """What an adapter that was exported alone does to each linear, and to the logits."""
    adapted, model = exported.adapted, exported.model
    assert adapted is not None, "an adapter was exported"
    again, stored = loading.outline(model.folder, registry, exported.quantization)
    found = adapters.load_file(AdapterFile(written, any_base=True), again, registry)
    left = set(adapted.paths) - set(found.paths)
    if left:
        raise ModelError(f"leaves out {listing(sorted(left))}")
    here = weights_of(model, exported.stored, adapted)
    there = weights_of(again, stored, found)
    distances = {}
    # Those that are one with others there are adapted too, and must be left as they are.
    for done, path in enumerate(found.paths, start=1):
        told(CHECKING, done, len(found.paths))
        before = here[path].base().astype(mx.float32)
        wanted, got = here[path].exact() - before, there[path].exact() - before
        distances[path] = distance_of(got, wanted, _LEAST * float(mx.linalg.norm(before.reshape(-1))))
    worst = max(distances, key=lambda path: distances[path])
    if not distances[worst] <= _UPDATE:
        raise ModelError(f"{worst} is changed otherwise: by {distances[worst]:.2g} of the change")
    ids = text_of(model.tokenizer, model.language_model)
    second = dataclasses.replace(exported, model=again, stored=stored, adapted=found)
    compared = Compared(
        exact=sum(distance == 0.0 for distance in distances.values()),
        rounded=sum(distance > 0.0 for distance in distances.values()),
        largest=distances[worst],
    )
    return _checked(compared, _adapted_logits(exported, ids), _adapted_logits(second, ids))


# --- what models compute ------------------------------------------------------


def text_of(tokenizer: CheckedTokenizer, model: LanguageModel) -> mx.array:
    """Token ids (1, T) of a fixed text, no longer than the model's context."""
    ids = tokenizer.encode(TEXT)[: min(_TOKENS, model.context_tokens or _TOKENS)]
    return mx.array([ids])


def _adapted_logits(exported: Exported, ids: mx.array) -> mx.array:
    """Those of the base with the adapter beside its linears."""
    adapted, model = exported.adapted, exported.model
    base = own_tensors(model, exported.stored, adapted, packed=True, fused=False)
    stream(model.language_model, base, adapted.paths if adapted else ())
    if adapted:
        adapters.wrap_again(model, adapted)
    return _computed(model.language_model, ids)


def _logits(model: LanguageModel, tensors: Mapping[str, LazyTensor], ids: mx.array) -> mx.array:
    """Logits (T, V), float32, of token ids (1, T), by a model without an adapter that reads its tensors."""
    stream(model, tensors)
    return _computed(model, ids)


def _computed(model: LanguageModel, ids: mx.array) -> mx.array:
    logits = model(ids)[0].astype(mx.float32)
    mx.eval(logits)
    return logits


def _require_same(wanted: mx.array, found: mx.array, what: str) -> None:
    """Refuse logits that differ by more than sums that are made in another order.

    Raises:
        ModelError: with by how much.
    """
    apart = distance_of(found, wanted)
    if not apart <= (_SAME if on_cpu() else _SAME_ON_GPU):
        raise ModelError(f"{what}: by {apart:.2g} of their size")


def _checked(compared: Compared, wanted: mx.array, found: mx.array) -> ExportCheck:
    """What was found, in numbers."""
    same = (mx.argmax(found, axis=-1) == mx.argmax(wanted, axis=-1)).astype(mx.float32).mean()
    return ExportCheck(
        exact=compared.exact,
        rounded=compared.rounded,
        largest_rounding=compared.largest,
        tokens=wanted.shape[0],
        distance=distance_of(found, wanted),
        largest_difference=float(mx.abs(found - wanted).max()),
        same_argmax=float(same),
    )
