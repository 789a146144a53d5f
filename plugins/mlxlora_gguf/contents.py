"""What stands in a GGUF file for each tensor of a model: its type, its blocks, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.api import LazyTensor, ModelError, PackedTensor, listing
from mlxlora_gguf import pack, unpack
from mlxlora_gguf.blocks import GROUP, NUMBERS, TYPES, BlockType
from mlxlora_gguf.unpack import Array
from mlxlora_gguf.writing import OutTensor

AUTO = "auto"

_RUN = 1 << 18  # weights that are changed at a time
_BY_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
#: bits of affine groups -> the smallest type that holds their integers, or comes next to them
_BY_BITS = {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1", 6: "Q8_0", 8: "Q8_0"}


@dataclass
class Cost:
    """How far written numbers are from those of the model.

    Attributes:
        changed: name -> type there, sum of squared differences, sum of squares.
        widths: name -> columns, of those that do not fill the blocks of the wanted type.
    """

    changed: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, kind: BlockType, wanted: Array, written: Array) -> None:
        """Some numbers of a tensor, float32, and what stands for them."""
        _, apart, size = self.changed.get(name, ("", 0.0, 0.0))
        difference = float(np.square(written - wanted, dtype=np.float64).sum())
        self.changed[name] = (
            kind.name,
            apart + difference,
            size + float(np.square(wanted, dtype=np.float64).sum()),
        )

    def notes(self) -> Iterator[str]:
        """A sentence for each type that holds other numbers than the model, and for widths."""
        if self.widths:
            width = next(iter(self.widths.values()))
            yield (
                f"{len(self.widths)} tensors are F16, for {GROUP} does not divide their {width} columns: "
                f"{listing(self.widths, 2)}"
            )
        by_type: dict[str, dict[str, float]] = {}
        for name, (kind, apart, size) in self.changed.items():
            if apart:
                by_type.setdefault(kind, {})[name] = math.sqrt(apart / size) if size else 1.0
        for kind, each in by_type.items():
            worst = max(each, key=lambda name: each[name])
            total = [self.changed[name] for name in each]
            share = math.sqrt(sum(apart for _, apart, _ in total) / (sum(size for *_, size in total) or 1))
            yield (
                f"rounded to {kind}: {len(each)} of the tensors, by {share:.2g} of their size, "
                f"and at most by {each[worst]:.2g} ({worst})"
            )


def out_tensor(name: str, tensor: LazyTensor, wanted: str, cost: Cost) -> OutTensor:
    """A tensor of the model as one of the file.

    Args:
        name: in the file.
        tensor: of the model.
        wanted: name of the type, or ``auto``.
        cost: told of what is lost, when the content is made.

    Raises:
        ModelError: numbers of a kind that no type holds.
    """
    kind = _type(name, tensor, wanted, cost)
    return OutTensor(name, tensor.shape, kind, partial(_content, name, tensor, kind, cost))


def small_tensor(name: str, values: list[float]) -> OutTensor:
    """A vector of numbers, F32."""
    content = np.asarray(values, "<f4").tobytes()
    return OutTensor(name, (len(values),), TYPES[NUMBERS["F32"]], lambda: [content])


def _type(name: str, tensor: LazyTensor, wanted: str, cost: Cost) -> BlockType:
    """The type that a tensor gets; vectors are always F32, for llama.cpp takes no other."""
    if tensor.dtype not in _BY_DTYPE:
        raise ModelError(f"{name} is of type {tensor.dtype}, which no GGUF file of a model has")
    if len(tensor.shape) < 2:
        chosen = "F32"
    elif wanted != AUTO:
        chosen = wanted
    elif (packed := _affine(tensor)) is not None:
        chosen = _BY_BITS[packed.options["bits"]]
    else:
        chosen = _BY_DTYPE[tensor.dtype]
    if tensor.shape[-1] % TYPES[NUMBERS[chosen]].weights:
        cost.widths[name] = tensor.shape[-1]
        chosen = "F16"
    return TYPES[NUMBERS[chosen]]


def _affine(tensor: LazyTensor) -> PackedTensor | None:
    """The groups of a tensor, where it has some that are known here."""
    packed = tensor.packed
    known = packed is not None and packed.quantizer == "affine" and packed.options.get("bits") in _BY_BITS
    return packed if known else None


def _content(name: str, tensor: LazyTensor, kind: BlockType, cost: Cost) -> Iterator[bytes]:
    """The bytes of a tensor, a run of rows at a time."""
    packed = _affine(tensor)
    if packed is not None:
        yield from _from_groups(name, packed, kind, cost)
        return
    array = tensor.read()
    array = array.reshape(1, -1) if array.ndim < 2 else array.reshape(-1, array.shape[-1])
    for rows in _runs(*array.shape):
        yield _from_numbers(name, array[rows], kind, cost).tobytes()


def _runs(count: int, columns: int) -> Iterator[slice]:
    """Some rows after another, so many that the work on them stays small."""
    step = max(1, _RUN // columns)
    return (slice(start, start + step) for start in range(0, count, step))


def _from_numbers(name: str, rows: mx.array, kind: BlockType, cost: Cost) -> Array:
    """Blocks of dense rows (R, columns)."""
    if kind.weights == 1:
        made = pack.dense(kind, rows)
        if rows.dtype != mx.float32 and _BY_DTYPE[str(rows.dtype).rpartition(".")[2]] == kind.name:
            return made  # the same numbers
    wanted = np.array(rows.astype(mx.float32))
    if kind.weights > 1:
        made = pack.rounded(kind, wanted)
    _compare(name, kind, wanted, made, cost)
    return made


def _compare(name: str, kind: BlockType, wanted: Array, made: Array, cost: Cost) -> None:
    """Read written rows again, and note how far they are from what they stand for.

    Raises:
        ModelError: a number that the type cannot hold.
    """
    if kind.weights == 1:
        written = _plain(made, kind)
    else:
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of it is looked at
            written = unpack.dense(kind, made)
    if not np.isfinite(written).all():
        largest = float(np.abs(wanted).max())
        raise ModelError(
            f"{name} has numbers up to {largest:g}, which {kind.name} cannot hold",
            fix="add --set export.type=F32",
        )
    cost.add(name, kind, wanted, written)


def _plain(made: Array, kind: BlockType) -> Array:
    """The numbers in rows of F32, F16 or BF16, float32."""
    if kind.name == "BF16":
        return (made.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return made.view("<f4" if kind.name == "F32" else "<f2").astype(np.float32)


# --- affine groups ------------------------------------------------------------


def _from_groups(name: str, packed: PackedTensor, kind: BlockType, cost: Cost) -> Iterator[bytes]:
    """Blocks of a packed weight: its own integers where the type has room for them, else the next ones."""
    bits, size = packed.options["bits"], packed.options["group_size"]
    words, scales, biases = (packed.parts[part].read() for part in ("weight", "scales", "biases"))
    words, scales, biases = (part.reshape(-1, part.shape[-1]) for part in (words, scales, biases))
    for rows in _runs(words.shape[0], words.shape[1] * 32 // bits):
        steps = pack.integers(np.array(words[rows]), bits)
        # what is shared, for each 32: a larger group is several of them
        scale, bias = (np.repeat(_float32(part[rows]), size // GROUP, axis=-1) for part in (scales, biases))
        yield _group_rows(name, steps, scale, bias, kind, bits, cost).tobytes()


def _float32(part: mx.array) -> Array:
    found: Array = np.array(part.astype(mx.float32))
    return found


def _group_rows(
    name: str, steps: Array, scales: Array, biases: Array, kind: BlockType, bits: int, cost: Cost
) -> Array:
    """Blocks of integers (R, columns) with the scale and bias of each 32, float32."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16), biases.astype(np.float16)
    if kind.name == "Q8_0":
        own = bits == 8 and np.array_equal(biases, -128 * scales)
    else:
        own = kind.weights > 1 and bits <= kind.bits
    exact = np.array_equal(halves[0], scales) and (kind.name == "Q8_0" or np.array_equal(halves[1], biases))
    if own and exact:
        return pack.blocks(kind, steps, *halves)
    grouped = steps.astype(np.float32).reshape(len(steps), -1, GROUP)
    wanted = (grouped * scales[..., None] + biases[..., None]).reshape(len(steps), -1)
    if not own:
        return _from_numbers(name, mx.array(wanted), kind, cost)
    made = pack.blocks(kind, steps, *halves)
    _compare(name, kind, wanted, made, cost)
    return made


def told_type(tensors: list[OutTensor]) -> int:
    """The number that a file states for the type of most of its weights (``general.file_type``)."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + math.prod(tensor.shape)
    most: Any = max(sizes, key=lambda kind: sizes[kind]) if sizes else "F32"
    return _FILE_TYPES[most]


_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 7, "Q5_1": 9, "BF16": 32}
