"""Training in Python: what ``mlxlora train`` does, as a generator."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from mlxlora_core.errors import UsageError, listing
from mlxlora_core.files import lock
from mlxlora_core.machine.signals import Interrupted
from mlxlora_core.options import divide
from mlxlora_core.plugins.blame import told
from mlxlora_core.python_model import Model, checked_seed, parsed
from mlxlora_core.training.checkpoints import Start
from mlxlora_core.training.settings import SaveConfig, TrainConfig, TrainOptions
from mlxlora_core.training.sources import Rows, sources

if TYPE_CHECKING:
    from mlxlora_core.model.adapters import Adapted
    from mlxlora_core.training.events import TrainEvent
    from mlxlora_core.training.session import Outputs, Source

T = TypeVar("T")


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
) -> Generator[TrainEvent, None, None]:
    """Train the adapter that is on a model, step by step as the reports are taken.

    Nothing happens before the first one is asked for. A training that is left
    in the middle keeps its lock and its hold on Ctrl-C until the generator is
    closed or forgotten.

    Args:
        model: with an adapter on it, which goes on from its values; see :meth:`Model.attach`.
        data: a dataset folder, rows to train on, or ``{"train": rows, "valid": rows}``.
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
        ModelError: an adapter file whose name says no format, or checkpoints of another base or data.
        SafetyError: a training that has not ended would be lost.
        LockedError: another one writes the adapter file.
        DivergedError: a loss or a gradient is not finite; the state before it is saved.
        ResourceError: too little memory, or a file cannot be written.
        PluginError: a plugin breaks its contract.
        KeyboardInterrupt: Ctrl-C; the step that it came in is done and saved.
    """
    files = _Files(_path(adapter_file), _path(metrics_file), resume, overwrite)
    saving, config = _checked(options, files)
    number, adapted = checked_seed(seed, "train"), model.needed_adapter()
    return _trained(model, adapted, sources(data, "train", "valid"), config, number, files, saving)


@dataclass(frozen=True)
class _Files:
    """What a training writes, and how it begins where there is something."""

    adapter: Path | None
    metrics: Path | None
    resume: bool
    overwrite: bool

    def outputs(self, saving: SaveConfig) -> Outputs:
        """The adapter with checkpoints beside it, and a log."""
        from mlxlora_core.training.session import Outputs

        outputs = Outputs(metrics=self.metrics, saving=saving, resume_command="train(…, resume=True)")
        if self.adapter is None:
            return outputs
        folder = self.adapter.with_name(f"{self.adapter.stem}.checkpoints")
        return replace(outputs, adapter_file=self.adapter, checkpoints=folder)


def _path(given: str | os.PathLike[str] | None) -> Path | None:
    return Path(given) if given is not None else None


def _checked(options: Mapping[str, Any], files: _Files) -> tuple[SaveConfig, TrainConfig]:
    """When to save and how to train, where that and what is written go together."""
    ours, others = divide(options, SaveConfig)
    config = parsed(TrainConfig, others, "train", beside=(SaveConfig,))
    saving = parsed(SaveConfig, ours, "train")
    if files.resume and files.overwrite:
        raise UsageError("resume goes on and overwrite begins anew; give one of them")
    needless = [*ours, *(["resume"] if files.resume else [])]
    if files.adapter is None and needless:
        raise UsageError(
            f"train: without adapter_file nothing is saved, and {listing(needless)} means nothing",
            fix='name it: train(…, adapter_file="adapters.safetensors")',
        )
    return saving, config


def _trained(
    model: Model,
    adapted: Adapted,
    rows: Mapping[str, Source],
    config: TrainConfig,
    seed: int,
    files: _Files,
    saving: SaveConfig,
) -> Generator[TrainEvent, None, None]:
    """The events of a training."""
    from mlxlora_core.training.session import open_training

    how = Start.RESUME if files.resume else Start.OVERWRITE if files.overwrite else Start.BEGIN
    with told(model.registry.plugins), lock.hold(files.adapter) if files.adapter else nullcontext():
        session = open_training(
            model.base,
            adapted,
            rows,
            config,
            model.registry,
            seed=seed,
            outputs=files.outputs(saving),
            runtimes=model.runtimes,
        )
        yield from followed(session.start(how))


def followed(events: Iterator[T]) -> Generator[T, None, None]:
    """Events to their end; a signal becomes what Python raises for it."""
    try:
        yield from events
    except Interrupted as fault:
        if fault.signum == signal.SIGINT:
            raise KeyboardInterrupt(str(fault)) from fault
        raise SystemExit(fault.exit_code) from fault
