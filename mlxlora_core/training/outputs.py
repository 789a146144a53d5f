"""The files that a training writes, checked before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlxlora_core.errors import DataError, ModelError, SafetyError, UsageError
from mlxlora_core.files import lock, writable
from mlxlora_core.files.data_path import file_names
from mlxlora_core.files.documents import parse_json
from mlxlora_core.files.input_file import open_regular
from mlxlora_core.files.targets import is_written, refuse_inputs
from mlxlora_core.machine.memory import require_start
from mlxlora_core.training.checkpoints import Start
from mlxlora_core.training.settings import SaveConfig

#: kind of a line of the log of a training -> what each such line has told since there is one
_LINES = {
    "train": {"step", "loss", "learning_rate", "trained_tokens"},
    "valid": {"step", "loss", "tokens", "seconds"},
    "spike": {"step", "loss", "median"},
}
_LINE_HEAD = b'{"kind": "'
_MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "weights.npz",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class Outputs:
    """What a training leaves on the disk; what is None is not written.

    Attributes:
        adapter_file: the adapter, at the end.
        checkpoints: the folder of checkpoints; without one a training cannot be gone on with.
        metrics: each report as a line of JSON.
        saving: when checkpoints are written.
        resume_command: the command that goes on with this training, told when it is interrupted.
    """

    adapter_file: Path | None = None
    checkpoints: Path | None = None
    metrics: Path | None = None
    saving: SaveConfig = field(default_factory=SaveConfig)
    resume_command: str = ""


def inputs_of(model: Path, data: Path | None = None, *files: Path | None) -> list[Path]:
    """What a training reads: its model, its rows, each file that is looked for there, and others.

    A file that is not there yet counts: a log called ``valid.jsonl`` would be rows the next time.
    """
    read = [model, *(model / name for name in _MODEL_FILES)]
    if data is not None:
        read += [data, *(data / name for name in file_names())]
    return [*read, *(path for path in files if path is not None)]


def checkpoints_of(adapter_file: Path) -> Path:
    """The folder of checkpoints of the training that writes an adapter file: ``NAME.checkpoints`` beside it.

    Raises:
        UsageError: the path ends in no name.
    """
    if not adapter_file.name:
        raise UsageError("is the name of no file", where=adapter_file, fix="name the adapter file to write")
    return adapter_file.with_name(f"{adapter_file.stem}.checkpoints")


@contextmanager
def held(outputs: Outputs) -> Iterator[None]:
    """Keep every other training from all that this one writes, by whatever name another one knows it.

    Raises:
        UsageError: two outputs go to one place.
        LockedError: another one has it.
        MlxloraError: as :func:`~mlxlora_core.files.lock.hold`.
    """
    with ExitStack() as locks:
        for path in _places(outputs):
            locks.enter_context(lock.hold(path))
        yield


def _places(outputs: Outputs) -> list[Path]:
    """What is written.

    Raises:
        UsageError: two outputs go to one place.
    """
    paths = [
        path for path in (outputs.adapter_file, outputs.checkpoints, outputs.metrics) if path is not None
    ]
    places: dict[Path, Path] = {}
    for path in paths:
        other = places.setdefault(writable.place_of(path), path)
        if other is not path:
            raise UsageError(f"two outputs go here ({other})", where=path, fix="name another place for one")
    return paths


def check_outputs(outputs: Outputs, inputs: Iterable[Path] = ()) -> None:
    """Refuse outputs that could not or must not be written at the end of long work.

    Args:
        outputs: of a training.
        inputs: what it reads.

    Raises:
        UsageError: an output is an input, or two of them are one.
        ModelError: an adapter file whose name says no format.
        SafetyError: a file that mlxlora has not written, or no regular file, is there.
        ResourceError: a folder cannot be written.
    """
    read = list(inputs)
    for path in _places(outputs):
        refuse_inputs(path, read)
    if outputs.adapter_file is not None:
        _is_adapter_there(outputs.adapter_file)
    if outputs.checkpoints is not None:
        writable.check_folder(outputs.checkpoints)
    if outputs.metrics is not None:
        writable.check_file(outputs.metrics)
        is_written(outputs.metrics, is_log)


def refuse_finished(adapter_file: Path | None, how: Start) -> None:
    """Refuse to begin a training at whose end an adapter that is there would be replaced.

    Raises:
        SafetyError: there is one, and nobody said to overwrite it.
        MlxloraError: as :func:`check_outputs`.
    """
    if how is Start.BEGIN and adapter_file is not None and _is_adapter_there(adapter_file):
        raise SafetyError(
            "holds an adapter already and was left alone",
            where=adapter_file,
            fix="add --overwrite, or name another file with --adapter-file",
        )


def _is_adapter_there(path: Path) -> bool:
    """Whether an adapter file of ours is there; anything else that is there is refused."""
    require_start()  # MLX is loaded here, before the verb has started it
    from mlxlora_core.files import tensor_file
    from mlxlora_core.model import adapters

    tensor_file.check_ending(path)
    writable.check_file(path)
    return is_written(path, adapters.is_ours)


def is_log(path: Path) -> bool:
    """Whether each line of a file, but for one that is torn at its end, is one of a training's log."""
    try:
        with open_regular(path, DataError) as file:
            return all(_is_report(line) if line.endswith(b"\n") else _is_torn(line) for line in file)
    except (DataError, OSError):
        return False


def _is_torn(line: bytes) -> bool:
    return line.startswith(_LINE_HEAD) or _LINE_HEAD.startswith(line)


def _is_report(line: bytes) -> bool:
    try:
        told = parse_json(line, "")
        return isinstance(told, dict) and _LINES[told["kind"]] <= told.keys()
    except (ModelError, TypeError, KeyError):
        return False
