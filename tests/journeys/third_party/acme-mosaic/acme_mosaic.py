"""The family ``mosaic``: fused attention, half-split rotary positions and a mixture; and its files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.api import (
    Architecture,
    ForeignModel,
    LazyTensor,
    ModelError,
    NoOptions,
    WeightLoader,
    hookimpl,
    option,
    parse,
)
from mlxlora_core.files import read_json

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxlora_core.ops import LanguageModel

# --- its files: NAME.npz, NAME.json beside it, and bytes.json -----------------------------------


def detect(path: Path) -> bool:
    """An .npz file with its description beside it."""
    return path.suffix == ".npz" and path.is_file() and path.with_suffix(".json").is_file()


def open_file(path: Path, options: NoOptions) -> ForeignModel:
    """The checkpoint whose tensors are in the file ``path``."""
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = {name.removesuffix(".npy"): _lazy(path, archive, name) for name in archive.namelist()}
    except (OSError, ValueError, zipfile.BadZipFile) as fault:
        raise ModelError(f"cannot be read ({fault})", where=path) from None
    tokenizer = path.with_name("bytes.json")
    if not tokenizer.is_file():
        raise ModelError("there is no such file", where=tokenizer)
    return ForeignModel(read_json(path.with_suffix(".json"), 1 << 20), {"bytes.json": tokenizer}, tensors)


def _lazy(path: Path, archive: zipfile.ZipFile, name: str) -> LazyTensor:
    from numpy.lib import format as npy

    with archive.open(name) as member:
        npy.read_magic(member)
        shape, _, dtype = npy.read_array_header_1_0(member)
    return LazyTensor(shape, str(dtype), partial(_read, path, name))


def _read(path: Path, name: str) -> mx.array:
    import mlx.core as mx
    from numpy.lib import format as npy

    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as member:
            array = npy.read_array(member, allow_pickle=False)
            member.read()  # to the end, where zipfile holds the bytes against their checksum
    except (OSError, ValueError, zipfile.BadZipFile) as fault:
        raise ModelError(f"{name}: cannot be read ({fault})", where=path) from None
    return mx.array(array)


# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """What config.json holds."""

    width: int = option(help="width", minimum=1, maximum=1 << 20)
    layers: int = option(help="layers", minimum=1, maximum=1024)
    heads: int = option(help="heads", minimum=1, maximum=1 << 16)
    experts: int = option(help="experts of a layer", minimum=1, maximum=1 << 16)
    chosen: int = option(help="experts that a token takes", minimum=1, maximum=1 << 16)
    hidden: int = option(help="width of an expert", minimum=1, maximum=1 << 20)
    vocabulary: int = option(help="vocabulary", minimum=1, maximum=1 << 24)

    def __post_init__(self) -> None:
        """Refuse heads that do not divide, and more experts than there are."""
        if self.width % (2 * self.heads):
            raise ValueError(f"width: got {self.width}, wanted an even number for each of {self.heads} heads")
        if self.chosen > self.experts:
            raise ValueError(f"chosen: got {self.chosen}, wanted at most {self.experts} experts")


KEYS = {
    "width": "d_model",
    "layers": "n_blocks",
    "heads": "n_heads",
    "experts": "n_experts",
    "chosen": "k_experts",
    "hidden": "d_expert",
}
NAMES = {"embed.weight": "tokens.weight", "final.weight": "norm.weight", "lm_head.weight": "output.weight"}
EXPERT_PARTS = ("gate", "up", "down")


def read(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Args | None:
    """The arguments out of NAME.json."""
    if raw.get("model_type") != "mosaic":
        return None
    values = {name: raw[key] for name, key in KEYS.items() if key in raw}
    if "embed.weight" in shapes:
        values["vocabulary"] = shapes["embed.weight"][0]
    return parse(Args, values, owner="mosaic", spell=lambda name: KEYS.get(name, name), strict=True)


def _projection(fused: LazyTensor, part: int, heads: int) -> mx.array:
    """Query, key or value rows of a fused weight; of queries and keys the halves become neighbours."""
    rows = fused.read().split(3)[part]
    if part == 2:
        return rows
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _stack(parts: list[LazyTensor]) -> mx.array:
    import mlx.core as mx

    return mx.stack([part.read() for part in parts])


def tensors(found: Mapping[str, LazyTensor], args: Args) -> dict[str, LazyTensor]:
    """Split what is fused, stack what is apart, rename the rest."""
    made = {}
    for name, tensor in found.items():
        block = name.split(".attn.")[0].replace("blocks.", "layers.")
        if name.endswith(".attn.qkv.weight"):
            shape = (tensor.shape[0] // 3, *tensor.shape[1:])
            for part, called in enumerate(("wq", "wk", "wv")):
                take = partial(_projection, tensor, part, args.heads)
                made[f"{block}.attention.{called}.weight"] = LazyTensor(shape, tensor.dtype, take)
        elif ".moe.experts." not in name:
            plain = name.replace("blocks.", "layers.").replace(".attn.out.", ".attention.wo.")
            made[NAMES.get(name, plain.replace(".moe.", ".mixture."))] = tensor
    for layer in range(args.layers):
        for part in EXPERT_PARTS:
            names = [f"blocks.{layer}.moe.experts.{e}.{part}.weight" for e in range(args.experts)]
            if missing := [name for name in names if name not in found]:
                raise ModelError(f"{missing[0]} is missing")
            parts = [found[name] for name in names]
            shape = (args.experts, *parts[0].shape)
            made[f"layers.{layer}.mixture.{part}.weight"] = LazyTensor(
                shape, parts[0].dtype, partial(_stack, parts)
            )
    return made


def build(args: Args) -> LanguageModel:
    """The model; its classes stand here so that listing plugins does not load MLX."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlxlora_core.ops import (
        KVCache,
        LanguageModel,
        StackedLinear,
        attention,
        rms_norm,
        rotate,
        silu_times,
    )

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wq, self.wk, self.wv, self.wo = (
                nn.Linear(args.width, args.width, bias=False) for _ in range(4)
            )

        def __call__(self, x: mx.array, cache: Any) -> mx.array:
            q, k, v = (self.split(linear(x)) for linear in (self.wq, self.wk, self.wv))
            offset = cache.offset if cache else 0
            q, k = rotate(q, offset, 10000.0), rotate(k, offset, 10000.0)
            if cache:
                k, v = cache.update(k, v)
            mask = None if x.shape[1] == 1 else "causal"
            return self.wo(attention(q, k, v, q.shape[-1] ** -0.5, mask).swapaxes(1, 2).flatten(2))

        def split(self, x: mx.array) -> mx.array:
            return x.reshape(*x.shape[:2], args.heads, -1).swapaxes(1, 2)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(args.width, args.experts, bias=False)
            self.gate = StackedLinear(args.experts, args.width, args.hidden)
            self.up = StackedLinear(args.experts, args.width, args.hidden)
            self.down = StackedLinear(args.experts, args.hidden, args.width)

        def __call__(self, x: mx.array) -> mx.array:
            scores = self.router(x).astype(mx.float32)
            chosen = mx.stop_gradient(mx.argsort(-scores, axis=-1)[..., : args.chosen])
            shares = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1).astype(x.dtype)
            rows = x[..., None, :]
            inner = silu_times(self.gate(rows, chosen), self.up(rows, chosen))
            return (self.down(inner, chosen) * shares[..., None]).sum(axis=-2)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mixture = Attention(), Mixture()
            self.norm1, self.norm2 = nn.RMSNorm(args.width), nn.RMSNorm(args.width)

        def __call__(self, x: mx.array, cache: Any) -> mx.array:
            x = x + self.attention(rms_norm(x, self.norm1.weight, 1e-5), cache)
            return x + self.mixture(rms_norm(x, self.norm2.weight, 1e-5))

    class Model(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.vocab_size, self.context_tokens, self.head_path = args.vocabulary, None, "output"
            self.tokens = nn.Embedding(args.vocabulary, args.width)
            self.layers = [Block() for _ in range(args.layers)]
            self.norm = nn.RMSNorm(args.width)
            self.output = nn.Linear(args.width, args.vocabulary, bias=False)

        def embed(self, tokens: mx.array) -> mx.array:
            return self.tokens(tokens)

        def run(
            self, hidden: mx.array, first: int = 0, last: int | None = None, cache: Any = None
        ) -> mx.array:
            for i, block in list(enumerate(self.layers))[first:last]:
                hidden = block(hidden, cache[i] if cache else None)
            return hidden

        def head(self, hidden: mx.array) -> mx.array:
            return self.output(rms_norm(hidden, self.norm.weight, 1e-5))

        def make_cache(self) -> list[Any]:
            return [KVCache() for _ in self.layers]

    return Model()


@hookimpl
def mlxlora_weight_loaders() -> Iterable[WeightLoader]:
    """The loader."""
    summary = "NAME.npz with NAME.json and bytes.json beside it"
    return [WeightLoader(name="mosaic-npz", summary=summary, detect=detect, open=open_file)]


@hookimpl
def mlxlora_architectures() -> Iterable[Architecture]:
    """The family."""
    return [
        Architecture(
            name="mosaic",
            summary="a mixture of experts with fused attention",
            model_types=("mosaic",),
            args=Args,
            read=read,
            tensors=tensors,
            build=build,
            default_targets=("wq", "wv", "mixture.up"),
        )
    ]
