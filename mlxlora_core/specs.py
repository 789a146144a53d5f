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
from typing import TYPE_CHECKING, Any

from mlxlora_core.options import NoOptions
from mlxlora_core.runtime_started import RuntimeStarted
from mlxlora_core.series import RunInfo, Watcher
from mlxlora_core.values import (
    Answer,
    ExportSource,
    ForeignAdapter,
    ForeignModel,
    ForeignTensor,
    LazyTensor,
    LowRank,
    PackedProduct,
    Place,
    Rows,
    Tokenizer,
    TokenizerFiles,
    Transform,
)

if TYPE_CHECKING:
    import click
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


@dataclass(frozen=True, kw_only=True)
class WeightLoader(Spec):
    """Reads a foreign checkpoint.

    Attributes:
        detect: whether a path, of a folder or a file, looks like this loader's;
            must not read tensors.
        open: the checkpoint at a path. Memory in use while its tensors are
            read one after another must not grow with the model, no code found
            in a file may run, and a missing or damaged part is an error.
        dtype: type of the weights in a model folder that is made of such a
            checkpoint, where nobody says another: ``float16``, ``bfloat16``,
            ``float32``, or ``stored`` for that of each tensor as it is.
    """

    detect: Callable[[Path], bool]
    open: Callable[[Path, Any], ForeignModel]
    dtype: str = "stored"


# --- tokenizers ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TokenizerLoader(Spec):
    """Opens a tokenizer.

    Attributes:
        detect: whether these files, by their names and first bytes, are this kind
            of tokenizer's; never raises.
        open: the tokenizer in files named as a checkpoint names them. No code
            found in a file may run.
    """

    detect: Callable[[TokenizerFiles], bool]
    open: Callable[[TokenizerFiles, Any], Tokenizer]


# --- architectures ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How another library spells a model family: the keys of its config, the names and rows of its tensors.

    Attributes:
        model_types: what the library calls the models of the family that are read.
        read: as that of :class:`Architecture`, of a config as the library spells it.
        table: of a model of some arguments, each parameter and how it is stored there. Loading,
            exporting and adapters of that library follow this one table, both ways.
        notes: as those of :class:`Architecture`.
        write: of a model of some arguments, the config as the library spells it, of which ``read``
            makes the same arguments; a ModelError where the library cannot say them. None where
            models are only read in this layout.
    """

    model_types: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Any]
    table: Callable[[Any], Sequence[ForeignTensor]]
    notes: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Sequence[str]] | None = None
    write: Callable[[Any], Mapping[str, Any]] | None = None


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
        notes: what ``read`` assumed of such a config, and what it derived that the
            config should have stated: a sentence each, told when it is converted.
        layouts: how other libraries spell the family: ``hf`` for Hugging Face and mlx-lm, ``gguf``.
    """

    model_types: tuple[str, ...]
    args: type[Any]
    read: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Any]
    tensors: Callable[[Mapping[str, LazyTensor], Any], Mapping[str, LazyTensor]]
    build: Callable[[Any], LanguageModel]
    default_targets: tuple[str, ...] = ()
    notes: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Sequence[str]] | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)


# --- adapters -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Adapter(Spec):
    """A trainable change to frozen linears and embeddings.

    Attributes:
        wrap: a module that computes the linear's output plus the adapter's, the
            same as the linear at the start; None for a linear or an embedding that is not the
            adapter's to change. The module keeps the linear as its child
            ``linear``, frozen. What it adds trains, or is frozen by it; both are kept in
            the adapter file. The module of an embedding has ``as_linear`` too.
        fuse: the weight, float32, of one dense linear that does what the wrapped
            module does, given the weight of the linear inside it, of the same shape.
        low_rank: what the wrapped module adds to its linear, where that is a low-rank update and
            nothing else; other tools then take it for a LoRA, whatever the adapter is called,
            and several adapters run in one batch. None for an adapter of another kind.
        learning_rates: with these options, name of a parameter -> factor on the learning rate of
            it; 1 for those that are not named.
        default_targets: what it goes on where nobody says, by the names of any library; nothing
            for what the architecture names. Those that a model does not have are left out.
        initialise: give a wrapped module initial values that take the weight of its linear to make;
            it is not called for a module whose values come from a file.
        fuse_bias: the bias of the linear that ``fuse`` gives the weight of, given the bias of the
            linear inside the wrapped module; None for an adapter that leaves it as it is.
    """

    wrap: Callable[[nn.Module, Place, Any], nn.Module | None]
    fuse: Callable[[nn.Module, mx.array], mx.array]
    low_rank: Callable[[nn.Module], LowRank] | None = None
    learning_rates: Callable[[Any], Mapping[str, float]] | None = None
    default_targets: tuple[str, ...] = ()
    initialise: Callable[[nn.Module], None] | None = None
    fuse_bias: Callable[[nn.Module, mx.array], mx.array] | None = None


# --- adapter loaders ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AdapterLoader(Spec):
    """Reads an adapter of another tool.

    Attributes:
        detect: whether a path, of a folder or a file, looks like this loader's; must not read
            tensors, and never raises.
        open: the adapter at a path; a ModelError for what cannot be converted, by name.
    """

    detect: Callable[[Path], bool]
    open: Callable[[Path, Any], ForeignAdapter]


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
        bind: products with the parts of one weight (outputs, inputs), in float32 on a CPU and
            in any type on a GPU, or None where it has none for them. They are made once for parts
            that stay as they are, and used instead of ``matmul`` and ``dequantize`` wherever they
            take as many rows; for a model that trains only with a ``times_back``.
    """

    parts: tuple[str, ...]
    quantize: Callable[[mx.array, Any], Mapping[str, mx.array] | None]
    dequantize: Callable[[Mapping[str, mx.array], Any], mx.array]
    matmul: Callable[[mx.array, Mapping[str, mx.array], Any], mx.array] | None = None
    bind: Callable[[Mapping[str, mx.array], Any], PackedProduct | None] | None = None


# --- dataset builders ---------------------------------------------------------


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


@dataclass(frozen=True, kw_only=True)
class Sampler(Spec):
    """Says how likely each next token is; mlxlora draws it.

    Attributes:
        build: a function ``transform(logits, tokens)`` from logits (B, V) in
            float32 and the ids so far to logits (B, V) in float32, of which -inf
            forbids a token. It is called once a text, so that what it gives may
            keep state; it draws nothing at random itself. One that has a second
            parameter ``tokenizer`` is given the tokenizer of the model too.
    """

    build: Callable[[Any], Transform] | Callable[[Any, Tokenizer], Transform]


# --- exporters ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Exporter(Spec):
    """Writes a model, or an adapter alone, in the form that another tool reads.

    Attributes:
        export: write the files into an empty folder, which becomes the target when all is
            written. Memory in use must not grow with the model: tensors are read one after
            another and let go.
        layout: whose spelling of config and tensors it is handed: a layout of the
            architecture, such as ``hf`` or ``gguf``, or nothing for the architecture's own.
        takes: ``model`` for a model with an adapter, if there is one, in its weights;
            ``adapter`` for an adapter alone, which there then must be.
        packed: whether quantized weights are handed over packed, with these options. One that
            an adapter changes is then quantized again. Where it says no, they come expanded to
            float32, not rounded to the type of their scales. None for dense weights always.
        ending: of the one file that it writes, such as ``.gguf``, where that is what the other
            tool reads: a target with this ending is then that file, and no folder.
        wrote: whether a file with this ending is one that it has written, and may be replaced.
        opens: what opens the export again, so that it is compared with the model before
            anybody sees it: ``model`` for a weight loader, ``adapter`` for an adapter loader,
            nothing where no plugin reads this form: it is then not checked.
    """

    export: Callable[[ExportSource, Path, Any], None]
    layout: str = ""
    takes: str = "model"
    packed: Callable[[Any], bool] | None = None
    ending: str = ""
    wrote: Callable[[Path], bool] | None = None
    opens: str = ""


# --- observers ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Observer(Spec):
    """Watches a training.

    Attributes:
        start: called when the training begins. What it, or the watcher, raises
            is told once as a warning; the training goes on without it.
        needs: modules that it imports and that its plugin is installed without, each with what
            ``pip install`` is told; one that is absent is an error before any work.
    """

    start: Callable[[RunInfo, Any], Watcher]
    needs: Mapping[str, str] = field(default_factory=dict)


# --- evaluators ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evaluator(Spec):
    """Says how good answers are.

    Attributes:
        score: how good an answer is, from 0 to 1, larger is better. What is reported is the
            mean over the rows. The same answer gets the same score, whatever came before it.
        prepare: called once before any work, to refuse with a UsageError what can be known to
            fail; None where there is nothing of that kind.
        inputs: what ``score`` reads beside its options: source -> state, as that of
            :class:`DatasetBuilder`; None where it reads nothing.
        needs: as that of :class:`Observer`.
    """

    score: Callable[[Answer, Any], float]
    prepare: Callable[[Any], None] | None = None
    inputs: Callable[[Any], Mapping[str, str]] | None = None
    needs: Mapping[str, str] = field(default_factory=dict)


# --- commands -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Command(Spec):
    """A verb of the command line: ``mlxlora NAME``.

    Attributes:
        command: the click command, or group of commands, made when the verb is called. Its own
            parameters take the place of ``options``.
    """

    command: Callable[[], click.Command]


# --- runtimes and recipes -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Runtime(Spec):
    """Prepares the machine before MLX computes anything.

    Attributes:
        start: called once a process. Returns a note, or None when the runtime
            has no business on this machine.
    """

    start: Callable[[], RuntimeStarted | None]


@dataclass(frozen=True, kw_only=True)
class RecipeFile(Spec):
    """A recipe that ships with a plugin: ``mlxlora run NAME``.

    Attributes:
        path: the recipe.toml; paths inside it are relative to its folder.
    """

    path: Path
