"""What a plugin hands over: one frozen dataclass a kind.

A spec is light: a name, a sentence, an options dataclass and plain functions.
The functions import what is heavy inside themselves, so that listing and
explaining components loads neither mlx nor torch.

Shape letters used here and everywhere: B batch, T tokens, D width, H heads,
K kv heads, E head width, F mlp width, V vocabulary, L layers, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlxlora_core.options import NoOptions

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What all kinds have in common.

    Attributes:
        name: lower case letters, digits and hyphens; what a recipe writes after ``use =``.
        summary: one sentence for listings.
        options: the dataclass of its options, made with :func:`mlxlora_core.api.option`.
    """

    name: str
    summary: str
    options: type[Any] = NoOptions


# --- weight loaders -----------------------------------------------------------


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a checkpoint that has not been read.

    Attributes:
        shape: its dimensions.
        dtype: ``float16``, ``bfloat16``, ``float32`` and so on.
        read: reads it; what it returns is not kept anywhere else.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], mx.array]


@dataclass(frozen=True)
class ForeignModel:
    """What a weight loader opened.

    Attributes:
        config: the model's own description, as the checkpoint spells it.
        tokenizer_file: a SentencePiece model.
        tensors: name -> tensor, in the order in which reading is cheapest.
    """

    config: Mapping[str, Any]
    tokenizer_file: Path
    tensors: Mapping[str, LazyTensor]


@dataclass(frozen=True, kw_only=True)
class WeightLoader(Spec):
    """Reads a foreign checkpoint.

    Attributes:
        detect: whether a folder looks like this loader's; must not read tensors.
        open: the checkpoint in a folder. Memory in use while its tensors are
            read one after another must not grow with the model, no code found
            in a file may run, and a missing or damaged part is an error.
    """

    detect: Callable[[Path], bool]
    open: Callable[[Path, Any], ForeignModel]


# --- architectures ------------------------------------------------------------


class Cache(Protocol):
    """Keys and values of the tokens that one layer has seen."""

    @property
    def offset(self) -> int:
        """Tokens held."""

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, K, T, E) keys and values; return all of them."""


class LanguageModel(Protocol):
    """What an architecture builds: an ``mlx.nn.Module`` with these members.

    ``model(tokens)`` must equal ``model.head(model.run(model.embed(tokens)))``.

    Attributes:
        layers: the blocks, bottom first; adapters go into the linears inside them.
        head_path: module path of the output head, or nothing when it is tied
            to the embedding.
        vocab_size: V.
        context_tokens: longest sequence it was made for, or None.
    """

    layers: list[nn.Module]
    head_path: str
    vocab_size: int
    context_tokens: int | None

    def __call__(self, tokens: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Logits (B, T, V) of token ids (B, T)."""

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings (B, T, D) of token ids (B, T)."""

    def run(
        self,
        hidden: mx.array,
        first: int = 0,
        last: int | None = None,
        cache: Sequence[Cache] | None = None,
    ) -> mx.array:
        """Hidden states (B, T, D) after layers ``first`` up to, not including, ``last``."""

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D), final norm included."""

    def make_cache(self) -> list[Cache]:
        """An empty cache, one entry a layer."""


@dataclass(frozen=True, kw_only=True)
class Architecture(Spec):
    """A model family.

    Attributes:
        model_types: the values of ``model_type`` in config.json that it builds.
        detect: the model_type of a checkpoint config that states none, or None.
        config: checked model arguments, as a frozen dataclass whose fields are
            what config.json holds. ``shapes`` has the shape of each tensor by
            its name in the model, to derive what the config leaves out; it is
            empty when the config is one that mlxlora wrote.
        rename: the name in the model of a tensor of the checkpoint, or None for
            one that the model does not need. Unknown names pass unchanged.
        build: a model with uninitialised parameters.
        default_targets: names of the linears that adapters take when nobody says
            which; empty for every one in a layer.
    """

    model_types: tuple[str, ...]
    detect: Callable[[Mapping[str, Any]], str | None]
    config: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Any]
    rename: Callable[[str], str | None]
    build: Callable[[Any], LanguageModel]
    default_targets: tuple[str, ...] = ()


# --- adapters -----------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a linear stands in a model.

    Attributes:
        path: of the module, such as ``layers.3.attention.wq``.
        layer: which of ``model.layers`` it is in, or None when it is in none.
        shape: of its weight: (outputs, inputs), with the experts in front of a stacked one.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Adapter(Spec):
    """A trainable change to frozen linears.

    Attributes:
        wrap: a module that computes the linear's output plus the adapter's, the
            same as the linear at the start; None for a linear that is not the
            adapter's to change. The module keeps the linear as its child
            ``linear``, frozen; every parameter that it adds trains.
        fuse: the weight, float32, of one dense linear that does what the wrapped
            module does, given the weight of the linear inside it, of the same shape.
    """

    wrap: Callable[[nn.Module, Place, Any], nn.Module | None]
    fuse: Callable[[nn.Module, mx.array], mx.array]


# --- quantizers ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Quantizer(Spec):
    """Stores the weight of a linear in fewer bits.

    A weight is (outputs, inputs), or (experts, outputs, inputs) of a stacked linear.

    Attributes:
        parts: names of the tensors that it makes of a weight.
        quantize: the parts, or None to leave this weight as it is.
        dequantize: the weight, float32, that the parts stand for.
        matmul: outputs (..., outputs) of inputs (..., inputs), straight from the
            parts of a weight (outputs, inputs), or None for a quantizer without
            such a product. It is used on a GPU, and on a CPU for a single row;
            elsewhere the weight is dequantized.
    """

    parts: tuple[str, ...]
    quantize: Callable[[mx.array, Any], Mapping[str, mx.array] | None]
    dequantize: Callable[[Mapping[str, mx.array], Any], mx.array]
    matmul: Callable[[mx.array, Mapping[str, mx.array], Any], mx.array] | None = None


# --- dataset builders ---------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        content: ``{"text": str}``, ``{"prompt": str, "completion": str}`` or
            ``{"messages": [{"role": str, "content": str}, ...]}``.
        group: rows of one group never stand in two splits; nothing is a group
            of its own.
        split: ``train``, ``valid`` or ``test``, when the source has settled it.
    """

    content: Mapping[str, Any]
    group: str = ""
    split: str | None = None


@dataclass(frozen=True)
class Skipped:
    """A source, or a part of one, that gave no row, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Rows:
    """What a dataset builder made.

    Attributes:
        rows: in an order that depends on the sources and options alone.
        skipped: everything that was left out.
        versions: source -> version, for the record.
    """

    rows: Sequence[Row]
    skipped: Sequence[Skipped] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DatasetBuilder(Spec):
    """Makes training rows out of something.

    Attributes:
        build: the rows; the same options and sources give the same rows.
        inputs: what ``build`` would read, told cheaply: source -> version, or
            size and time. ``mlxlora run`` builds again when this changes.
    """

    build: Callable[[Any], Rows]
    inputs: Callable[[Any], Mapping[str, str]]


# --- samplers -----------------------------------------------------------------

Transform = Callable[["mx.array", Sequence[int]], "mx.array"]


@dataclass(frozen=True, kw_only=True)
class Sampler(Spec):
    """Says how likely each next token is; mlxlora draws it.

    Attributes:
        build: a function ``transform(logits, tokens)`` from logits (B, V) in
            float32 and the ids so far to logits (B, V) in float32, of which -inf
            forbids a token. It is called once a text, so that what it gives may
            keep state; it draws nothing at random itself.
    """

    build: Callable[[Any], Transform]


# --- runtimes and recipes -----------------------------------------------------


@dataclass(frozen=True)
class RuntimeNote:
    """What a runtime has to say, in one line.

    Attributes:
        text: what is in force, or what went wrong.
        warning: whether the user should be told unasked.
        set_threads: sets how many threads each matrix product takes from now
            on, where the runtime can; mlxlora calls it between computations.
        exp: the exponential of a float32 array of any shape on the CPU, where the
            runtime has a faster one than MLX's; mlxlora never differentiates it.
    """

    text: str
    warning: bool = False
    set_threads: Callable[[int], None] | None = None
    exp: Callable[[mx.array], mx.array] | None = None


@dataclass(frozen=True, kw_only=True)
class Runtime(Spec):
    """Prepares the machine before MLX computes anything.

    Attributes:
        start: called once a process. Returns a note, or None when the runtime
            has no business on this machine.
    """

    start: Callable[[], RuntimeNote | None]


@dataclass(frozen=True, kw_only=True)
class RecipeFile(Spec):
    """A recipe that ships with a plugin: ``mlxlora run NAME``.

    Attributes:
        path: the recipe.toml; paths inside it are relative to its folder.
    """

    path: Path
