"""A training that saves itself as it goes, and goes on from what it has saved."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import DivergedError, ModelError, PluginError, ResourceError, listing
from mlxlora_core.files import durable, tensor_file
from mlxlora_core.machine import signals
from mlxlora_core.model import adapters
from mlxlora_core.model.adapters import Adapted, trainable
from mlxlora_core.model.folder import Model
from mlxlora_core.model.linears import parameters
from mlxlora_core.training.checkpoints import (
    ADAPTER,
    MANIFEST,
    OPTIMIZER,
    PARTS,
    SCHEMA,
    STATE,
    Checkpoint,
    Found,
    digest,
    find,
    sha256,
)
from mlxlora_core.training.identity import Identity
from mlxlora_core.training.loop import Progress, Report, Training, Window
from mlxlora_core.training.settings import SaveConfig


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was written.

    Attributes:
        step: steps made before it.
        seconds: how long it took.
    """

    step: int
    seconds: float


class TrainingSession:
    """A training and the folder of its checkpoints.

    Call :meth:`begin`, :meth:`resume` or :meth:`continue_or_begin` once, then
    iterate over :meth:`train` once.

    Args:
        folder: where checkpoints are kept.
        training: at its start.
        model: the base with the adapter on it.
        adapted: the adapter.
        identity: of the training.

    Attributes:
        adapter_step: the step whose adapter the model holds after :meth:`train`.
    """

    def __init__(
        self, folder: Path, training: Training, model: Model, adapted: Adapted, identity: Identity
    ) -> None:
        self.folder, self.training, self.identity = folder, training, identity
        self._model, self._adapted = model, adapted
        self._valid: list[int] = []  # steps of the checkpoints that verify, in order
        self._resumed: list[dict[str, Any]] = []  # where the training was taken up, and by what
        self._base = _base_sums(model)
        self.adapter_step = 0

    def begin(self, found: Found) -> list[str]:
        """Begin anew: the checkpoints that were found go, and those that do not verify are put aside.

        Returns:
            What there is to tell.
        """
        for folder in found.damaged:
            durable.put_aside(folder, "damaged")
        # The newest goes last, so that what is left tells the same until then.
        for checkpoint in reversed(found.valid):
            durable.remove_folder(checkpoint.folder)
        removed = f"{len(found.valid)} checkpoints of an earlier training were removed"
        return [*found.notes, *([removed] if found.valid else [])]

    def resume(
        self, found: Found, fix: str = "put them back, or begin anew with --overwrite instead of --resume"
    ) -> list[str]:
        """Go on from the newest checkpoint.

        Args:
            found: as :func:`find_to_resume` gives it.
            fix: what to do about other settings.

        Returns:
            What there is to tell.

        Raises:
            SettingsChanged: it was begun with other settings.
            ModelError: it is of another base or of other data.
        """
        newest = found.valid[0]
        notes = [*found.notes, *self.identity.compare(newest, fix)]
        progress, self._resumed = _read_state(newest)
        adapters.fill(newest.folder / ADAPTER, self._model)
        tensors, _ = tensor_file.load(newest.folder / OPTIMIZER)
        self.training.restore(progress, tensors)
        self._valid = sorted(checkpoint.step for checkpoint in found.valid)
        self._resumed.append({"step": progress.step, "versions": dict(self.identity.versions)})
        if self.training.finished:
            return [
                *notes,
                f"nothing to do: step {progress.step} of {self.training.config.iters} was the last",
            ]
        return [*notes, f"resumed at step {progress.step} of {self.training.config.iters}"]

    def continue_or_begin(self) -> list[str]:
        """:meth:`resume` where there is something to go on from, else :meth:`begin`.

        A finished training of other settings, data or versions is begun anew.

        Returns:
            What there is to tell.

        Raises:
            MlxloraError: as :meth:`resume` and :func:`find`.
        """
        durable.clear_leftovers(self.folder, "step-*")
        found = find(self.folder)
        if not found.valid or (found.valid[0].finished and not self.identity.matches(found.valid[0])):
            return self.begin(found)
        return self.resume(found, f"put them back, or remove {self.folder} to begin anew")

    def train(
        self, config: SaveConfig, metrics: Path | None, again: str
    ) -> Iterator[Report | CheckpointSaved]:
        """Train to the end, saving on the way; afterwards the model holds the adapter to keep.

        That is the one of the best validation when the training has patience,
        and else the last one; :attr:`adapter_step` tells.

        Args:
            config: when to save.
            metrics: a file that gets each report as a line of JSON.
            again: the command that goes on with this training.

        Raises:
            Interrupted: a signal came; the step it came in is done and saved.
            DivergedError: a loss or a gradient is not finite; the state before it is saved.
            PluginError: the base has changed.
            ResourceError: a checkpoint cannot be written; those before it are as they were.
        """
        if metrics is not None:
            _trim(metrics, self.training.progress.step)
        with signals.deferred() as pending:
            saved_at = time.monotonic()
            try:
                for reports in self.training:
                    for report in reports:
                        if metrics is not None:
                            durable.append_line(metrics, json.dumps(report_line(report)))
                        yield report
                    waited = time.monotonic() - saved_at
                    if pending.signum is not None or self._due(config, waited):
                        yield from self._save(config)
                        saved_at = time.monotonic()
                    if pending.signum is not None:
                        raise signals.Interrupted(pending.signum, self._farewell(again))
            except DivergedError:
                with suppress(DivergedError):  # of a state that is not sound itself
                    yield from self._save(config)
                raise
        self._take_best()

    # --- saving ---

    def _due(self, config: SaveConfig, seconds: float) -> bool:
        progress = self.training.progress
        if progress.step == 0:
            return False
        return (
            progress.step % config.save_every == 0
            or progress.step == progress.best_step
            or seconds >= 60 * config.save_minutes
            or self.training.finished
        )

    def _save(self, config: SaveConfig) -> Iterator[CheckpointSaved]:
        """Write a checkpoint of where the training stands, unless there is one, and prune."""
        step = self.training.progress.step
        if step == 0 or step in self._valid:
            return
        started = time.perf_counter()
        self._check_state()
        try:
            self._write(step)
        except ResourceError:
            if not durable.clear_leftovers(self.folder, "*"):
                raise
            self._write(step)  # the room that a dead process held is free now
        self._valid.append(step)
        self._prune(config.keep)
        yield CheckpointSaved(step, time.perf_counter() - started)

    def _check_state(self) -> None:
        """Refuse to save what is not sound."""
        changed = sorted(name for name, total in _base_sums(self._model).items() if total != self._base[name])
        if changed:
            raise PluginError(
                f"the base has changed in training, which an adapter must not do: {listing(changed)}",
                where=f"plugin {self._adapted.choice.component.plugin}",
            )
        tensors = self.training.optimizer_tensors()
        floating = {n: t for n, t in tensors.items() if mx.issubdtype(t.dtype, mx.floating)}
        odd = [name for name, tensor in floating.items() if not tensor_file.is_finite(tensor)]
        if odd:
            raise DivergedError(
                f"the state of the optimizer is not finite and was not saved: {listing(odd)}",
                fix="lower --learning-rate, or set --grad-clip 1",
            )

    def _write(self, step: int) -> None:
        target = self.folder / f"step-{step:07}"
        durable.put_aside(target, "damaged")  # it does not verify, or it would not be written again
        with durable.new_folder(target) as new:
            adapters.save(new / ADAPTER, self._model, self._adapted)
            tensors = self.training.optimizer_tensors()
            tensor_file.save(new / OPTIMIZER, sorted(tensors.items()), {}, len(tensors))
            for name in (ADAPTER, OPTIMIZER):
                _check_written(new / name)
            state = {**asdict(self.training.progress), "seed": self.training.seed, "resumed": self._resumed}
            durable.write_json(new / STATE, state)
            files = {n: {"bytes": (new / n).stat().st_size, "sha256": sha256(new / n)} for n in PARTS}
            head = {"schema": SCHEMA, "step": step, "finished": self.training.finished, "files": files}
            manifest = {**head, **asdict(self.identity)}
            durable.write_json(new / MANIFEST, {**manifest, "sha256": digest(manifest)})

    def _prune(self, keep: int) -> None:
        """Remove what is neither among the newest nor the best; what does not verify is never touched."""
        for step in [s for s in self._valid[:-keep] if s != self.training.progress.best_step]:
            durable.remove_folder(self.folder / f"step-{step:07}")
            self._valid.remove(step)

    def _farewell(self, again: str) -> str:
        step = self.training.progress.step
        if step == 0:
            return "interrupted before the first step; nothing was saved"
        return f"interrupted; step {step} is saved. Go on with: {again}"

    def _take_best(self) -> None:
        """Put the adapter of the best validation on the model where patience asks for it."""
        progress = self.training.progress
        self.adapter_step = progress.step
        if self.training.config.patience is not None and progress.best_step in self._valid:
            adapters.fill(self.folder / f"step-{progress.best_step:07}" / ADAPTER, self._model)
            self.adapter_step = progress.best_step


def report_line(report: Report) -> dict[str, Any]:
    """One line of metrics.jsonl; a number that is not finite, which JSON cannot hold, is null."""
    values = asdict(report)
    kind = type(report).__name__.removesuffix("Report").lower()
    odd = {k: None for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return {"kind": kind, **values, **odd}


def _trim(metrics: Path, step: int) -> None:
    """Leave only the whole lines of a log up to ``step``; none of them at the start."""
    lines = metrics.read_bytes().split(b"\n") if step and metrics.is_file() else []
    kept = [line.decode() + "\n" for line in lines if _step_of(line) <= step]
    durable.write_text(metrics, "".join(kept))


def _step_of(line: bytes) -> float:
    """The step of a line of a log; infinite for one that is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def _read_state(checkpoint: Checkpoint) -> tuple[Progress, list[dict[str, Any]]]:
    """Where a checkpoint stands, and where its training was taken up before."""
    path = checkpoint.folder / STATE
    try:
        state = json.loads(path.read_text("utf-8"))
        resumed = list(state.pop("resumed"))
        del state["seed"]  # the settings hold it too
        window = Window(**state.pop("window"))
        progress = Progress(**state | {"recent": tuple(state["recent"]), "window": window})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as fault:
        raise ModelError(f"is no state of a training: {fault}", where=path) from fault
    if progress.step != checkpoint.step:
        raise ModelError(f"is of step {progress.step}, wanted {checkpoint.step}", where=path)
    return progress, resumed


def _check_written(path: Path) -> None:
    """Read a file of tensors back, before anything relies on it."""
    tensors, metadata = tensor_file.load(path)
    if tensor_file.fingerprint(tensors) != metadata[tensor_file.FINGERPRINT]:
        raise ResourceError("what is read back is not what was written", where=path, fix="check the disk")


def _base_sums(model: Model) -> dict[str, int]:
    """name -> sum of the bits of each parameter that is frozen; one pass over memory."""
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    trained = trainable(model.module)
    frozen = {name: t for name, t in parameters(model.module).items() if name not in trained}
    sums = {name: t.view(words[t.dtype.size]).sum() for name, t in frozen.items()}
    mx.eval(list(sums.values()))
    return {name: int(total) for name, total in sums.items()}
