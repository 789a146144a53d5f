"""IA3 and VeRA of PEFT, as adapters here: what trains is vectors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.api import ForeignAdapter, LazyTensor, ModelError, listing
from mlxlora_core.files import show_value
from mlxlora_peft import config as configs
from mlxlora_peft.low_rank import transposed
from mlxlora_peft.names import IA3, PROJECTIONS, VERA_B, VERA_D, Held

if TYPE_CHECKING:
    import mlx.core as mx

#: what the last linear of a feed-forward block is called, whose inputs IA3 scales
_LAST = "down_proj"
#: linears whose outputs are fused or ordered otherwise there: factors on their inputs are not told apart
_TURNED = ("q_proj", "k_proj", "qkv_proj", "gate_up_proj")


def ia3(config: Mapping[str, Any], held: Held, where: Path) -> ForeignAdapter:
    """The adapter that a config and tensors of ``peft_type`` IA3 are.

    A factor an input is (1, inputs) there, one an output (outputs, 1).

    Raises:
        ModelError: vectors that are none, or factors on inputs where nobody has them.
    """
    vectors = {path: parts[IA3] for path, parts in held.modules.items() if IA3 in parts}
    odd = [f"{path} {v.shape}" for path, v in vectors.items() if len(v.shape) != 2 or 1 not in v.shape]
    if odd or len(vectors) < len(held.modules):
        raise ModelError(f"has vectors that are neither (1, inputs) nor (outputs, 1): {listing(odd, 4)}")
    inputs = {path for path, vector in vectors.items() if vector.shape[0] == 1}
    turned = sorted(path for path in inputs if path.endswith(_TURNED))
    if turned:
        raise ModelError(f"scales the inputs of {listing(turned, 4)}, which nothing here does")
    modules = configs.names(config, "feedforward_modules", where)
    wrong = [
        path for path in vectors if config and (path in inputs) != path.endswith(tuple(modules) or ("\0",))
    ]
    if wrong:
        what = f"feedforward_modules is {show_value(config.get('feedforward_modules'))}"
        raise ModelError(f"{what}, which the vectors of {listing(wrong, 4)} are not", where=where)
    return ForeignAdapter(
        adapter="ia3",
        options={},
        linears={path: {"ia3_l": _flat(vector)} for path, vector in vectors.items()},
        outputs={"ia3_l": 0},
        overrides={
            path: {"scales": "inputs" if path in inputs else "outputs"}
            for path in vectors
            if (path in inputs) != path.endswith(_LAST)
        },
    )


def vera(config: Mapping[str, Any], held: Held, where: Path) -> ForeignAdapter:
    """The adapter that a config and tensors of ``peft_type`` VERA are.

    All modules share two projections, of which each takes the first columns and rows that it needs.

    Raises:
        ModelError: the projections are not in the file, or parts are missing or do not fit.
    """
    absent = [name for name in PROJECTIONS if name not in held.projections]
    if absent:
        what = f"lacks {listing(absent)}: without them it depends on the random numbers of torch"
        raise ModelError(what, fix="save it with save_projection=True")
    a, b = (held.projections[name] for name in PROJECTIONS)
    alone = [f"{p}.{n}" for p, parts in held.modules.items() for n in (VERA_B, VERA_D) if n not in parts]
    if alone:
        raise ModelError(f"lacks {listing(alone, 4)}")
    if not len(a.shape) == len(b.shape) == 2 or a.shape[0] != b.shape[1]:
        raise ModelError(f"has projections of shapes {a.shape} and {b.shape}, which are no product")
    odd = [f"{path} {_shapes(parts)}" for path, parts in held.modules.items() if not _fits(parts, a, b)]
    if odd:
        raise ModelError(f"has vectors that do not fit its projections: {listing(odd, 4)}")
    rank = configs.number(config, "r", a.shape[0], where)
    if rank != a.shape[0]:
        raise ModelError(f"r is {show_value(rank)}, but the projections have {a.shape[0]}", where=where)
    first, second = transposed(a), transposed(b)
    options = {"rank": a.shape[0], "dropout": configs.share(config, "vera_dropout", where)}
    if config.get("d_initial"):
        options["d_initial"] = configs.number(config, "d_initial", 0.1, where, least=-1e9)
    cut: dict[int, LazyTensor] = {}
    linears = {}
    for path, parts in held.modules.items():
        outputs = parts[VERA_B].shape[0]
        cut[outputs] = cut.get(outputs) or _columns(second, outputs)
        linears[path] = {"lambda_b": parts[VERA_B], "lambda_d": parts[VERA_D], "vera_b": cut[outputs]}
    return ForeignAdapter(
        adapter="vera",
        options=options,
        linears={path: {**tensors, "vera_a": first} for path, tensors in linears.items()},
        outputs={"lambda_b": 0, "vera_b": 1},
        inputs={"vera_a": 0},
    )


def _shapes(parts: Mapping[str, LazyTensor]) -> str:
    return f"{parts[VERA_B].shape} and {parts[VERA_D].shape}"


def _fits(parts: Mapping[str, LazyTensor], a: LazyTensor, b: LazyTensor) -> bool:
    outputs, inner = parts[VERA_B].shape, parts[VERA_D].shape
    return inner == a.shape[:1] and len(outputs) == 1 and outputs[0] <= b.shape[0]


def _flat(tensor: LazyTensor) -> LazyTensor:
    """A matrix with one axis of 1 as a vector."""

    def read() -> mx.array:
        return tensor.read().reshape(-1)

    return LazyTensor((max(tensor.shape),), tensor.dtype, read)


def _columns(tensor: LazyTensor, count: int) -> LazyTensor:
    """The first ``count`` columns of a matrix."""

    def read(count: int) -> mx.array:
        return tensor.read()[:, :count]

    return LazyTensor((tensor.shape[0], count), tensor.dtype, partial(read, count))
