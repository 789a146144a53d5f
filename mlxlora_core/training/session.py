"""A training from its parts to its adapter file: one assembly for the verb, the recipe and Python."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.distributed.watch import Watch
from mlxlora_core.errors import DivergedError, UsageError
from mlxlora_core.files import durable
from mlxlora_core.files.room import written
from mlxlora_core.machine import signals
from mlxlora_core.machine.device import product_precision
from mlxlora_core.model import adapters
from mlxlora_core.model.adapters import Adapted, AdapterFile
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.sections import AdapterConfig
from mlxlora_core.training import metrics
from mlxlora_core.training.agreement import hand_on, hand_on_adapter, require_agreement
from mlxlora_core.training.checkpoints import Found, Start
from mlxlora_core.training.events import (
    Advanced,
    CheckpointSaved,
    Note,
    Report,
    TrainEvent,
    TrainingStarted,
    TrainResult,
    report_line,
)
from mlxlora_core.training.examples import Examples, Source, examples_of
from mlxlora_core.training.identity import Identity, identify
from mlxlora_core.training.loop import Training
from mlxlora_core.training.memory import decide_recompute, training_memory
from mlxlora_core.training.optimizer import factors_of
from mlxlora_core.training.outputs import Outputs, check_outputs, inputs_of, refuse_finished
from mlxlora_core.training.prefix import prefix_of
from mlxlora_core.training.saving import CheckpointFolder
from mlxlora_core.training.settings import SaveConfig, TrainConfig
from mlxlora_core.training.sources import SplitRows
from mlxlora_core.training.update import of_rank


@dataclass(frozen=True)
class NewAdapter:
    """Train an adapter from its initial values.

    Attributes:
        choice: the adapter and its options.
        config: which layers and targets it goes on.
    """

    choice: Choice
    config: AdapterConfig = field(default_factory=AdapterConfig)


def open_training(
    model: Model,
    adapter: NewAdapter | AdapterFile | Adapted,
    rows: Mapping[str, Source],
    config: TrainConfig,
    registry: Registry,
    *,
    seed: int = 0,
    outputs: Outputs | None = None,
    runtimes: Sequence[str] = (),
    group: Group = ALONE,
    watch: Watch | None = None,
) -> TrainingSession:
    """Put an adapter on a base and prepare to train it; :meth:`TrainingSession.start` trains.

    Args:
        model: the base, changed in place.
        adapter: what to train; one that is already on the model continues from its values.
        rows: ``train`` and, to validate, ``valid``.
        config: how to train.
        registry: where plugins are looked up.
        seed: for the adapter's initial values, the order of rows and dropout.
        outputs: what to write; nothing by default. Only the first of several ranks writes.
        runtimes: what the runtimes said, for the record.
        group: the ranks that train together; each opens and starts the same training.
        watch: is told what this rank is doing.

    Raises:
        DataError: rows that are missing or cannot be used.
        UsageError: settings that do not fit the rows, the model or the machine; an output that is an input.
        ModelError: an adapter file that does not fit, or an output whose name tells no format.
        SafetyError: an output would replace something that mlxlora has not written.
        ResourceError: an output cannot be written.
    """
    with product_precision(config.compute):
        pass  # a precision that this machine lacks is refused before any work
    outputs = outputs or Outputs()
    if not group.leads:
        outputs = Outputs(saving=outputs.saving)
    named = adapter.path if isinstance(adapter, AdapterFile) else None
    read = [path for source in rows.values() if isinstance(source, SplitRows) for path in source.files]
    check_outputs(outputs, inputs_of(model.folder, None, named, *read))
    splits = {name: examples_of(source, model, config) for name, source in rows.items()}
    adapted = _put_on(model, adapter, registry, seed)
    valid = splits["valid"].examples if "valid" in splits else ()
    factors = factors_of(model, adapted)
    prefix = prefix_of(model, splits, config, outputs.checkpoints, group)
    with group.sharing_memory():
        recompute = decide_recompute(model, splits["train"], of_rank(config, group))
    train = splits["train"].examples
    training = Training(model.language_model, train, valid, config, seed, factors, prefix, recompute, group)
    if watch is not None:
        training.watch = watch
    folder = identity = None
    if outputs.checkpoints is not None or group.size > 1:
        examples = {name: split.examples for name, split in splits.items()}
        identity = identify(model, adapted, training, examples, runtimes)
    if outputs.checkpoints is not None and identity is not None:
        folder = CheckpointFolder(outputs.checkpoints, training, model, adapted, identity)
    return TrainingSession(model, adapted, splits, training, outputs, folder, identity)


class TrainingSession:
    """A training, its rows and its outputs; :func:`open_training` makes one.

    Attributes:
        model: the base with the adapter on it.
        adapted: the adapter.
        rows: split -> its examples.
        training: the steps.
        checkpoints: the folder that it is saved in, or None.
    """

    def __init__(
        self,
        model: Model,
        adapted: Adapted,
        rows: Mapping[str, Examples],
        training: Training,
        outputs: Outputs,
        checkpoints: CheckpointFolder | None,
        identity: Identity | None,
    ) -> None:
        self._identity = identity
        self.model, self.adapted, self.rows, self.training = model, adapted, rows, training
        self.checkpoints, self._outputs = checkpoints, outputs
        self._best: dict[str, mx.array] = {}  # the adapter of the best validation, if no folder keeps it

    def start(self, how: Start = Start.BEGIN, found: Found | None = None) -> Iterator[TrainEvent]:
        """Train to the end, saving on the way; the last event is the :class:`TrainResult`.

        Args:
            how: what to do about the checkpoints of an earlier training.
            found: what :func:`~mlxlora_core.training.checkpoints.find_for` returned for this
                training, if the caller has asked already.

        Raises:
            SettingsChanged: the training to resume was started with other settings.
            ModelError: the training to resume has another base or other data, or does not exist.
            SafetyError: an unfinished training, or an existing adapter, would be lost.
            Interrupted: a signal came; its step is finished and saved.
            DivergedError: a loss or a gradient is not finite; the state before it is saved.
            RankError: the ranks train different things, or hold different parameters.
            PluginError: the base has changed.
            ResourceError: too little memory, or a file cannot be written; earlier checkpoints are
                intact.
        """
        try:
            yield from self._start(how, found)
        finally:
            if self.training.prefix is not None:
                self.training.prefix.close()

    def _start(self, how: Start, found: Found | None) -> Iterator[TrainEvent]:
        """As :meth:`start`, which releases the kept hidden states afterwards."""
        if self._identity is not None:
            require_agreement(self.training.group, self._identity)
        refuse_finished(self._outputs.adapter_file, how)
        for split, rows in self.rows.items():
            yield from map(Note, rows.words(split))
        if "valid" not in self.rows:
            yield Note("there are no rows to validate on (a file valid.jsonl): training without validation")
        yield from map(Note, (*self.adapted.notes, self._size()))
        training = self.training
        config = of_rank(training.config, training.group)
        room = training_memory(
            self.model, self.rows, config, training.prefix, training.recompute, training.group
        )
        with room as (need, said):
            self.training.validation_bytes = need
            yield Note(said)
            for text in self._take_up(how, found):
                yield Note(text)
            hand_on(training.group, training, self.model)
            yield TrainingStarted(self.training.progress.step, self.training.config.iters)
            yield from self._train()
        yield from self._warning()
        if self.training.compiled:
            yield Note(f"the step was compiled {self.training.compiles} times, for as many shapes of batches")
        self.training.watch.phase("the end")
        adapter_step = self._take_best()
        if training.config.patience is not None:
            adapter_step = hand_on_adapter(training.group, adapter_step, self.model)
        if self._outputs.adapter_file is not None:
            record = self.checkpoints.record(adapter_step) if self.checkpoints is not None else None
            path = self._outputs.adapter_file
            written(lambda: adapters.save(path, self.model, self.adapted, record))
        yield self._result(adapter_step)

    def _take_up(self, how: Start, found: Found | None) -> list[str]:
        """Begin or resume; returns notes for the user."""
        if not self.training.group.leads:
            return []
        if self.checkpoints is not None:
            return self.checkpoints.start(how, found)
        if how is Start.RESUME:
            raise UsageError("there is no folder of checkpoints to go on from", fix="name the one to resume")
        return []

    def _train(self) -> Iterator[TrainEvent]:
        """Make the remaining steps."""
        saving, log = self._outputs.saving, self._outputs.metrics
        if log is not None:
            yield from self._trim(log)
        with signals.deferred() as pending:
            self.training.signum = lambda: pending.signum
            for event in self.training.prepare():
                yield event
                self._end_if_told()
            saved_at = time.monotonic()
            try:
                for reports in self.training:
                    yield from map(Note, self.training.notes())
                    for report in reports:
                        self._note(report)
                        yield report
                    yield Advanced("training", self.training.step, self.training.config.iters)
                    waited = time.monotonic() - saved_at
                    if self.training.stopped_by is not None or self._due(saving, waited):
                        yield from self._save()
                        saved_at = time.monotonic()
                    self._end_if_told()
            except DivergedError:
                with suppress(DivergedError):  # the state is not finite itself
                    yield from self._save()
                raise

    def _trim(self, log: Path) -> Iterator[Note]:
        """Leave in the log what has been reported so far; a word where it is not there."""
        progress = self.training.progress
        there, reported = metrics.trim(log, progress.step), progress.step - progress.window.steps
        if there < reported:
            upto = f"ends at step {there}" if there else "has none"
            yield Note(f"warning: reports up to step {reported} are not in {log}, which {upto}")

    def _end_if_told(self) -> None:
        """End here if a signal has come.

        Raises:
            Interrupted: one has.
        """
        signum = self.training.stopped_by
        if signum is not None:
            raise signals.Interrupted(signum, self._farewell())

    def _note(self, report: Report) -> None:
        """Write a report to the log."""
        if self._outputs.metrics is not None:
            durable.append_line(self._outputs.metrics, json.dumps(report_line(report)))

    def _due(self, config: SaveConfig, seconds: float) -> bool:
        step = self.training.step  # asking for its progress would wait for the device at every step
        if step == 0:
            return False
        return (
            step % config.save_every == 0
            or step == self.training.best_step
            or seconds >= 60 * config.save_minutes
            or self.training.finished
        )

    def _save(self) -> Iterator[Report | CheckpointSaved]:
        """Write a checkpoint; without a folder, only remember the best adapter."""
        for report in self.training.settle():
            self._note(report)
            yield report
        progress = self.training.progress
        self.training.watch.phase(f"saving step {progress.step}")
        if self.checkpoints is not None:
            yield from self.checkpoints.save(self._outputs.saving.keep)
        elif progress.best_step == progress.step:
            self._best = adapters.adapter_parameters(self.model.module, self.adapted.paths)

    def _farewell(self) -> str:
        step = self.training.progress.step
        if step == 0:
            return "interrupted before the first step; nothing was saved"
        if not self.training.group.leads:
            return f"interrupted at step {step}; rank 0 says what is saved"
        if self.checkpoints is None:
            return f"interrupted at step {step}; nothing was saved"
        return f"interrupted; step {step} is saved. Go on with: {self._outputs.resume_command}"

    def _warning(self) -> Iterator[Note]:
        """A warning if the last validation is worse than the first."""
        progress, config = self.training.progress, self.training.config
        first, last = progress.first_loss, progress.valid_loss
        if first is None or last is None or last <= first:
            return
        best = ""
        if progress.best_loss is not None and progress.best_loss < first:
            best = f"; it was best after step {progress.best_step} ({progress.best_loss:.4f})"
        advice = "fewer --iters, a lower --learning-rate or more rows"
        if config.patience is None:
            advice += ", or --patience 3, which keeps the best"
        yield Note(
            f"warning: the validation loss is worse than before training ({first:.4f} -> {last:.4f}){best}. "
            f"Try {advice}"
        )

    def _take_best(self) -> int:
        """With patience, put the adapter of the best validation on the model; returns the step it is from."""
        progress = self.training.progress
        best = progress.best_step
        if self.training.config.patience is None or best is None:
            return progress.step
        if self.checkpoints is not None:
            return best if self.checkpoints.put_back(best) else progress.step
        self.model.module.update(tree_unflatten(list(self._best.items())))
        return best

    def _size(self) -> str:
        """How much of the model trains, in words."""
        counts = adapters.count(self.model)
        trained, everything = counts["trainable_parameters"], counts["parameters"]
        return (
            f"{everything / 1e6:.3f} M parameters, {trained / 1e6:.3f} M trainable "
            f"({100 * trained / everything:.3f} %) on {len(self.adapted.paths)} linears"
        )

    def _result(self, adapter_step: int) -> TrainResult:
        rows, progress = self.rows["train"], self.training.progress
        return TrainResult(
            **adapters.count(self.model),
            adapted=self.adapted.paths,
            rows=len(rows),
            rows_cut=rows.cut,
            tokens_cut=rows.cut_tokens,
            rows_empty=rows.empty,
            max_seq_length=self.model.sequence_limit(self.training.config.max_seq_length),
            steps=progress.step,
            steps_skipped=progress.skipped,
            adapter_step=adapter_step,
            train_loss=progress.train_loss,
            valid_loss=progress.valid_loss,
        )


def _put_on(
    model: Model, adapter: NewAdapter | AdapterFile | Adapted, registry: Registry, seed: int
) -> Adapted:
    """Put the adapter on the base."""
    if isinstance(adapter, Adapted):
        return adapter
    if isinstance(adapter, AdapterFile):
        return adapters.load_file(adapter, model, registry)
    return adapters.attach(model, adapter.choice, adapter.config, seed)
