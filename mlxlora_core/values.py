"""What the functions of a plugin take and give: plain values, and what objects must be able to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a checkpoint that has not been read.

    Attributes:
        shape: its dimensions.
        dtype: ``float16``, ``bfloat16``, ``float32`` and so on.
        read: reads it; what it returns is not kept anywhere else. A packed weight is
            expanded to float32.
        packed: the weight in fewer bits, where the checkpoint stores it so; it stands for
            what ``read`` gives, so a tensor that is made of another one with the functions of
            :mod:`mlxlora_core.files` for rows keeps it, and one with a ``read`` of its own has none.
        expanded: whether the checkpoint stores it in fewer bits, in a form that no quantizer has:
            quantizing the model takes it, be it the head or the embedding.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], mx.array]
    packed: PackedTensor | None = None
    expanded: bool = False


@dataclass(frozen=True)
class PackedTensor:
    """A weight as a quantizer packs it.

    Attributes:
        quantizer: name of the quantizer, such as ``affine``.
        options: its options for this weight.
        parts: the quantizer's name of each part -> the part. The first axis of each goes
            along the outputs, so that rows of the weight are rows of its parts.
    """

    quantizer: str
    options: Mapping[str, Any]
    parts: Mapping[str, LazyTensor]


@dataclass(frozen=True)
class PackedProduct:
    """Products with a weight (outputs, inputs) that stays packed.

    Attributes:
        times: outputs (..., outputs) of inputs (..., inputs), in their type; it needs no gradient.
        times_back: of (..., outputs) the product (..., inputs) with the weight itself, which is what
            the gradient of ``times`` takes; None where there is none, and the weight is expanded.
        most_rows: how many rows ``times`` is good for; None for any number.
    """

    times: Callable[[mx.array], mx.array]
    times_back: Callable[[mx.array], mx.array] | None = None
    most_rows: int | None = None


#: plain file name -> the file, or its contents where a checkpoint keeps it inside another one
TokenizerFiles = Mapping[str, "Path | bytes"]


@dataclass(frozen=True)
class ForeignModel:
    """What a weight loader opened.

    Attributes:
        config: the model's own description, as the checkpoint spells it.
        tokenizer: the files that the tokenizer is opened from; a model folder keeps
            copies under these names.
        tensors: name -> tensor, in the order in which reading is cheapest.
        notes: what was done to the checkpoint that its owner may not expect, such as
            names that were shortened: a sentence each, told when it is converted.
        layout: whose spelling of config and tensors this is: ``hf`` (Hugging Face and
            mlx-lm), ``gguf``, or nothing for the one that the architecture calls its own.
    """

    config: Mapping[str, Any]
    tokenizer: TokenizerFiles
    tensors: Mapping[str, LazyTensor]
    notes: Sequence[str] = ()
    layout: str = ""


@dataclass(frozen=True)
class ForeignTensor:
    """A parameter of a model as another library stores it.

    Attributes:
        name: of the parameter here.
        foreign: of the tensor there.
        rows: for each row here which one it is there, or None where they are in the same order.
        start: the first row there, of a tensor in which several parameters stand one
            above the other; None where the whole tensor is this parameter.
        shift: what is added to the tensor there to have the parameter here.
    """

    name: str
    foreign: str
    rows: Sequence[int] | None = None
    start: int | None = None
    shift: float = 0.0


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
    """Text <-> token ids, and conversations in the form that the model was tuned with.

    Three more attributes it may have: ``chat_form``, the form of :meth:`render` in words
    ("the form of Llama 2"), ``chat_warning``, what speaks against that form, and
    ``special_texts``, a frozenset of how the tokens are written that are no ordinary text
    ("<s>"). People are told of conversations and of rows that hold such texts by them.
    """

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

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> Sequence[Piece]:
        """A conversation of ``{"role": ..., "content": ...}`` messages, in order.

        After a last message that is not the assistant's the pieces end where the answer
        would begin. They are then a prefix of those of the same conversation with an
        answer, so that generation is told what training was told.

        Args:
            messages: roles are ``system``, ``user``, ``assistant`` and ``tool``. One of the
                assistant may have ``tool_calls``, and then needs no content, and the text of its
                reasoning; one of a tool may have ``tool_call_id`` and ``name``.
            tools: JSON schemas of functions that the assistant may call.

        Raises:
            DataError: a conversation that this form cannot say.
        """


class Cache(Protocol):
    """Keys and values of the tokens that one layer has seen."""

    @property
    def offset(self) -> int:
        """Tokens held."""

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, K, T, E) keys and values; return all of them."""


@dataclass(frozen=True)
class Place:
    """Where a linear stands in a model.

    Attributes:
        path: of the module, such as ``layers.3.attention.wq``.
        layer: which of ``model.layers`` it is in, or None when it is in none.
        shape: of its weight: (outputs, inputs), with the experts in front of a stacked one, and
            (V, D) of an embedding.
        kind: ``linear`` or ``embedding``.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]
    kind: str = "linear"


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of a linear: its outputs get ``scale · (x @ a) @ b`` more.

    Attributes:
        a: (inputs, R); of an embedding (V, R).
        b: (R, outputs); of an embedding (R, D).
        scale: factor on the update.
    """

    a: mx.array
    b: mx.array
    scale: float


@dataclass(frozen=True)
class ForeignAdapter:
    """What an adapter loader opened.

    Attributes:
        adapter: name of the adapter here that computes the same, such as ``lora``.
        options: of the adapter here.
        linears: module path there -> name of a parameter of the wrapped module here -> tensor, in
            the orientation that it has here, its outputs still ordered as there.
        outputs: name of a parameter -> its axis that goes along the outputs of the linear; those
            that have none are not named.
        inputs: name of a parameter that linears of several sizes share -> its axis that goes along
            the inputs, of which each linear takes as many as it has, from the first on.
        overrides: module path there -> options that differ there.
        unstated: options that decide what it computes and that the files do not tell.
        layout: whose names these are: ``hf``, ``gguf``, or nothing for the architecture's own.
        embedding_alone: whether an update of the embedding leaves an output head as it is that is
            the embedding too; here it changes both.
        notes: what was assumed, in words.
    """

    adapter: str
    options: Mapping[str, Any]
    linears: Mapping[str, Mapping[str, LazyTensor]]
    outputs: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, int] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unstated: tuple[str, ...] = ()
    layout: str = "hf"
    embedding_alone: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        content: ``{"text": str}``, ``{"prompt": str, "completion": str}`` or
            ``{"messages": [{"role": str, "content": str}, ...]}``, the last with
            ``tools`` where the assistant has some.
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


Transform = Callable[["mx.array", Sequence[int]], "mx.array"]


@dataclass(frozen=True)
class ExportAdapter:
    """The adapter of a model that is exported, beside the weights that it is fused into.

    Attributes:
        name: full id of the adapter.
        options: its options, as plain values.
        paths: module paths of the linears that it changes.
        tensors: name -> parameter of the adapter, as an adapter file holds it.
        metadata: what its file says of itself, to be kept where there is a place for it.
        overrides: path -> options that differ there.
        low_rank: path -> its update of that linear, where that is a low-rank one and nothing else.
        places: path -> the weight of that linear in the layout that the exporter asked for.
        heights: name there -> rows of a weight there that holds those of several linears.
        layers: how many the model has.
    """

    name: str
    options: Mapping[str, Any]
    paths: tuple[str, ...]
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    places: Mapping[str, ForeignTensor] = field(default_factory=dict)
    heights: Mapping[str, int] = field(default_factory=dict)
    layers: int = 0


@dataclass(frozen=True)
class ExportSource:
    """A model to export.

    Attributes:
        config: of a dense model, as the exporter's layout spells it: it says nothing of quantization.
        tokenizer: the files that the tokenizer is opened from.
        tensors: name in the exporter's layout -> tensor, the adapter's change in it, in the
            type that the base stores (a quantized weight: that of its first part with
            floating-point numbers in it, or float32); packed where the exporter takes it so.
        adapter: what was fused into the tensors, or what is exported alone, or None.
        stops: ids of which each ends a text.
        vocab_size: rows of the embedding, V, which may be more than the tokenizer has tokens.
        base: what the model was opened from, in words: a path, or a name on the Hub.
        card: lines of Markdown on where the model comes from and how it was tuned.
    """

    config: Mapping[str, Any]
    tokenizer: TokenizerFiles
    tensors: Mapping[str, LazyTensor]
    adapter: ExportAdapter | None = None
    stops: frozenset[int] = frozenset()
    vocab_size: int = 0
    base: str = ""
    card: str = ""


@dataclass(frozen=True)
class Answer:
    """What a model says to a test row, for evaluators.

    Attributes:
        prompt: what was asked: the prompt of a ``{prompt, completion}`` row, or the last that was
            said before the answer in a ``{messages}`` row.
        expected: what the row says, as the tokenizer can say it: what a model that has learned
            the row answers to the letter.
        text: what the model says.
        ended: whether the model ended it, rather than the limit on its tokens.
        row: the row, in one of the two shapes.
    """

    prompt: str
    expected: str
    text: str
    ended: bool
    row: Mapping[str, Any]
