"""Whether tensors of two files are the same, but for what the type of one of them rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.values import LazyTensor, PackedTensor

#: type of a dense tensor -> how far it may be from what was rounded to it, relative to its size
_ROUNDING = {"float32": 2.0**-22, "float16": 2.0**-10, "bfloat16": 2.0**-7}
#: of a weight whose bits nobody tells
_FEW_BITS = 4
#: of one that is packed in at least as many bits as before, where only scales are rounded
_SCALES = 2.0**-9
_NUMBERS = 1 << 23
#: bits whose integers other formats count from 0 up and down, so that those of fewer bits do not fit
_AROUND_0 = 8


@dataclass(frozen=True)
class Compared:
    """How tensors compare.

    Attributes:
        exact: how many are the same to the bit.
        rounded: how many are not, within what their type explains.
        largest: ‖there - here‖ / ‖here‖ of the one that is rounded most.
    """

    exact: int = 0
    rounded: int = 0
    largest: float = 0.0


def compare(
    here: Mapping[str, LazyTensor],
    there: Mapping[str, LazyTensor],
    shifts: Mapping[str, float],
    told: Callable[[int, int], None],
) -> Compared:
    """Compare the tensors of a model with those that were read again, one after another.

    Args:
        here: what was exported, by name.
        there: what was read, by the same names.
        shifts: what was taken from a tensor to store it, and added to it again.
        told: called with (tensors compared, all).

    Raises:
        ModelError: names that differ, or the first tensor that differs by more than its type explains.
    """
    other = sorted(here.keys() ^ there.keys())
    if other:
        raise ModelError(f"has other tensors, which differ by {listing(other)}")
    roundings = []
    for done, name in enumerate(here, start=1):
        told(done, len(here))
        mx.clear_cache()
        roundings.append(_rounding(name, here[name], there[name], shifts.get(name, 0.0)))
    rounded = [rounding for rounding in roundings if rounding is not None]
    return Compared(len(roundings) - len(rounded), len(rounded), max(rounded, default=0.0))


def _rounding(name: str, here: LazyTensor, there: LazyTensor, shift: float) -> float | None:
    """How far a tensor is rounded, or None where it is the same to the bit.

    Raises:
        ModelError: it differs by more than its type explains.
    """
    want, got = here.read(), there.read()
    if want.shape != got.shape:
        raise ModelError(f"{name} is {got.shape}, wanted {want.shape}")
    mx.eval(want, got)
    if all(mx.array_equal(one, other) for one, other in _pieces(want, got)):
        return None
    apart = distance_of(got, want, abs(shift) * math.sqrt(want.size))
    allowed, why = _explained(here, there, shifted=bool(shift))
    if not apart <= allowed:
        much = f", where {why} explains {allowed:.2g}" if allowed else ", though its type rounds nothing"
        raise ModelError(f"{name} differs by {apart:.2g} of its size{much}")
    return apart


def distance_of(got: mx.array, want: mx.array, least: float = 0.0) -> float:
    """‖got - want‖ / ‖want‖, or over ``least`` where that is more; 0 of two that are nothing."""
    apart = size = 0.0
    for one, other in _pieces(want, got):
        size += float(mx.square(one).sum())
        apart += float(mx.square(other - one).sum())
    size = max(math.sqrt(size), least)
    return math.sqrt(apart) / size if size else (0.0 if apart == 0.0 else math.inf)


def _pieces(one: mx.array, other: mx.array) -> Iterator[tuple[mx.array, mx.array]]:
    """Both arrays in float32, so many numbers at a time that this does not count."""
    one, other = one.reshape(-1), other.reshape(-1)
    for start in range(0, one.size, _NUMBERS):
        part = slice(start, start + _NUMBERS)
        yield one[part].astype(mx.float32), other[part].astype(mx.float32)


def _explained(here: LazyTensor, there: LazyTensor, *, shifted: bool) -> tuple[float, str]:
    """By how much two tensors may differ, and what by."""
    if there.packed is not None:
        return _explained_by_bits(here.packed, there.packed)
    if there.expanded:
        return 4 * 2.0**-_FEW_BITS, "a packed weight"
    same = here.dtype == there.dtype and here.packed is None
    exact = (same or there.dtype == "float32") and not shifted
    return (0.0 if exact else _ROUNDING.get(there.dtype, 0.0)), there.dtype


def _explained_by_bits(here: PackedTensor | None, there: PackedTensor) -> tuple[float, str]:
    """By how much a weight may be off that is packed."""
    if here is not None and here.quantizer == there.quantizer:
        anew = _is_around_0(there) and not _is_around_0(here)
        if here.options == there.options and not anew:
            types = [{n: part.dtype for n, part in weight.parts.items()} for weight in (here, there)]
            return (0.0, "") if types[0] == types[1] else (_SCALES, "other types of its parts")
        if _bits(here) <= _bits(there) < _AROUND_0:
            return _SCALES, f"{_bits(there)} bits for {_bits(here)}"
    return 4 * 2.0 ** -_bits(there), f"{_bits(there)} bits a weight"


def _is_around_0(weight: PackedTensor) -> bool:
    """Whether the integers of a weight count from 0 up and down: what they share has no offset of its own."""
    if _bits(weight) < _AROUND_0 or not weight.parts.keys() >= {"scales", "biases"}:
        return False
    scales, biases = (weight.parts[part].read().astype(mx.float32) for part in ("scales", "biases"))
    return bool(mx.array_equal(biases, -(2.0 ** (_bits(weight) - 1)) * scales).item())


def _bits(weight: PackedTensor) -> int:
    """Bits a weight, where the options tell."""
    bits = weight.options.get("bits", _FEW_BITS)
    return bits if type(bits) is int else _FEW_BITS
