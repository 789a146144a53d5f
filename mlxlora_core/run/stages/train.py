"""The stage ``train``: train an adapter, from the newest checkpoint on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.options import plain
from mlxlora_core.run.events import Event, StageDone
from mlxlora_core.run.folder import ADAPTER, CHECKPOINTS, METRICS
from mlxlora_core.run.recipe import Recipe
from mlxlora_core.run.report import length_counts
from mlxlora_core.run.stages.stage import Stage, component_of, identity_of
from mlxlora_core.training.events import Note

if TYPE_CHECKING:
    from mlxlora_core.run.context import Context


class TrainStage(Stage):
    """An adapter file."""

    name = "train"
    builds_on = ("model", "data")

    def inputs(self, recipe: Recipe) -> Mapping[str, Any]:
        """The adapter, and how it is trained; when it is saved does not matter."""
        return {
            "train": plain(recipe.train),
            "adapter": identity_of(recipe.adapter),
            "seed": recipe.run.seed,
        }

    def outputs(self, folder: Path) -> list[str]:
        """The adapter and the log of its training."""
        return [ADAPTER, METRICS]

    def work(self, context: Context) -> Iterator[Event]:
        """Train to the end, saving on the way."""
        from mlxlora_core.model import adapters
        from mlxlora_core.training.identity import identify
        from mlxlora_core.training.loop import Training
        from mlxlora_core.training.memory import training_memory
        from mlxlora_core.training.session import TrainingSession

        recipe = context.recipe
        model = yield from context.load_base()
        adapted = adapters.attach(
            model, component_of(recipe.adapter), recipe.adapter.options, recipe.run.seed
        )
        context.adapted = adapted
        rows = context.rows("train", model)
        splits = {"train": rows.examples}
        if context.has_rows("valid"):
            splits["valid"] = context.rows("valid", model).examples
        training = Training(
            model.language_model, rows.examples, splits.get("valid", ()), recipe.train, recipe.run.seed
        )
        identity = identify(model, adapted, training, splits, context.registry, context.runtimes)
        session = TrainingSession(context.path / CHECKPOINTS, training, model, adapted, identity)
        with training_memory(model, rows, recipe.train.batch_size) as said:
            yield Note(said)
            for note in session.continue_or_begin():
                yield Note(note)
            yield from session.train(recipe.checkpoints, context.path / METRICS, context.resume_command)
        (context.path / ADAPTER).parent.mkdir(exist_ok=True)
        adapters.save(context.path / ADAPTER, model, adapted)
        result = {
            **adapters.count(model),
            "adapted": list(adapted.paths),
            "rows": len(rows),
            "rows_cut": rows.cut,
            "tokens_cut": rows.cut_tokens,
            "steps": training.progress.step,
            "steps_skipped": training.progress.skipped,
            "adapter_step": session.adapter_step,
            "rows_empty": rows.empty,
            "max_seq_length": model.sequence_limit(recipe.train.max_seq_length),
            "lengths": length_counts(rows.lengths),
        }
        yield StageDone(self.name, result)

    def words(self, result: Mapping[str, Any]) -> list[str]:
        """How much of the model was trained."""
        cut = f"; {result['rows_cut']} rows were cut" if result["rows_cut"] else ""
        return [f"{result['trainable_parameters']} parameters trained in {result['steps']} steps{cut}"]
