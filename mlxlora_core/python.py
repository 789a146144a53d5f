"""mlxlora in Python: the same lines as the verbs, for scripts and notebooks.

Options have the names of the command line. Nothing is printed, and what goes
wrong is an exception of :mod:`mlxlora_core.errors`. Ctrl-C in a training lets
the step under way end, saves it where there is a place for it, and raises
``KeyboardInterrupt``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

from mlxlora_core.errors import UsageError
from mlxlora_core.files import lock
from mlxlora_core.machine.device import prepare_cpu
from mlxlora_core.machine.signals import Interrupted
from mlxlora_core.options import divide, parse
from mlxlora_core.plugins import Registry, start_runtimes
from mlxlora_core.plugins import load as load_plugins
from mlxlora_core.plugins.defaults import DEFAULT_ADAPTER, DEFAULT_RECIPE, DEFAULT_SAMPLER
from mlxlora_core.plugins.sections import configure
from mlxlora_core.training.checkpoints import Start
from mlxlora_core.training.dataset import SPLITS
from mlxlora_core.training.settings import (
    BatchConfig,
    EvaluateConfig,
    GenerateConfig,
    SaveConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from mlxlora_core.model.adapters import Adapted
    from mlxlora_core.model.export import ExportReport
    from mlxlora_core.model.folder import Model as Base
    from mlxlora_core.model.fuse import FuseReport
    from mlxlora_core.model.generate import Segment
    from mlxlora_core.runs.events import Event
    from mlxlora_core.training.events import TrainEvent
    from mlxlora_core.training.loss import Loss

T = TypeVar("T")

#: a dataset folder, rows to train on, or the rows of each split
Rows = str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]]


class BatchOptions(TypedDict, total=False):
    """How rows become batches."""

    batch_size: int
    max_seq_length: int
    mask_prompt: bool


class TrainOptions(BatchOptions, total=False):
    """How to train and when to save; the defaults are those of ``mlxlora train``."""

    iters: int
    grad_accumulation: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup: int
    min_learning_rate: float
    grad_clip: float | None
    val_batches: int
    steps_per_report: int
    steps_per_eval: int
    patience: int | None
    on_nonfinite: str
    save_every: int
    save_minutes: float
    keep: int


class Model:
    """A model, with or without an adapter on it; :func:`load` makes one.

    Attributes:
        folder: where it was read.
        config: its config.json.
        note: how the weights are held, where that makes it slower; else nothing.
        runtimes: what the runtimes said of themselves.
    """

    def __init__(self, base: Base, registry: Registry, runtimes: Sequence[str]) -> None:
        self.base, self.registry, self.runtimes = base, registry, runtimes
        self.adapted: Adapted | None = None
        self.folder, self.config, self.note = base.folder, base.config, base.note

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that is on it, or None."""
        return self.adapted.choice.component.spec.name if self.adapted is not None else None

    def attach(self, adapter: str = DEFAULT_ADAPTER, *, seed: int = 0, **options: Any) -> Model:
        """Put a new adapter on the model; the base is frozen.

        Args:
            adapter: its name.
            seed: of its initial values.
            options: ``layers``, ``targets``, and those of the adapter, such as ``rank``.

        Returns:
            This model.

        Raises:
            UsageError: an adapter is on it already; an option that there is not or that is out of
                range; a target that matches nothing.
            PluginError: no such adapter, or one that breaks its contract.
        """
        from mlxlora_core.model import adapters

        self._bare()
        choice, config = configure(self.registry.find("adapter", adapter), options)
        self.adapted = adapters.attach(self.base, choice, config, seed)
        return self

    def load_adapter(self, path: str | os.PathLike[str], adapter: str | None = None, **options: Any) -> Model:
        """Put the adapter in a file on the model that it was made for.

        Args:
            path: an adapter file, ``.safetensors`` or ``.npz``.
            adapter: insist on this one.
            options: insist on these values.

        Returns:
            This model.

        Raises:
            UsageError: an adapter is on it already.
            ModelError: the file is damaged, or of another base, adapter or set of options.
        """
        from mlxlora_core.model import adapters

        self._bare()
        self.adapted = adapters.load(Path(path), self.base, self.registry, adapter, options)
        return self

    def save_adapter(self, path: str | os.PathLike[str]) -> None:
        """Write the adapter that is on the model to ``.safetensors`` or ``.npz``.

        Raises:
            UsageError: none is on it.
            DivergedError: a parameter is not finite; an older file is left as it is.
            ResourceError: the disk is full, or the folder cannot be written.
        """
        from mlxlora_core.model import adapters

        with lock.hold(Path(path)):
            adapters.save(Path(path), self.base, self.needed_adapter())

    def needed_adapter(self) -> Adapted:
        """The adapter that is on the model.

        Raises:
            UsageError: none is.
        """
        if self.adapted is None:
            raise UsageError("no adapter is on the model", fix='put one on it: model.attach("lora")')
        return self.adapted

    def _bare(self) -> None:
        if self.adapted is not None:
            raise UsageError(f"adapter '{self.adapter}' is on the model already", fix="load the model anew")


def registry(plugins: Sequence[str] = ()) -> Registry:
    """The plugins that are there, and what they give.

    Args:
        plugins: as given with ``-P``: ``NAME`` requires one, ``no:NAME`` leaves one out,
            ``./file.py`` adds a file.

    Raises:
        UsageError: a name that no plugin has.
        PluginError: a plugin named here that cannot be loaded.
    """
    return _registry(tuple(plugins))


def load(
    path: str | os.PathLike[str],
    *,
    adapter_file: str | os.PathLike[str] | None = None,
    plugins: Sequence[str] = (),
) -> Model:
    """Read a model folder and, if it is named, the adapter for it.

    Args:
        path: a model folder, as ``mlxlora convert`` makes it.
        adapter_file: an adapter file made for this model.
        plugins: as for :func:`registry`.

    Raises:
        ModelError: a part is absent, damaged or does not fit the others.
        ResourceError: it does not fit into memory.
        PluginError: no plugin builds its model_type or reads its tokenizer.
    """
    found = registry(plugins)
    runtimes = _prepare(found)
    from mlxlora_core.model import folder

    model = Model(folder.load(Path(path), found), found, runtimes)
    return model.load_adapter(adapter_file) if adapter_file is not None else model


def train(
    model: Model,
    data: Rows,
    *,
    seed: int = 0,
    adapter_file: str | os.PathLike[str] | None = None,
    metrics_file: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Unpack[TrainOptions],
) -> Iterator[TrainEvent]:
    """Train the adapter that is on a model, step by step as the reports are taken.

    Args:
        model: with an adapter on it; see :meth:`Model.attach`.
        data: a dataset folder, a list of rows to train on, or ``{"train": rows, "valid": rows}``.
        seed: of the order of rows and of dropout.
        adapter_file: write the adapter here at the end, and checkpoints beside it into
            ``NAME.checkpoints``; without it nothing is saved.
        metrics_file: write each report to this file, one JSON object a line.
        resume: go on from the newest checkpoint.
        overwrite: begin anew where a training has not ended.
        options: as ``mlxlora train`` has them.

    Yields:
        Notes, reports as they are due, checkpoints as they are saved and, last, the
        :class:`~mlxlora_core.training.events.TrainResult`.

    Raises:
        UsageError: no adapter is on the model, or an option that there is not or that is out of range.
        DataError: rows that are not there, or that cannot be used.
        DivergedError: a loss or a gradient is not finite; the state before it is saved.
        KeyboardInterrupt: Ctrl-C; the step that it came in is done and saved.
    """
    if resume and overwrite:
        raise UsageError("resume goes on and overwrite begins anew; give one of them")
    ours, others = divide(options, SaveConfig)
    saving, config = _parse(SaveConfig, ours), _parse(TrainConfig, others)
    adapted = model.needed_adapter()
    how = Start.RESUME if resume else Start.OVERWRITE if overwrite else Start.BEGIN
    from mlxlora_core.training.session import Outputs, open_training

    outputs = Outputs(saving=saving, metrics=_path(metrics_file), resume_command="train(…, resume=True)")
    target = _path(adapter_file)
    if target is not None:
        folder = target.with_name(f"{target.stem}.checkpoints")
        outputs = replace(outputs, adapter_file=target, checkpoints=folder)

    def events() -> Iterator[TrainEvent]:
        with ExitStack() as held:
            if target is not None:
                held.enter_context(lock.hold(target))
            rows, plugins = _rows(data), model.registry
            session = open_training(
                model.base,
                adapted,
                rows,
                config,
                plugins,
                seed=seed,
                outputs=outputs,
                runtimes=model.runtimes,
            )
            yield from _followed(session.start(how))

    return events()


def evaluate(
    model: Model,
    data: Rows,
    *,
    split: str = "test",
    test_batches: int = EvaluateConfig().test_batches,
    **options: Unpack[BatchOptions],
) -> Loss:
    """The loss of a model, and of its adapter where one is on it, on held-out rows.

    Args:
        model: to measure.
        data: a dataset folder, a list of rows, or the rows of each split.
        split: which split of a folder or of several.
        test_batches: how many batches, from rows all over; -1 is all.
        options: as ``mlxlora evaluate`` has them.

    Returns:
        The sum of nats and the number of counted tokens, with their mean and the perplexity.

    Raises:
        UsageError: an option that there is not or that is out of range.
        DataError: rows that are not there, or that cannot be used.
        DivergedError: the loss is not finite.
    """
    config = _parse(BatchConfig, options)
    batches = _parse(EvaluateConfig, {"test_batches": test_batches}).test_batches
    from mlxlora_core.training import evaluation
    from mlxlora_core.training.session import examples_of

    rows = _rows(data, split)
    if split not in rows:
        raise UsageError(f"there is no split '{split}' among the rows", fix="name one that is there")
    examples = examples_of(split, rows[split], model.base, config).examples
    return evaluation.evaluate(model.base.language_model, examples, config.batch_size, batches)


def stream(
    model: Model,
    prompt: str,
    *,
    sampler: str = DEFAULT_SAMPLER,
    num_tokens: int = GenerateConfig().num_tokens,
    write_every: int = GenerateConfig().write_every,
    seed: int = 0,
    **options: Any,
) -> Iterator[Segment]:
    """Continue a prompt, segment by segment; the last one says what ended the text.

    Args:
        model: with or without an adapter on it.
        prompt: text to continue.
        sampler: one, or several in a row: ``"repetition-penalty,top-p"``.
        num_tokens: how many at most.
        write_every: tokens a segment.
        seed: of what is drawn.
        options: of the samplers, such as ``temp``.

    Raises:
        UsageError: an option that there is not or that is out of range; a prompt that does not fit.
        PluginError: no such sampler, or one that breaks its contract.
        DivergedError: the model's logits are not finite.
    """
    config = _parse(GenerateConfig, {"num_tokens": num_tokens, "write_every": write_every})
    from mlxlora_core.model.generate import generate as segments
    from mlxlora_core.runs.recipe import choose_samplers

    chosen = choose_samplers(sampler, options, model.registry)
    return segments(
        model.base.language_model,
        model.base.tokenizer,
        prompt,
        [(choice.component, choice.options) for choice in chosen],
        num_tokens=config.num_tokens,
        seed=seed,
        write_every=config.write_every,
    )


def generate(model: Model, prompt: str, **options: Any) -> str:
    """The continuation of a prompt; see :func:`stream`, which has the same arguments."""
    return "".join(segment.text for segment in stream(model, prompt, **options))


def fuse(
    model: str | os.PathLike[str],
    adapter_file: str | os.PathLike[str],
    save_path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    plugins: Sequence[str] = (),
) -> FuseReport:
    """Write a model folder with an adapter's change in its weights.

    Args:
        model: the folder of the base.
        adapter_file: an adapter made for it.
        save_path: the folder to write.
        overwrite: whether a model folder that is there may be replaced.
        plugins: as for :func:`registry`.

    Returns:
        How near the fused model is to base and adapter together.

    Raises:
        UsageError: the target is the base.
        ModelError: the adapter does not fit the base.
        SafetyError: the target holds something else.
        ResourceError: the disk is too small.
    """
    found = registry(plugins)
    _prepare(found)
    from mlxlora_core.model.events import result_of
    from mlxlora_core.model.fuse import fuse as fused

    with lock.hold(Path(save_path)):
        return result_of(fused(Path(model), Path(adapter_file), Path(save_path), found, overwrite=overwrite))


def export(
    model: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    adapter_file: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    plugins: Sequence[str] = (),
    **options: Any,
) -> ExportReport:
    """Write a model, with or without an adapter, in the form of another tool.

    Args:
        model: a model folder.
        to: the exporter.
        out: the folder to write.
        adapter_file: an adapter made for the model, to put into the weights.
        overwrite: whether an export that is there may be replaced.
        plugins: as for :func:`registry`.
        options: of the exporter.

    Returns:
        Which files were written.

    Raises:
        UsageError: the target is the model; an option that there is not or that is out of range.
        ModelError: the model or the adapter is damaged, or they do not fit.
        SafetyError: the target holds something else.
        ResourceError: the disk is too small.
        PluginError: no such exporter, or one that breaks its contract.
    """
    found = registry(plugins)
    exporter, _ = configure(found.find("exporter", to), options)
    _prepare(found)
    from mlxlora_core.model.events import result_of
    from mlxlora_core.model.export import Fused
    from mlxlora_core.model.export import export as exported

    adapter = Fused(Path(adapter_file)) if adapter_file is not None else None
    with lock.hold(Path(out)):
        events = exported(Path(model), Path(out), exporter, found, fused=adapter, overwrite=overwrite)
        return result_of(events)


def run(
    recipe: str | os.PathLike[str] = DEFAULT_RECIPE,
    *,
    sets: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> Iterator[Event]:
    """Do a whole recipe, stage by stage; what is done already is skipped.

    Args:
        recipe: a file, or the name of a recipe that a plugin brings.
        sets: values over those of the recipe, as ``--set`` has them: ``"train.iters=100"``.
        plugins: as for :func:`registry`.

    Yields:
        Stages as they start and end, and what a training reports.

    Raises:
        MlxloraError: as the stages raise.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    found = registry(plugins)
    from mlxlora_core.runs.recipe_source import find_recipe, read

    resolved = read(find_recipe(os.fspath(recipe), found), sets, found)
    with lock.hold(resolved.folder):
        notes = _prepare(found)
        from mlxlora_core.runs import pipeline

        yield from _followed(pipeline.run(resolved, found, notes, "run(…)"))


@cache
def _registry(plugins: tuple[str, ...]) -> Registry:
    return load_plugins(plugins)


@cache
def _prepare(found: Registry) -> list[str]:
    """Make the machine ready for MLX, once for each set of plugins; what the runtimes say."""
    prepare_cpu()
    return [note.text for note in start_runtimes(found)]


def _parse(kind: type[T], values: Mapping[str, Any]) -> T:
    """A value of options out of keyword arguments."""
    return parse(kind, values, owner="", spell=lambda name: name)


def _path(given: str | os.PathLike[str] | None) -> Path | None:
    return Path(given) if given is not None else None


def _rows(data: Rows, split: str = "train") -> dict[str, Path | Sequence[Mapping[str, Any]]]:
    """split -> where its rows come from; a list of rows is that of ``split``."""
    if isinstance(data, str | os.PathLike):
        files = {name: Path(data) / f"{name}.jsonl" for name in SPLITS}
        return {name: file for name, file in files.items() if name == split or file.is_file()}
    if isinstance(data, Mapping):
        return dict(data)
    return {split: data}


def _followed(events: Iterator[T]) -> Iterator[T]:
    """Events to their end; a signal becomes what Python raises for it."""
    try:
        yield from events
    except Interrupted as fault:
        if fault.signum == signal.SIGINT:
            raise KeyboardInterrupt(str(fault)) from fault
        raise SystemExit(fault.exit_code) from fault
