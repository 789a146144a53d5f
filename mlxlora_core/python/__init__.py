"""mlxlora in Python: the same lines as the verbs, for scripts and notebooks.

Options have the names of the command line. Nothing is printed, and what goes
wrong is an exception of :mod:`mlxlora_core.errors`. Ctrl-C in a training lets
the step under way end, saves it where there is a place for it, and raises
``KeyboardInterrupt``; a second one raises it at once.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mlxlora_core.errors import UsageError, listing
from mlxlora_core.files import lock
from mlxlora_core.model.located import locate_model
from mlxlora_core.options import divide
from mlxlora_core.plugins.blame import told
from mlxlora_core.plugins.defaults import DEFAULT_RECIPE
from mlxlora_core.plugins.sections import configure
from mlxlora_core.python.generation import generate, stream
from mlxlora_core.python.model import (
    Model,
    checked_seed,
    file_of,
    followed,
    load,
    outputs_of,
    parsed,
    prepare,
    quantization_of,
    registry,
    texts,
)
from mlxlora_core.python.scoring import score
from mlxlora_core.training.checkpoints import Start
from mlxlora_core.training.events import TrainReport, TrainResult, ValidReport
from mlxlora_core.training.settings import (
    BatchConfig,
    BatchOptions,
    EvaluateConfig,
    SaveConfig,
    TrainConfig,
    TrainOptions,
)
from mlxlora_core.training.sources import Rows, columns_from, read_data

if TYPE_CHECKING:
    from mlxlora_core.model.adapters import Adapted
    from mlxlora_core.model.export import ExportReport
    from mlxlora_core.model.fuse import FuseReport
    from mlxlora_core.runs.events import Event
    from mlxlora_core.training.events import TrainEvent
    from mlxlora_core.training.examples import Source
    from mlxlora_core.training.loss import Loss
    from mlxlora_core.training.outputs import Outputs

__all__ = [
    "Model",
    "TrainReport",
    "TrainResult",
    "ValidReport",
    "evaluate",
    "export",
    "fuse",
    "generate",
    "load",
    "registry",
    "run",
    "score",
    "stream",
    "train",
]


def train(
    model: Model,
    data: Rows,
    *,
    columns: Mapping[str, str] | Sequence[str] = (),
    seed: int = 0,
    adapter_file: str | os.PathLike[str] | None = None,
    metrics_file: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Unpack[TrainOptions],
) -> Generator[TrainEvent, None, None]:
    """Train the adapter that is on a model, step by step as the reports are taken.

    Rows are read at once; all else begins when the first report is asked for. A training that is
    left in the middle keeps its lock and its hold on Ctrl-C until the generator is closed or forgotten.

    Args:
        model: with an adapter on it, which goes on from its values.
        data: a folder, a file or rows to train on, or ``{"train": rows, "valid": rows}``.
        columns: what is read -> the column that it is read from: ``{"prompt": "question"}``.
        seed: of the order of rows and of dropout.
        adapter_file: write the adapter here at the end, and checkpoints beside it into
            ``NAME.checkpoints``; without it nothing is saved.
        metrics_file, resume, overwrite, options: as ``mlxlora train`` has them.

    Yields:
        Notes, reports as they are due, checkpoints as they are saved and, last, the ``TrainResult``.

    Raises:
        UsageError: no adapter is on the model, or an option that there is not or that is out of range.
        DataError: rows that are not there, or that cannot be used.
        ModelError: an adapter file whose name says no format, or checkpoints of another base or data.
        SafetyError: a training that has not ended, or an adapter that is there, would be lost; a
            file that mlxlora has not written is there.
        LockedError: another one writes the same files.
        DivergedError: a loss or a gradient is not finite; the state before it is saved.
        ResourceError: too little memory, or a file cannot be written.
        PluginError: a plugin breaks its contract.
        KeyboardInterrupt: Ctrl-C; the step that it came in is done and saved.
    """
    if resume and overwrite:
        raise UsageError("resume goes on and overwrite begins anew; give one of them")
    ours, others = divide(options, SaveConfig)
    config = parsed(TrainConfig, others, "train", beside=(SaveConfig,))
    saving, number = parsed(SaveConfig, ours, "train"), checked_seed(seed, "train")
    if adapter_file is None:
        _refuse_needless([*ours, *(["resume"] if resume else [])])
    adapted = model.needed_adapter()
    rows = read_data(data, ("train",), ("valid",), columns_from(columns))
    how = Start.RESUME if resume else Start.OVERWRITE if overwrite else Start.BEGIN
    outputs = outputs_of(adapter_file, metrics_file, saving)
    return _train(model, adapted, rows, config, number, outputs, how)


def _train(
    model: Model,
    adapted: Adapted,
    rows: Mapping[str, Source],
    config: TrainConfig,
    seed: int,
    outputs: Outputs,
    how: Start,
) -> Generator[TrainEvent, None, None]:
    """The events of a training that is checked."""
    from mlxlora_core.training.outputs import held, refuse_finished
    from mlxlora_core.training.session import open_training

    with told(model.registry.plugins), held(outputs):
        plugins, runtimes = model.registry, model.runtimes
        refuse_finished(outputs.adapter_file, how)
        session = open_training(
            model.base, adapted, rows, config, plugins, seed=seed, outputs=outputs, runtimes=runtimes
        )
        del rows  # of which there are tokens now
        yield from followed(session.start(how))


def _refuse_needless(names: list[str]) -> None:
    """Refuse options of saving where nothing is saved."""
    if names:
        raise UsageError(
            f"train: without adapter_file nothing is saved, and {listing(names)} means nothing",
            fix='name it: train(…, adapter_file="adapters.safetensors")',
        )


def evaluate(
    model: Model,
    data: Rows,
    *,
    split: str = "test",
    columns: Mapping[str, str] | Sequence[str] = (),
    test_batches: int = EvaluateConfig().test_batches,
    **options: Unpack[BatchOptions],
) -> Loss:
    """The loss of a model, and of its adapter where one is on it, on held-out rows.

    Args:
        model: to measure.
        data: a dataset folder, a file, rows, or the rows of each split.
        split: which split of a folder or of several.
        columns: as for :func:`train`.
        test_batches: how many batches, from rows all over; -1 is all.
        options: as ``mlxlora evaluate`` has them.

    Returns:
        The sum of ``nats`` and of counted ``tokens``, with their ``mean`` and the ``perplexity``.

    Raises:
        UsageError: an option that there is not or that is out of range.
        DataError: rows that are not there, or that cannot be used.
        DivergedError: the loss is not finite.
        ResourceError: too little memory.
    """
    config = parsed(BatchConfig, options, "evaluate", beside=(EvaluateConfig,))
    batches = parsed(EvaluateConfig, {"test_batches": test_batches}, "evaluate").test_batches
    source = read_data(data, (split,), columns=columns_from(columns))[split]
    from mlxlora_core.training import evaluation
    from mlxlora_core.training.examples import examples_of

    with told(model.registry.plugins):
        examples = examples_of(source, model.base, config).examples
        return evaluation.evaluate(model.base.language_model, examples, config.batch_size, batches)


def fuse(
    model: str | os.PathLike[str],
    adapter_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    save_path: str | os.PathLike[str],
    *,
    adapter_weights: Sequence[float] = (),
    adapter: str | None = None,
    base_mismatch: str = "refuse",
    quantize: str | Mapping[str, Any] | None = None,
    dequantize: bool = False,
    search_group_size: bool = False,
    overwrite: bool = False,
    plugins: Sequence[str] = (),
    **options: Any,
) -> FuseReport:
    """Write a model folder with the change of one or more adapters in its weights.

    Args:
        model: the base, by whatever :func:`load` takes.
        adapter_file: an adapter made for it, or several, whose changes are added.
        save_path: the folder to write.
        adapter_weights: factor on the change of each; left out, 1.
        adapter: insist on this one.
        base_mismatch: ``allow`` to put it on another base than its own, such as the same model in other bits.
        quantize: as for :func:`load`, which the adapter was trained with.
        dequantize: write a dense model where the base is quantized.
        search_group_size: quantize what changes again in the group size that rounds the least of it away.
        overwrite: whether a model folder that is there may be replaced.
        plugins: as for :func:`registry`.
        options: insist on these values of the adapter.

    Returns:
        How near the fused model is to base and adapter together.

    Raises:
        UsageError: the target is the base.
        ModelError: the adapter does not fit the base.
        SafetyError: the target holds something else.
        LockedError: another run writes the target.
        ResourceError: the disk is too small.
        PluginError: no such plugin, or one that breaks its contract.
    """
    found = registry(plugins)
    bits = quantization_of(quantize, found)
    base, target = locate_model(model).path, Path(save_path)
    with told(found.plugins), lock.hold(target):
        prepare(found)
        from mlxlora_core.model.events import result_of
        from mlxlora_core.model.fuse import fuse as fused
        from mlxlora_core.model.several import shares_of

        paths = [adapter_file] if isinstance(adapter_file, (str, os.PathLike)) else adapter_file
        files = [file_of(path, base_mismatch, adapter, options) for path in paths]
        how = {"dequantize": dequantize, "search_group_size": search_group_size, "overwrite": overwrite}
        made = fused(base, shares_of(files, adapter_weights), target, found, quantization=bits, **how)
        return result_of(made)


def export(
    model: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    adapter_file: str | os.PathLike[str] | None = None,
    base_mismatch: str = "refuse",
    quantize: str | Mapping[str, Any] | None = None,
    overwrite: bool = False,
    plugins: Sequence[str] = (),
    **options: Any,
) -> ExportReport:
    """Write a model, with or without an adapter, in the form of another tool.

    Args:
        model: by whatever :func:`load` takes.
        to: the exporter.
        out: the folder to write, or the file where the exporter writes one and this has its ending.
        adapter_file: an adapter made for the model, to put into the weights, or to write alone.
        base_mismatch, quantize: as for :func:`fuse`.
        overwrite: whether an export that is there may be replaced.
        plugins: as for :func:`registry`.
        options: of the exporter.

    Returns:
        Which files were written, and what was found when they were opened again.

    Raises:
        UsageError: the target is the model; an option that there is not or that is out of range.
        ModelError: the model or the adapter is damaged, or they do not fit.
        SafetyError: the target holds something else.
        LockedError: another run writes the target.
        ResourceError: the disk is too small.
        PluginError: no such exporter, or one that breaks its contract.
    """
    found = registry(plugins)
    exporter, _ = configure(found.find("exporter", to), options)
    bits = quantization_of(quantize, found)
    base, target = locate_model(model), Path(out)
    with told(found.plugins), lock.hold(target):
        prepare(found)
        from mlxlora_core.model.events import result_of
        from mlxlora_core.model.export import export as exported

        adapter = file_of(adapter_file, base_mismatch) if adapter_file is not None else None
        asked = partial(exported, quantization=bits, overwrite=overwrite, base=base.name)
        return result_of(asked(base.path, target, exporter, found, fused=adapter))


def run(
    recipe: str | os.PathLike[str] = DEFAULT_RECIPE,
    *,
    sets: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> Generator[Event, None, None]:
    """Do a whole recipe, stage by stage as the events are taken; what is done already is skipped.

    Args:
        recipe: a file, or the name of a recipe that a plugin brings.
        sets: values over those of the recipe, as ``--set`` has them: ``["train.iters=100"]``.
        plugins: as for :func:`registry`.

    Yields:
        Stages as they start and end, and what a training reports.

    Raises:
        MlxloraError: a recipe that makes no sense, or as the stages raise.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    found = registry(plugins)
    from mlxlora_core.runs.recipe_source import find_recipe, read

    resolved = read(find_recipe(os.fspath(recipe), found), texts(sets, "sets"), found)

    def events() -> Generator[Event, None, None]:
        from mlxlora_core.runs import pipeline, samplers

        with told(found.plugins), lock.hold(resolved.folder):
            notes = prepare(found)
            samplers.check_samplers(resolved.sampler)
            samplers.prepare_evaluators(resolved.evaluator)
            yield from followed(pipeline.run(resolved, found, notes, "run(…)"))

    return events()
