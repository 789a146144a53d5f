"""What the stages of one run share: the recipe, the folder, and what has been loaded for them so far."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.distributed.watch import Watch
from mlxlora_core.errors import DataError
from mlxlora_core.plugins import Registry
from mlxlora_core.runs.base import base_of
from mlxlora_core.runs.folder import ADAPTER, DATA, MODEL, RunFolder
from mlxlora_core.runs.grading import GENERAL
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.training.events import Note
from mlxlora_core.training.scoring import asking
from mlxlora_core.training.sources import read_data

if TYPE_CHECKING:
    from mlxlora_core.model.adapters import Adapted
    from mlxlora_core.model.loading import Model
    from mlxlora_core.training.examples import Examples


class Context:
    """One run.

    A model and rows are loaded when the first stage asks for them, and stay.

    Args:
        recipe: with every value filled in.
        registry: where plugins are looked up.
        folder: of the run.
        runtimes: what the runtimes said, for the record.
        resume_command: the command that goes on with this run.
        watched: whether somebody looks on, for whom the model is asked on its way.
        group: the ranks that share the work; each has a context of its own.
        watch: is told what this rank is at.

    Attributes:
        adapted: the adapter that is on the base, once there is one.
    """

    def __init__(
        self,
        recipe: Recipe,
        registry: Registry,
        folder: RunFolder,
        runtimes: Sequence[str],
        resume_command: str,
        watched: bool = False,
        group: Group = ALONE,
        watch: Watch | None = None,
    ) -> None:
        self.group, self.watch = group, watch or Watch()
        self.recipe, self.registry, self.folder = recipe, registry, folder
        self.runtimes, self.resume_command, self.watched = runtimes, resume_command, watched
        self.adapted: Adapted | None = None
        self._model: Model | None = None
        self._rows: dict[str, Examples] = {}

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    def load_base(self) -> Generator[Note, None, Model]:
        """The base as the value of the generator; what there is to tell of it when it is loaded.

        Once an adapter is on it, it is no base any more: see :attr:`adapted`. Several ranks ask for it
        in the same stage, and the first of each machine reads it first.
        """
        from mlxlora_core.model import loading

        if self._model is None:
            path, quantization = base_of(self.recipe, self.path / MODEL)
            with self.group.first_of_machine():
                self._model = loading.load(path, self.registry, quantization)
            for note in (*self._model.notes, *([self._model.note] if self._model.note else [])):
                yield Note(note)
        return self._model

    def load_tuned(self) -> Generator[Note, None, Model]:
        """The base with this run's adapter on it, as the value of the generator."""
        from mlxlora_core.model import adapters

        model = yield from self.load_base()
        if self.adapted is None:
            self.adapted = adapters.load(self.path / ADAPTER, model, self.registry)
        return model

    def written_bytes(self) -> int:
        """How many bytes the training writes at most, once its adapter is on the base."""
        from mlxlora_core.training.disk import written_bytes

        return written_bytes(self._model, self.recipe.checkpoints) if self._model is not None else 0

    def rows_file(self, split: str) -> Path:
        """Where the rows of a split are, or those that stand in no split."""
        general = self.recipe.evaluate.general_rows
        return general if split == GENERAL and general is not None else self.path / DATA / f"{split}.jsonl"

    def has_rows(self, split: str) -> bool:
        """Whether there is a row in a split."""
        path = self.rows_file(split)
        return path.is_file() and path.stat().st_size > 0

    def scored_rows(self) -> tuple[list[tuple[str, Mapping[str, Any]]], list[str]]:
        """The test rows that evaluators score, and what there is to tell of the others; none for none.

        Raises:
            DataError: there are evaluators, and no row that asks anything.
        """
        if not self.recipe.evaluator:
            return [], []
        if not self.has_rows("test"):
            fix = "raise [data] test_set_size, or name no evaluator"
            raise DataError("there is no test row for evaluators to score", where=self.path / DATA, fix=fix)
        return asking(read_data(self.rows_file("test"), ("test",))["test"], self.recipe.evaluate)

    def rows(self, split: str, model: Model) -> Examples:
        """The rows of a split, tokenized for the model once.

        Raises:
            DataError: they cannot be read.
        """
        from mlxlora_core.training.examples import examples_of

        if split not in self._rows:
            # A file by itself is of whatever split is asked for; "general" is none that rows have.
            name = "test" if split == GENERAL else split
            rows = read_data(self.rows_file(split), (name,))[name]
            self._rows[split] = examples_of(rows, model, self.recipe.train)
        return self._rows[split]
