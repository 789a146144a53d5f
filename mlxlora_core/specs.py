"""What a plugin hands over: one frozen dataclass a kind.

A spec is light: a name, a sentence, an options dataclass and plain functions.
The functions import what is heavy inside themselves, so that listing and
explaining components loads neither mlx nor torch.

Shape letters used here and everywhere: B batch, T tokens, D width, H heads,
K kv heads, E head width, F mlp width, V vocabulary, L layers, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlxlora_core.options import NoOptions

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from mlxlora_core.model.language_model import LanguageModel


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
        tokenizer: plain file name -> path of each file that the tokenizer is opened
            from; a model folder keeps copies under these names.
        tensors: name -> tensor, in the order in which reading is cheapest.
    """

    config: Mapping[str, Any]
    tokenizer: Mapping[str, Path]
    tensors: Mapping[str, LazyTensor]


@dataclass(frozen=True, kw_only=True)
class WeightLoader(Spec):
    """Reads a foreign checkpoint.

    Attributes:
        detect: whether a path, of a folder or a file, looks like this loader's;
            must not read tensors.
        open: the checkpoint at a path. Memory in use while its tensors are
            read one after another must not grow with the model, no code found
            in a file may run, and a missing or damaged part is an error.
    """

    detect: Callable[[Path], bool]
    open: Callable[[Path, Any], ForeignModel]


# --- tokenizers ---------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A part of a conversation in token ids.

    Attributes:
        ids: token ids, begin and end ids among them.
        answer: whether it is what the assistant says, its end id included.
    """

    ids: tuple[int, ...]
    answer: bool


class Tokenizer(Protocol):
    """Text <-> token ids, and conversations in the form that the model was tuned with."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are; they go from 0 up to this."""

    @property
    def bos(self) -> int | None:
        """The id that begins a text, or None where texts begin without one."""

    @property
    def stops(self) -> frozenset[int]:
        """The ids of which each ends a text; one at least."""

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text has."""

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Ids of a text; the begin id, if there is one, in front, and if asked an end id behind.

        What looks like a special token in a text is text.

        Raises:
            DataError: half a surrogate pair, which no tokenizer has a token for.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; begin and end ids, and ids beyond the vocabulary, are no text."""

    def stream(self, ids: Iterable[int], every: int = 1) -> Iterator[str]:
        """The text of ids that follow others, in segments, one after every ``every`` ids.

        The segments joined are the text of all ids. None is empty, and none
        ends inside a character.
        """

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Piece]:
        """A conversation of ``{"role": ..., "content": ...}`` messages, in order.

        After a last message of the user the pieces end where the answer would
        begin. They are then a prefix of those of the same conversation with an
        answer, so that generation is told what training was told.

        Raises:
            DataError: a conversation that this form cannot say.
        """


@dataclass(frozen=True, kw_only=True)
class TokenizerLoader(Spec):
    """Opens a tokenizer.

    Attributes:
        detect: whether these files, by their names and first bytes, are this kind
            of tokenizer's; never raises.
        open: the tokenizer in files named as a checkpoint names them. No code
            found in a file may run.
    """

    detect: Callable[[Mapping[str, Path]], bool]
    open: Callable[[Mapping[str, Path], Any], Tokenizer]


# --- architectures ------------------------------------------------------------


class Cache(Protocol):
    """Keys and values of the tokens that one layer has seen."""

    @property
    def offset(self) -> int:
        """Tokens held."""

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, K, T, E) keys and values; return all of them."""


@dataclass(frozen=True, kw_only=True)
class Architecture(Spec):
    """A model family.

    Attributes:
        model_types: the values of ``model_type`` in config.json that it builds.
        args: the model's arguments, a frozen dataclass made with
            :func:`mlxlora_core.api.option`: exactly what config.json holds. A
            number that something is built or allocated by has a ``maximum``.
        read: the arguments out of a foreign config and the shapes of the foreign
            tensors by their foreign names, to derive what the config leaves out;
            None for the config of something else.
        tensors: the model's tensors, by its parameters' names, made of those of
            the checkpoint: renamed, permuted, split, stacked. Nothing is read
            before a result's ``read`` is called. Names that it does not know
            pass unchanged; what the model does not need is left out.
        build: a model with uninitialised parameters.
        default_targets: names of the linears that adapters take when nobody says
            which; empty for every one in a layer.
    """

    model_types: tuple[str, ...]
    args: type[Any]
    read: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Any]
    tensors: Callable[[Mapping[str, LazyTensor], Any], Mapping[str, LazyTensor]]
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


# --- exporters ----------------------------------------------------------------


@dataclass(frozen=True)
class ExportAdapter:
    """The adapter of a model that is exported, beside the weights that it is fused into.

    Attributes:
        name: full id of the adapter.
        options: its options, as plain values.
        paths: module paths of the linears that it changes.
        tensors: name -> parameter that was trained, as an adapter file holds it.
        metadata: what its file says of itself, to be kept where there is a place for it.
    """

    name: str
    options: Mapping[str, Any]
    paths: tuple[str, ...]
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportSource:
    """A model to export.

    Attributes:
        config: config.json of a dense model: it says nothing of quantization.
        tokenizer: file name -> file that the tokenizer is opened from.
        tensors: parameter name -> tensor, dense, the adapter's change in it, in the
            type that the base stores (a quantized weight: the type of its scales).
        adapter: what was fused into the tensors, or None.
    """

    config: Mapping[str, Any]
    tokenizer: Mapping[str, Path]
    tensors: Mapping[str, LazyTensor]
    adapter: ExportAdapter | None = None


@dataclass(frozen=True, kw_only=True)
class Exporter(Spec):
    """Writes a model in the form that another tool reads.

    Attributes:
        export: write the files of a model into an empty folder, which becomes
            the target when all is written. Memory in use must not grow with the
            model: tensors are read one after another and let go.
    """

    export: Callable[[ExportSource, Path, Any], None]


# --- observers ----------------------------------------------------------------


@dataclass(frozen=True)
class RunInfo:
    """A training that begins.

    Attributes:
        folder: where a file of the observer's own goes.
        name: of the recipe, or of the adapter file.
        config: every setting, section by section, as plain values.
        stem: what a file of the observer's own is called, without an ending.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    stem: str = "metrics"


class Watcher(Protocol):
    """What an observer starts: it is told of one run."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Something has happened: a mapping of plain values with ``kind``."""

    def end(self, how: str) -> None:
        """The run has ended: ``done``, ``interrupted`` or ``failed: ...``. Called once, at last."""


@dataclass(frozen=True, kw_only=True)
class Observer(Spec):
    """Watches a training.

    Attributes:
        start: called when the training begins. What it, or the watcher, raises
            is told once as a warning; the training goes on without it.
    """

    start: Callable[[RunInfo, Any], Watcher]


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
