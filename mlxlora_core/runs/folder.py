"""The run folder: what has been done in it, for which inputs, and what came of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from mlxlora_core.errors import DataError
from mlxlora_core.files import durable
from mlxlora_core.files.documents import finite, read_sound
from mlxlora_core.runs.results import RECORD_FORM

RECORD = "run.json"
RECIPE = "recipe.toml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
REPORT = "report.html"
ADAPTER = "adapter/adapter.safetensors"
CHECKPOINTS = "checkpoints"
MODEL = "model"
DATA = "data"
EXPORT = "export"

_RECORD_BYTES = 64 << 20
_AWAY = "move the folder away, or name another"


class RunFolder:
    """A folder and its ``run.json``.

    Attributes:
        path: the folder.
        record: the sound part of what ``run.json`` holds (see :mod:`mlxlora_core.runs.results`);
            nothing where there is none.
        faults: what in it is not sound, in words.

    Raises:
        DataError: ``run.json`` cannot be read, or is no record of a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {}
        self.faults: list[str] = []
        if os.path.lexists(path / RECORD):
            self.record, self.faults = read_sound(path / RECORD, RECORD_FORM, _RECORD_BYTES, DataError, _AWAY)

    def begin(self, facts: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
        """Make the folder, and write the recipe, as plain values, and the facts of this run.

        Whether it may is for :func:`mlxlora_core.runs.places.check_run` to say.
        """
        kept = {key: self.record.get(key, {}) for key in ("started", "stages")}
        self.record = {**facts, **kept}
        self._save()  # first, so that a folder that a killed run began is known again
        durable.write_text(self.path / RECIPE, tomli_w.dumps(_in_unicode(recipe)))

    def holds(self, stage: str, fingerprint: str) -> bool:
        """Whether a stage was done for these inputs and its files are as it left them."""
        done = self.record.get("stages", {}).get(stage)
        if done is None or done["inputs"] != fingerprint:
            return False
        return all(file_stat(self.path / name) == stat for name, stat in done["files"].items())

    def start(self, stage: str, fingerprint: str) -> None:
        """Record that a stage begins to write its files."""
        self.record["started"][stage] = fingerprint
        self._save()

    def keep(self, stage: str, fingerprint: str, outputs: Iterable[str], result: Mapping[str, Any]) -> None:
        """Record that a stage is done, the files that it has written, and what it has found."""
        stages = self.record["stages"]
        stages[stage] = {
            "inputs": fingerprint,
            "files": {name: file_stat(self.path / name) for name in outputs},
            "result": finite(result),
        }
        self._save()

    def result(self, stage: str) -> dict[str, Any]:
        """What a stage that is done has found."""
        return dict(self.record["stages"][stage]["result"])

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Record what the run as a whole has come to."""
        self.record["summary"] = dict(summary)
        self._save()

    def stop(self, how: str) -> None:
        """Record how a run ended that did not come to its end."""
        self.record["ended"] = how
        self._save()

    def _save(self) -> None:
        durable.write_json(self.path / RECORD, self.record)


def _in_unicode(value: Any) -> Any:
    """A plain value, with U+FFFD for what is no text: TOML has no way to write half a surrogate pair."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {key: _in_unicode(item) for key, item in value.items()}
    return [_in_unicode(item) for item in value] if isinstance(value, list) else value


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of plain values."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def files(folder: Path) -> list[str]:
    """The names of the files in a folder, sorted; none if it is not there."""
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def file_stat(path: Path) -> list[int] | None:
    """Size in bytes and time of change in nanoseconds, or None for no file."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # or a name that no file can have
        return None
    return [stat.st_size, stat.st_mtime_ns]
