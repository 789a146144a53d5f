"""Checkpoints: a training that was killed goes on from the newest one and ends bit for bit the same.

A checkpoint is a folder ``step-0000120`` that appears whole::

    adapter.safetensors    the adapter file of that step
    optimizer.safetensors  the state of the optimizer
    state.json             step, counters, losses, seed
    MANIFEST.json          size and SHA-256 of these, and what the training is made of

It counts only when its manifest verifies. What a step draws at random is a
function of (seed, step), and the rows of a step are one of (seed, step) and the
data, so that seed and step are the random state and the place in the data.

What finds and checks checkpoints needs no MLX.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core import __version__, durable, signals
from mlxlora_core.errors import (
    DivergedError,
    ModelError,
    PluginError,
    ResourceError,
    SafetyError,
    UsageError,
    some,
)
from mlxlora_core.options import plain
from mlxlora_core.registry import Registry
from mlxlora_core.train_config import SaveConfig

if TYPE_CHECKING:
    from mlxlora_core.adapter_file import Adapted
    from mlxlora_core.data import Example
    from mlxlora_core.model_folder import Model
    from mlxlora_core.train import Progress, Report, Training

SCHEMA = 1
MANIFEST = "MANIFEST.json"
ADAPTER, OPTIMIZER, STATE = PARTS = ("adapter.safetensors", "optimizer.safetensors", "state.json")

_NAME = re.compile(r"step-([0-9]{7,})")
_MANIFEST_BYTES = 16 * 2**20  # far more than any manifest has


# --- finding ------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what its manifest says.

    Attributes:
        folder: where it is.
        manifest: what ``MANIFEST.json`` holds.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps made before it."""
        return int(self.manifest["step"])

    @property
    def finished(self) -> bool:
        """Whether the training was at its end."""
        return bool(self.manifest["finished"])


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        valid: checkpoints that verify, newest first.
        damaged: folder -> why it does not verify, newest first.
    """

    valid: tuple[Checkpoint, ...]
    damaged: Mapping[Path, str]

    @property
    def notes(self) -> list[str]:
        """A line on each that is passed over."""
        return [f"warning: {folder} was skipped: {reason}" for folder, reason in self.damaged.items()]


def find(folder: Path) -> Found:
    """The checkpoints in a folder, which may be absent; nothing is changed.

    Raises:
        ModelError: it is no folder, or a checkpoint was made by a newer mlxlora.
        ResourceError: the folder cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise ModelError("is no folder of checkpoints", where=folder, fix="move it away")
    try:
        names = [path.name for path in folder.iterdir() if _step(path.name)] if folder.is_dir() else []
    except OSError as fault:
        raise ResourceError(f"cannot be read: {fault.strerror}", where=folder) from fault
    valid, damaged = [], {}
    for name in sorted(names, key=_step, reverse=True):
        try:
            valid.append(Checkpoint(folder / name, _verified(folder / name)))
        except _Damaged as fault:
            damaged[folder / name] = str(fault)
    return Found(tuple(valid), damaged)


def find_to_resume(folder: Path) -> Found:
    """The checkpoints in a folder, of which there is one that verifies.

    Raises:
        ModelError: there is none.
        MlxloraError: as :func:`find`.
    """
    durable.clear_leftovers(folder, "step-*")
    found = find(folder)
    if found.valid:
        return found
    damaged = "".join(f"; {path.name}: {reason}" for path, reason in found.damaged.items())
    raise ModelError(
        f"there is no checkpoint that verifies: looked for step-*/{MANIFEST}{damaged}",
        where=folder,
        fix="leave --resume out to begin, or name the --adapter-file that was trained",
    )


def find_to_begin(folder: Path, *, overwrite: bool) -> Found:
    """The checkpoints in a folder, none of which is of a training that can go on unless ``overwrite``.

    Raises:
        SafetyError: they are.
        MlxloraError: as :func:`find`.
    """
    durable.clear_leftovers(folder, "step-*")
    found = find(folder)
    there = found.valid or found.damaged
    if there and not overwrite and not (found.valid and found.valid[0].finished):
        where = f"step {found.valid[0].step}" if found.valid else "none of them verifies"
        raise SafetyError(
            f"holds checkpoints of a training that has not ended ({where})",
            where=folder,
            fix="go on with --resume, or begin anew with --overwrite",
        )
    return found


def check_plugins(found: Found, registry: Registry) -> None:
    """Refuse to go on without the plugins that the newest checkpoint was made with.

    Raises:
        PluginError: with how to install them.
    """
    if not found.valid:
        return
    newest = found.valid[0]
    active = {plugin.name for plugin in registry.plugins if plugin.status == "active"}
    gone = {n: p for n, p in newest.manifest["plugins"].items() if n not in active}
    if gone:
        wanted = sorted({f"{p['distribution']}=={p['version']}" for p in gone.values() if p["version"]})
        raise PluginError(
            f"the checkpoint was made with plugins that are not active: {some(gone)}",
            where=newest.folder,
            fix=f"pip install {' '.join(wanted)}" if wanted else "name the plugin's file with -P",
        )


class _Damaged(Exception):
    """Why a folder is no checkpoint."""


def _step(name: str) -> int:
    """The step in the name of a checkpoint, or 0."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


def _verified(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what it says."""
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MANIFEST_BYTES:
            raise _Damaged(f"there is no {MANIFEST}")
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise _Damaged(f"{MANIFEST} cannot be read: {fault}") from fault
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int):
        raise _Damaged(f"{MANIFEST} is not one of mlxlora")
    if schema > SCHEMA:
        raise ModelError(
            f"was made by a newer mlxlora (format {schema}, this one knows {SCHEMA})",
            where=folder,
            fix="upgrade with: pip install --upgrade mlxlora",
        )
    kinds = {"step": int, "finished": bool, "files": dict, "base": str, "data": dict, "settings": dict}
    kinds |= {"plugins": dict, "versions": dict}
    odd = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    if odd:
        raise _Damaged(f"{MANIFEST} lacks {some(odd)}")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise _Damaged(f"{MANIFEST} is not what was written")
    if manifest["step"] != _step(folder.name) or manifest["files"].keys() != set(PARTS):
        raise _Damaged(f"{MANIFEST} is that of another checkpoint")
    for name, stated in manifest["files"].items():
        _check_part(folder / name, stated)
    return dict(manifest)


def _check_part(path: Path, stated: Mapping[str, Any]) -> None:
    try:
        if path.is_symlink() or not path.is_file():
            raise _Damaged(f"there is no {path.name}")
        size = path.stat().st_size
        if size != stated["bytes"]:
            raise _Damaged(f"{path.name} has {size} bytes, {stated['bytes']} were written")
        if _sha256(path) != stated["sha256"]:
            raise _Damaged(f"{path.name} is not what was written")
    except (OSError, KeyError, TypeError) as fault:
        raise _Damaged(f"{path.name} cannot be read: {fault}") from fault


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of what a manifest says, without this."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what a training is made of -----------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What decides the result of a training.

    Attributes:
        base: fingerprint of the base with its tokenizer.
        tokenizer: fingerprint of the tokenizer alone.
        data: split -> fingerprint of its tokens and masks.
        settings: name -> value of all that can be set.
        plugins: name -> distribution and version of those it needs.
        versions: what computes it; other ones may round otherwise.
    """

    base: str
    tokenizer: str
    data: Mapping[str, str]
    settings: Mapping[str, Any]
    plugins: Mapping[str, Mapping[str, str]]
    versions: Mapping[str, str]


def identify(
    model: Model,
    adapted: Adapted,
    training: Training,
    splits: Mapping[str, Sequence[Example]],
    registry: Registry,
    runtimes: Sequence[str] = (),
) -> Identity:
    """The identity of a training.

    Args:
        model: the base with the adapter on it.
        adapted: the adapter.
        training: settings and seed.
        splits: ``train`` and, where there is one, ``valid``.
        registry: where the plugins of the base are looked up.
        runtimes: what the runtimes said of themselves.
    """
    from mlxlora_core.model_folder import CONFIG, find_architecture

    components = [adapted.component, find_architecture(model.config, registry, model.folder / CONFIG)]
    if model.quantization is not None:
        components.append(model.quantization.quantizer)
    settings = plain(training.config) | {
        "seed": training.seed,
        "adapter": adapted.component.id,
        **{f"adapter.{name}": value for name, value in plain(adapted.options).items()},
        "adapted": list(adapted.paths),
    }
    plugins = {c.plugin.name: c.plugin for c in components}
    return Identity(
        base=model.fingerprint,
        tokenizer=model.tokenizer.fingerprint,
        data={name: _data_fingerprint(examples) for name, examples in splits.items()},
        settings=json.loads(json.dumps(settings)),
        plugins={n: {"distribution": p.distribution, "version": p.version} for n, p in plugins.items()},
        versions={
            "mlxlora": __version__,
            **{f"plugin {p.name}": p.version for p in plugins.values() if p.distribution != "mlxlora"},
            "mlx": version("mlx"),
            "python": platform.python_version(),
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "runtimes": "; ".join(runtimes),
        },
    )


def _data_fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(example.tokens.tobytes())
        digest.update(example.mask.tobytes())
    return digest.hexdigest()


def _free(old: Mapping[str, Any], new: Mapping[str, Any], step: int) -> set[str]:
    """The settings that cannot change what comes after ``step``."""
    free = {"steps_per_report", "on_nonfinite"}  # a training that ends ends the same with either policy
    if old["patience"] is None and new["patience"] is None:
        free |= {"steps_per_eval", "val_batches"}
        if old["schedule"] == new["schedule"] == "constant" and new["iters"] >= step:
            free.add("iters")
    return free


class SettingsChanged(UsageError):
    """A training that was begun with other settings.

    Attributes:
        rows: (name, old value, new value) of each that differs.
    """

    def __init__(self, rows: Sequence[tuple[str, str, str]], where: Path, fix: str) -> None:
        self.rows = rows
        changes = some((f"{name} {old} -> {new}" for name, old, new in rows), 20)
        super().__init__(f"the training was begun with other settings: {changes}", where=where, fix=fix)


# --- saving and going on ------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written.

    Attributes:
        step: steps made before it.
        seconds: how long it took.
    """

    step: int
    seconds: float


class Checkpoints:
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
        from mlxlora_core import adapter_file, tensor_file

        newest = found.valid[0]
        notes = [*found.notes, *self._compare(newest, fix)]
        progress, self._resumed = _read_state(newest)
        adapter_file.fill(newest.folder / ADAPTER, self._model)
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
        if not found.valid or (found.valid[0].finished and not self._is_mine(found.valid[0])):
            return self.begin(found)
        return self.resume(found, f"put them back, or remove {self.folder} to begin anew")

    def train(self, config: SaveConfig, metrics: Path | None, again: str) -> Iterator[Report | Saved]:
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

    # --- beginning and going on ---

    def _is_mine(self, checkpoint: Checkpoint) -> bool:
        """Whether it is of this very training, computed by the same versions."""
        known = asdict(self.identity)
        return all(checkpoint.manifest.get(key) == value for key, value in known.items())

    def _compare(self, checkpoint: Checkpoint, fix: str) -> list[str]:
        """Refuse a checkpoint of another training; warnings for what may round otherwise."""
        held, mine = checkpoint.manifest, self.identity
        if held["base"] != mine.base:
            raise ModelError(
                f"was made with another base ({held['base'][:12]}, this one is {mine.base[:12]}; tokenizer "
                f"{str(held.get('tokenizer'))[:12]}, this one {mine.tokenizer[:12]})",
                where=checkpoint.folder,
                fix="use the model folder that it was begun with",
            )
        old, new = held["settings"], mine.settings
        names = sorted(old.keys() | new.keys())
        changed = [name for name in names if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
        fixed = [name for name in changed if name not in _free(old, new, checkpoint.step)]
        if fixed:
            rows = [(name, str(old.get(name, _ABSENT)), str(new.get(name, _ABSENT))) for name in fixed]
            raise SettingsChanged(rows, checkpoint.folder, fix)
        splits = ("train", "valid") if new["patience"] is not None else ("train",)
        for split in splits:
            was, now = held["data"].get(split, _ABSENT), mine.data.get(split, _ABSENT)
            if was != now:
                raise ModelError(
                    f"the {split} rows have changed since ({was[:12]}, now {now[:12]})",
                    where=checkpoint.folder,
                    fix="put the rows back that it was begun with",
                )
        versions = held["versions"]
        return [
            f"warning: the result may not be bit-exact across {name} {versions.get(name)} -> {now}"
            for name, now in mine.versions.items()
            if versions.get(name) != now
        ]

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

    def _save(self, config: SaveConfig) -> Iterator[Saved]:
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
        yield Saved(step, time.perf_counter() - started)

    def _check_state(self) -> None:
        """Refuse to save what is not sound."""
        import mlx.core as mx

        from mlxlora_core import tensor_file

        changed = sorted(name for name, total in _base_sums(self._model).items() if total != self._base[name])
        if changed:
            raise PluginError(
                f"the base has changed in training, which an adapter must not do: {some(changed)}",
                where=f"plugin {self._adapted.component.plugin}",
            )
        tensors = self.training.optimizer_tensors()
        floating = {n: t for n, t in tensors.items() if mx.issubdtype(t.dtype, mx.floating)}
        odd = [name for name, tensor in floating.items() if not tensor_file.is_finite(tensor)]
        if odd:
            raise DivergedError(
                f"the state of the optimizer is not finite and was not saved: {some(odd)}",
                fix="lower --learning-rate, or set --grad-clip 1",
            )

    def _write(self, step: int) -> None:
        from mlxlora_core import adapter_file, tensor_file

        target = self.folder / f"step-{step:07}"
        durable.put_aside(target, "damaged")  # it does not verify, or it would not be written again
        with durable.new_folder(target) as new:
            adapter_file.save(new / ADAPTER, self._model, self._adapted)
            tensors = self.training.optimizer_tensors()
            tensor_file.save(new / OPTIMIZER, sorted(tensors.items()), {}, len(tensors))
            for name in (ADAPTER, OPTIMIZER):
                _check_written(new / name)
            state = {**asdict(self.training.progress), "seed": self.training.seed, "resumed": self._resumed}
            durable.write_json(new / STATE, state)
            files = {n: {"bytes": (new / n).stat().st_size, "sha256": _sha256(new / n)} for n in PARTS}
            head = {"schema": SCHEMA, "step": step, "finished": self.training.finished, "files": files}
            manifest = {**head, **asdict(self.identity)}
            durable.write_json(new / MANIFEST, {**manifest, "sha256": _digest(manifest)})

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
        from mlxlora_core import adapter_file

        progress = self.training.progress
        self.adapter_step = progress.step
        if self.training.config.patience is not None and progress.best_step in self._valid:
            adapter_file.fill(self.folder / f"step-{progress.best_step:07}" / ADAPTER, self._model)
            self.adapter_step = progress.best_step


_ABSENT = "none"


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
    from mlxlora_core.train import Progress, Window

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
    from mlxlora_core import tensor_file

    tensors, metadata = tensor_file.load(path)
    if tensor_file.fingerprint(tensors) != metadata[tensor_file.FINGERPRINT]:
        raise ResourceError("what is read back is not what was written", where=path, fix="check the disk")


def _base_sums(model: Model) -> dict[str, int]:
    """name -> sum of the bits of each parameter that is frozen; one pass over memory."""
    import mlx.core as mx

    from mlxlora_core.adapter_file import trainable
    from mlxlora_core.model_folder import parameters

    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    trained = trainable(model.module)
    frozen = {name: t for name, t in parameters(model.module).items() if name not in trained}
    sums = {name: t.reshape(-1).view(words[t.dtype.size]).sum() for name, t in frozen.items()}
    mx.eval(list(sums.values()))
    return {name: int(total) for name, total in sums.items()}
