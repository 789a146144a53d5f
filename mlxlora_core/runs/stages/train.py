"""The stage ``train``: train an adapter, from the newest checkpoint on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.options import plain
from mlxlora_core.runs.events import Event, StageDone
from mlxlora_core.runs.folder import ADAPTER, CHECKPOINTS, METRICS
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.report import length_counts
from mlxlora_core.runs.stages.samples import Samples
from mlxlora_core.runs.stages.stage import Stage, identity_of
from mlxlora_core.training.checkpoints import Start
from mlxlora_core.training.events import TrainingStarted, TrainResult, ValidReport

if TYPE_CHECKING:
    from mlxlora_core.model.loading import Model
    from mlxlora_core.runs.context import Context
    from mlxlora_core.training.outputs import Outputs
    from mlxlora_core.training.session import TrainingSession


class TrainStage(Stage):
    """An adapter file."""

    name = "train"
    builds_on = ("model", "data")

    def inputs(self, recipe: Recipe) -> Mapping[str, Any]:
        """The adapter, and how it is trained; when it is saved does not matter."""
        settings = plain(recipe.train)
        del settings["prefix_memory_mb"]  # where something is kept changes nothing
        return {
            "train": settings,
            "adapter": identity_of(recipe.adapter, recipe.adapter_config),
            "seed": recipe.run.seed,
        }

    def outputs(self, folder: Path) -> list[str]:
        """The adapter and the log of its training."""
        return [ADAPTER, METRICS]

    def work(self, context: Context) -> Iterator[Event]:
        """Train to the end, saving on the way."""
        from mlxlora_core.training.outputs import Outputs, held

        path = context.path
        model = yield from context.load_base()
        outputs = Outputs(
            adapter_file=path / ADAPTER,
            checkpoints=path / CHECKPOINTS,
            metrics=path / METRICS,
            saving=context.recipe.checkpoints,
            resume_command=context.resume_command,
        )
        with held(outputs):
            session = _open(context, model, outputs)
            samples = Samples(context, model)
            for event in session.start(Start.CONTINUE):
                yield event
                if isinstance(event, TrainingStarted):
                    samples.begin(event.step)
                if isinstance(event, ValidReport) and event.step:  # the first one is what the base says
                    samples.ask(event.step)
                if isinstance(event, TrainResult):
                    lengths = length_counts(session.rows["train"].lengths)
                    yield StageDone(self.name, asdict(event) | {"lengths": lengths})

    def assist(self, context: Context) -> Iterator[Event]:
        """Make the same steps, of other rows."""
        model = yield from context.load_base()
        yield from _open(context, model).start(Start.CONTINUE)

    def words(self, result: Mapping[str, Any]) -> list[str]:
        """How far the training came, and which of its adapters it was for."""
        best = f"; the adapter is that of step {result['adapter_step']}, the best"
        return [f"{result['steps']} steps" + (best if result["adapter_step"] != result["steps"] else "")]


def _open(context: Context, model: Model, outputs: Outputs | None = None) -> TrainingSession:
    """The training of a run, of which one rank writes something."""
    from mlxlora_core.training.session import NewAdapter, open_training

    recipe = context.recipe
    session = open_training(
        model,
        NewAdapter(recipe.adapter, recipe.adapter_config),
        {split: context.rows(split, model) for split in ("train", "valid") if context.has_rows(split)},
        recipe.train,
        context.registry,
        seed=recipe.run.seed,
        outputs=outputs,
        runtimes=context.runtimes,
        group=context.group,
        watch=context.watch,
    )
    context.adapted = session.adapted
    return session
