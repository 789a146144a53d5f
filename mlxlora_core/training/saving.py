"""The folder of checkpoints of one training: begun, gone on from, written and pruned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import DivergedError, PluginError, ResourceError, listing
from mlxlora_core.files import durable, leftovers, tensor_file
from mlxlora_core.files.room import written
from mlxlora_core.files.tensor_checks import is_finite
from mlxlora_core.model import adapters
from mlxlora_core.model.adapter_record import TrainingRecord
from mlxlora_core.model.adapters import Adapted, adapter_parameters
from mlxlora_core.model.linears import parameters
from mlxlora_core.model.loading import Model
from mlxlora_core.training.checkpoints import (
    ADAPTER,
    MANIFEST,
    OPTIMIZER,
    PARTS,
    SCHEMA,
    STATE,
    Checkpoint,
    Found,
    Start,
    digest,
    find_for,
    is_ours,
    refuse_strange,
    sha256,
    step_of,
)
from mlxlora_core.training.events import CheckpointSaved
from mlxlora_core.training.identity import Identity
from mlxlora_core.training.loop import Training
from mlxlora_core.training.progress import read_progress


class CheckpointFolder:
    """Where one training is saved.

    Args:
        path: the folder; made when the first checkpoint is written.
        training: at its start.
        model: the base with the adapter on it.
        adapted: the adapter.
        identity: of the training.
    """

    def __init__(
        self, path: Path, training: Training, model: Model, adapted: Adapted, identity: Identity
    ) -> None:
        self.path = path
        self._training, self._model, self._adapted, self._identity = training, model, adapted, identity
        self._valid: list[int] = []  # steps of the checkpoints that verify, in order
        self._resumed: list[dict[str, Any]] = []  # where the training was taken up, and by what
        self._base = _base_sums(model, adapted)

    def start(self, how: Start, found: Found | None = None) -> list[str]:
        """Begin, or put the training where the newest checkpoint stands.

        With :attr:`Start.CONTINUE` a finished training of other settings, data or
        versions is begun anew.

        Args:
            how: to start.
            found: as :func:`find_for` gives it, where that was asked already.

        Returns:
            What there is to tell.

        Raises:
            SettingsChanged: what is there was begun with other settings.
            ModelError: it is of another base or of other data.
            MlxloraError: as :func:`find_for`.
        """
        found = find_for(how, self.path) if found is None else found
        if how is Start.RESUME:
            return self._resume(found, "put them back, or begin anew with --overwrite instead of --resume")
        if how is Start.CONTINUE and self._goes_on(found):
            return self._resume(found, f"put them back, or remove {self.path} to begin anew")
        return self._begin(found)

    def _goes_on(self, found: Found) -> bool:
        """Whether there is a training that has not ended, or this very one."""
        return any(not newest.finished or self._as(newest).matches(newest) for newest in found.valid[:1])

    def _as(self, checkpoint: Checkpoint) -> Identity:
        """The identity of the training as a checkpoint has begun it, where nobody has said otherwise.

        What is settled by itself may depend on settings that may change, and has to stay as it was.
        """
        config = self._training.config
        names = [name for name in ("compile", "packing", "reuse_prefix") if getattr(config, name) == "auto"]
        return self._identity.going_on_from(checkpoint, names)

    def _begin(self, found: Found) -> list[str]:
        """Begin anew: the checkpoints that were found go, and those that do not verify are put aside."""
        refuse_strange(found.strange)
        for folder in found.damaged:
            durable.put_aside(folder, "damaged")
        # The newest goes last, so that what is left tells the same until then.
        for checkpoint in reversed(found.valid):
            durable.remove_folder(checkpoint.folder)
        removed = f"{len(found.valid)} checkpoints of an earlier training were removed"
        return [*found.notes, *([removed] if found.valid else [])]

    def _resume(self, found: Found, fix: str) -> list[str]:
        """Go on from the newest checkpoint; ``fix`` is what to do about other settings."""
        training, newest = self._training, found.valid[0]
        # The others are behind: no step will be written there any more.
        refuse_strange([folder for folder in found.strange if step_of(folder.name) > newest.step])
        self._identity = self._as(newest)
        notes = [*found.notes, *self._identity.compare(newest, fix)]
        settings = self._identity.settings
        training.arrange(settings["compile"] == "on", settings["packing"] == "on")
        if training.prefix is not None:
            training.prefix.go_on(settings["reuse_prefix"] == "on")
        progress, self._resumed = read_progress(newest.state), list(newest.state["resumed"])
        adapters.fill(newest.folder / ADAPTER, self._model, self._adapted)
        tensors, _ = tensor_file.load(newest.folder / OPTIMIZER)
        training.restore(progress, tensors)
        self._valid = sorted(checkpoint.step for checkpoint in found.valid)
        self._resumed.append({"step": progress.step, "versions": dict(self._identity.versions)})
        steps = training.config.iters
        if training.finished:
            return [*notes, f"nothing to do: step {progress.step} of {steps} was the last"]
        return [*notes, f"resumed at step {progress.step} of {steps}"]

    def save(self, keep: int) -> Iterator[CheckpointSaved]:
        """Write a checkpoint of where the training stands, unless there is one, and prune.

        Args:
            keep: how many of the newest stay, beside the best.

        Raises:
            DivergedError: the adapter or the optimizer is not finite.
            PluginError: the base has changed.
            ResourceError: it cannot be written; those before it are as they were.
        """
        step = self._training.progress.step
        if step == 0 or step in self._valid:
            return
        started = time.perf_counter()
        self.check_state()
        try:
            written(partial(self._write, step))
        except ResourceError:
            if not leftovers.clear_leftovers(self.path, "*"):
                raise
            self._write(step)  # the room that a dead process held is free now
        self._valid.append(step)
        self._prune(keep)
        yield CheckpointSaved(step, time.perf_counter() - started)

    def put_back(self, step: int) -> bool:
        """Put the adapter of a step on the model, if it is kept; whether it is."""
        if step not in self._valid:
            return False
        adapters.fill(self._folder(step) / ADAPTER, self._model, self._adapted)
        return True

    def record(self, step: int | None = None) -> TrainingRecord:
        """What the adapter of a step, or of this one, says of the training; told by what is resumed alone."""
        progress, identity = self._training.progress, self._identity
        now = step in (None, progress.step)
        recent = progress.recent if now else ()
        return TrainingRecord(
            step=progress.step if step is None else step,
            train_loss=sum(recent) / len(recent) if recent else None,
            first_valid_loss=progress.first_loss,
            best_valid_loss=progress.best_loss,
            data=identity.data,
            settings=identity.settings,
        )

    def check_state(self) -> None:
        """Refuse to save what is not sound.

        Raises:
            DivergedError: the optimizer is not finite.
            PluginError: the base has changed.
        """
        sums = _base_sums(self._model, self._adapted)
        changed = sorted(name for name, total in sums.items() if total != self._base[name])
        if changed:
            raise PluginError(
                f"the base has changed in training, which an adapter must not do: {listing(changed)}",
                where=f"plugin {self._adapted.choice.component.plugin}",
            )
        tensors = self._training.optimizer_tensors()
        floating = {n: t for n, t in tensors.items() if mx.issubdtype(t.dtype, mx.floating)}
        odd = [name for name, tensor in floating.items() if not is_finite(tensor)]
        if odd:
            raise DivergedError(
                f"the state of the optimizer is not finite and was not saved: {listing(odd)}",
                fix="lower --learning-rate, or set --grad-clip 1",
            )

    def _write(self, step: int) -> None:
        target = self._folder(step)
        durable.put_aside(target, "damaged")  # it does not verify, or it would not be written again
        with durable.new_folder(target) as new:
            adapters.save(new / ADAPTER, self._model, self._adapted, self.record())
            tensors = self._training.optimizer_tensors()
            tensor_file.save(new / OPTIMIZER, sorted(tensors.items()), {}, len(tensors))
            for name in (ADAPTER, OPTIMIZER):
                _check_written(new / name)
            state = {**asdict(self._training.progress), "seed": self._training.seed, "resumed": self._resumed}
            durable.write_json(new / STATE, state)
            files = {n: {"bytes": (new / n).stat().st_size, "sha256": sha256(new / n)} for n in PARTS}
            head = {"schema": SCHEMA, "step": step, "finished": self._training.finished, "files": files}
            manifest = {**head, **asdict(self._identity)}
            durable.write_json(new / MANIFEST, {**manifest, "sha256": digest(manifest)})

    def _prune(self, keep: int) -> None:
        """Remove what is neither among the newest nor the best; what does not verify is never touched."""
        for step in [s for s in self._valid[:-keep] if s != self._training.progress.best_step]:
            if is_ours(self._folder(step)):  # else somebody has put a file beside
                durable.remove_folder(self._folder(step))
            self._valid.remove(step)

    def _folder(self, step: int) -> Path:
        return self.path / f"step-{step:07}"


def _check_written(path: Path) -> None:
    """Read a file of tensors back, before anything relies on it."""
    tensors, metadata = tensor_file.load(path)
    if tensor_file.fingerprint(tensors) != metadata[tensor_file.FINGERPRINT]:
        raise ResourceError("what is read back is not what was written", where=path, fix="check the disk")


def _base_sums(model: Model, adapted: Adapted) -> dict[str, int]:
    """name -> sum of the bits of each parameter of the base; one pass over memory."""
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    added = adapter_parameters(model.module, adapted.paths)
    frozen = {name: t for name, t in parameters(model.module).items() if name not in added}
    sums = {name: t.view(words[t.dtype.size]).sum() for name, t in frozen.items()}
    mx.eval(list(sums.values()))
    return {name: int(total) for name, total in sums.items()}
