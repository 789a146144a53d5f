"""mlxlora in Python: the same lines as the verbs, for scripts and notebooks.

Options have the names of the command line. Nothing is printed, and what goes
wrong is an exception of :mod:`mlxlora_core.errors`. Ctrl-C in a training lets
the step under way end, saves it where there is a place for it, and raises
``KeyboardInterrupt``; a second one raises it at once.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mlxlora_core.errors import UsageError
from mlxlora_core.files import lock
from mlxlora_core.plugins.blame import told
from mlxlora_core.plugins.defaults import DEFAULT_RECIPE, DEFAULT_SAMPLER
from mlxlora_core.plugins.sections import configure
from mlxlora_core.python_model import Model, checked_seed, load, parsed, prepare, registry, texts
from mlxlora_core.python_train import followed, train
from mlxlora_core.training.events import TrainReport, TrainResult, ValidReport
from mlxlora_core.training.settings import (
    BatchConfig,
    BatchOptions,
    EvaluateConfig,
    GenerateConfig,
)
from mlxlora_core.training.sources import Rows, sources

if TYPE_CHECKING:
    from mlxlora_core.model.export import ExportReport
    from mlxlora_core.model.fuse import FuseReport
    from mlxlora_core.model.generate import Segment
    from mlxlora_core.runs.events import Event
    from mlxlora_core.training.loss import Loss

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
    "stream",
    "train",
]


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
        data: a dataset folder, rows, or the rows of each split.
        split: which split of a folder or of several.
        test_batches: how many batches, from rows all over; -1 is all.
        options: as ``mlxlora evaluate`` has them.

    Returns:
        The sum of ``nats`` and the number of counted ``tokens``, with their ``mean`` and the
        ``perplexity``.

    Raises:
        UsageError: an option that there is not or that is out of range.
        DataError: rows that are not there, or that cannot be used.
        DivergedError: the loss is not finite.
        ResourceError: too little memory.
    """
    config = parsed(BatchConfig, options, "evaluate", beside=(EvaluateConfig,))
    batches = parsed(EvaluateConfig, {"test_batches": test_batches}, "evaluate").test_batches
    source = sources(data, split)[split]
    from mlxlora_core.training import evaluation
    from mlxlora_core.training.session import examples_of

    with told(model.registry.plugins):
        examples = examples_of(split, source, model.base, config).examples
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
) -> Generator[Segment, None, None]:
    """Continue a prompt, segment by segment; the last one says what ended the text.

    Args:
        model: with or without an adapter on it.
        prompt: text to continue.
        sampler: one, or several in a row: ``"repetition-penalty,top-p"``.
        num_tokens: how many at most.
        write_every: tokens a segment.
        seed: of what is drawn.
        options: of the samplers, such as ``temp``.

    Yields:
        Segments with their ``text``; ``finish`` of the last one is ``stop`` or ``length``.

    Raises:
        UsageError: an option that there is not or that is out of range; a prompt that does not fit.
        PluginError: no such sampler, or one that breaks its contract.
        DivergedError: the model's logits are not finite.
        ResourceError: too little memory.
    """
    if not isinstance(prompt, str):
        raise UsageError(f"prompt: wanted text, got {type(prompt).__name__}", fix="give one prompt at a time")
    config = parsed(GenerateConfig, {"num_tokens": num_tokens, "write_every": write_every}, "generate")
    number = checked_seed(seed, "generate")
    from mlxlora_core.model.generate import generate as segments
    from mlxlora_core.runs.recipe import choose_samplers

    chosen = choose_samplers(sampler, options, model.registry)

    def events() -> Generator[Segment, None, None]:
        with told(model.registry.plugins):
            yield from segments(
                model.base.language_model,
                model.base.tokenizer,
                prompt,
                [(choice.component, choice.options) for choice in chosen],
                num_tokens=config.num_tokens,
                seed=number,
                write_every=config.write_every,
            )

    return events()


def generate(model: Model, prompt: str, **options: Any) -> str:
    """The continuation of a prompt; see :func:`stream`, which has the same arguments."""
    return "".join(segment.text for segment in stream(model, prompt, **options))


def fuse(
    model: str | os.PathLike[str],
    adapter_file: str | os.PathLike[str],
    save_path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    overwrite: bool = False,
    plugins: Sequence[str] = (),
    **options: Any,
) -> FuseReport:
    """Write a model folder with an adapter's change in its weights.

    Args:
        model: the folder of the base.
        adapter_file: an adapter made for it.
        save_path: the folder to write.
        adapter: insist on this one.
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
    base, file, target = Path(model), Path(adapter_file), Path(save_path)
    with told(found.plugins), lock.hold(target):
        prepare(found)
        from mlxlora_core.model.events import result_of
        from mlxlora_core.model.fuse import fuse as fused

        return result_of(fused(base, file, target, found, adapter, options, overwrite))


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
        LockedError: another run writes the target.
        ResourceError: the disk is too small.
        PluginError: no such exporter, or one that breaks its contract.
    """
    found = registry(plugins)
    exporter, _ = configure(found.find("exporter", to), options)
    folder, target = Path(model), Path(out)
    with told(found.plugins), lock.hold(target):
        prepare(found)
        from mlxlora_core.model.events import result_of
        from mlxlora_core.model.export import Fused
        from mlxlora_core.model.export import export as exported

        fused = Fused(Path(adapter_file)) if adapter_file is not None else None
        return result_of(exported(folder, target, exporter, found, fused=fused, overwrite=overwrite))


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
        from mlxlora_core.runs import pipeline

        with told(found.plugins), lock.hold(resolved.folder):
            notes = prepare(found)
            yield from followed(pipeline.run(resolved, found, notes, "run(…)"))

    return events()
