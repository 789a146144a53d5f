"""``mlxlora run``: the straight lines as stages, each done once for its inputs.

A stage whose output carries the fingerprint of its inputs (see
:mod:`mlxlora_core.run.plan`) is skipped.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tomli_w

from mlxlora_core import __version__
from mlxlora_core.model import adapters
from mlxlora_core.model import folder as model_folder
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of
from mlxlora_core.model.folder import Model, Quantization
from mlxlora_core.model.generate import generate, whole
from mlxlora_core.registry import Registry
from mlxlora_core.run.folder import ADAPTER, CHECKPOINTS, DATA, METRICS, MODEL, RunFolder
from mlxlora_core.run.grading import Expected, find_expected, grade, summarize
from mlxlora_core.run.plan import STAGES, fingerprints, needed
from mlxlora_core.run.recipe import Recipe
from mlxlora_core.run.report import length_counts, write_report
from mlxlora_core.training.dataset import build_dataset
from mlxlora_core.training.evaluation import evaluate
from mlxlora_core.training.examples import Examples, read_examples
from mlxlora_core.training.identity import identify
from mlxlora_core.training.loop import Report, Training
from mlxlora_core.training.memory import training_memory
from mlxlora_core.training.session import CheckpointSaved, TrainingSession


@dataclass(frozen=True)
class RunStarted:
    """The run folder is there; ``notes`` is what the runtimes said."""

    notes: tuple[str, ...]


@dataclass(frozen=True)
class StageStarted:
    """A stage begins, or is skipped because its output holds."""

    stage: str
    skipped: bool


@dataclass(frozen=True)
class StageDone:
    """A stage ended with ``result``, which run.json keeps."""

    stage: str
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Note:
    """Something that the user should know while ``stage`` is done."""

    stage: str
    text: str


Event = RunStarted | StageStarted | StageDone | Note | Report | CheckpointSaved


def run(
    recipe: Recipe, registry: Registry, notes: Sequence[str] = (), again: str = "mlxlora run"
) -> Iterator[Event]:
    """Do what a recipe says, stage by stage; what is done already is skipped.

    Args:
        recipe: with every value filled in.
        registry: where plugins are looked up.
        notes: what the runtimes said, for the record.
        again: the command that goes on with this run.

    Raises:
        SafetyError: the run folder holds something that no run has made.
        MlxloraError: as the stages raise.
    """
    folder = RunFolder(recipe.folder)
    marks = fingerprints(recipe)
    folder.begin(_facts(recipe, registry, notes) | {"inputs": marks}, tomli_w.dumps(recipe.values()))
    yield RunStarted(tuple(notes))
    try:
        yield from _do_stages(_Stages(recipe, registry, folder, notes), marks, again)
    except BaseException:
        if (folder.path / METRICS).is_file():
            with suppress(Exception):  # what stopped the run is what there is to tell
                write_report(folder.path)
        raise
    folder.conclude(summarize(folder.result("before"), folder.result("after")))
    write_report(folder.path)


def _do_stages(work: _Stages, marks: Mapping[str, str], again: str) -> Iterator[Event]:
    folder = work.folder
    for stage in STAGES:
        skipped = folder.holds(stage, marks[stage])
        yield StageStarted(stage, skipped)
        if skipped:
            continue
        folder.start(stage, marks[stage])
        if stage not in ("model", "data"):
            yield from work.notes_on_model(stage)
        result = (yield from work.train(again)) if stage == "train" else work.do(stage)
        folder.keep(stage, marks[stage], result)
        yield StageDone(stage, result)


class _Stages:
    """The stages, and what has been loaded for them so far."""

    def __init__(self, recipe: Recipe, registry: Registry, folder: RunFolder, notes: Sequence[str]) -> None:
        self.recipe, self.registry, self.folder, self.notes = recipe, registry, folder, notes
        self._adapted = False
        self._tokenized: dict[str, Examples] = {}

    def do(self, stage: str) -> dict[str, Any]:
        """The result of a stage that has nothing to report on its way."""
        return {"model": self.model, "data": self.data, "before": self.before, "after": self.after}[stage]()

    def model(self) -> dict[str, Any]:
        """Convert the checkpoint, unless the recipe names a model folder."""
        source = self.recipe.model
        if source.torch_path is None:
            return {"folder": str(source.mlx_path)}
        loader, quantize = self.recipe.loader, self.recipe.quantize
        events = convert(
            source.torch_path,
            self.folder.path / MODEL,
            self.registry,
            loader=loader.component.id if loader.component else None,
            loader_options=loader.options,
            dtype=source.dtype,
            file_format=source.format,
            quantization=Quantization(quantize.component, quantize.options) if quantize.component else None,
            overwrite=True,
        )
        return result_of(events).values()

    def data(self) -> dict[str, Any]:
        """Build the rows."""
        builder, options = needed(self.recipe.data), self.recipe.data.options
        record = build_dataset(builder, options, self.folder.path / DATA, overwrite=True)
        told = ("rows", "groups", "repeated_rows", "rows_in_two_splits", "versions", "skipped")
        return {key: record[key] for key in told}

    def before(self) -> dict[str, Any]:
        """Losses and answers of the base."""
        return self._measure()

    def train(self, again: str) -> Generator[Note | Report | CheckpointSaved, None, dict[str, Any]]:
        """Train an adapter, from the newest checkpoint on; its value as a generator is the stage's result."""
        recipe, model = self.recipe, self._model
        adapted = adapters.attach(model, needed(recipe.adapter), recipe.adapter.options, recipe.run.seed)
        self._adapted = True
        rows = self._examples("train")
        splits = {"train": rows.examples}
        if self._has("valid"):
            splits["valid"] = self._examples("valid").examples
        training = Training(
            model.language_model, rows.examples, splits.get("valid", ()), recipe.train, recipe.run.seed
        )
        identity = identify(model, adapted, training, splits, self.registry, self.notes)
        checkpoints = TrainingSession(self.folder.path / CHECKPOINTS, training, model, adapted, identity)
        with training_memory(model, rows, recipe.train.batch_size) as said:
            yield Note("train", said)
            for note in checkpoints.continue_or_begin():
                yield Note("train", note)
            yield from checkpoints.train(recipe.checkpoints, self.folder.path / METRICS, again)
        (self.folder.path / ADAPTER).parent.mkdir(exist_ok=True)
        adapters.save(self.folder.path / ADAPTER, model, adapted)
        return {
            **adapters.count(model),
            "adapted": list(adapted.paths),
            "rows": len(rows),
            "rows_cut": rows.cut,
            "tokens_cut": rows.cut_tokens,
            "steps": training.progress.step,
            "steps_skipped": training.progress.skipped,
            "adapter_step": checkpoints.adapter_step,
            "rows_empty": rows.empty,
            "max_seq_length": self._limit,
            "lengths": length_counts(rows.lengths),
        }

    def after(self) -> dict[str, Any]:
        """Losses and answers of the tuned model."""
        if not self._adapted:
            adapters.load(self.folder.path / ADAPTER, self._model, self.registry)
            self._adapted = True
        return self._measure()

    def notes_on_model(self, stage: str) -> Iterator[Note]:
        """What there is to tell of the base when it is loaded for a stage."""
        loaded = "_model" in vars(self)
        if self._model.note and not loaded:
            yield Note(stage, self._model.note)

    @cached_property
    def _model(self) -> Model:
        """The base, until an adapter is attached to it."""
        return model_folder.load(self.recipe.model.mlx_path or self.folder.path / MODEL, self.registry)

    @property
    def _limit(self) -> int:
        """Tokens of a row that are read."""
        return self._model.sequence_limit(self.recipe.train.max_seq_length)

    def _measure(self) -> dict[str, Any]:
        config = self.recipe
        losses = {}
        for split in ("valid", "test"):
            if self._has(split):
                loss = evaluate(
                    self._model.language_model,
                    self._examples(split).examples,
                    config.train.batch_size,
                    config.evaluate.test_batches,
                )
                losses[split] = {"loss": loss.mean, "perplexity": loss.perplexity, "tokens": loss.tokens}
        prompts = config.generate.prompts
        wanted = find_expected(self.folder.path / DATA, prompts, self._model.tokenizer)
        return {"losses": losses, "answers": [self._answer(prompt, wanted.get(prompt)) for prompt in prompts]}

    def _answer(self, prompt: str, wanted: Expected | None) -> dict[str, Any]:
        sampler = self.recipe.sampler
        segments = generate(
            self._model.language_model,
            self._model.tokenizer,
            prompt,
            needed(sampler).spec.build(sampler.options),
            num_tokens=self.recipe.generate.num_tokens,
            seed=self.recipe.run.seed,
        )
        text, ended = whole(segments)
        return grade(prompt, text, ended, wanted)

    def _has(self, split: str) -> bool:
        path = self.folder.path / DATA / f"{split}.jsonl"
        return path.is_file() and path.stat().st_size > 0

    def _examples(self, split: str) -> Examples:
        if split not in self._tokenized:
            config = self.recipe.train
            self._tokenized[split] = read_examples(
                self.folder.path / DATA / f"{split}.jsonl",
                self._model.tokenizer,
                max_seq_length=self._limit,
                mask_prompt=config.mask_prompt,
            )
        return self._tokenized[split]


def _facts(recipe: Recipe, registry: Registry, notes: Sequence[str]) -> dict[str, Any]:
    """What run.json says of the run beside its stages."""
    return {
        "mlxlora": __version__,
        "recipe": recipe.name,
        "seed": recipe.run.seed,
        "plugins": {
            p.name: f"{p.distribution} {p.version}".strip() for p in registry.plugins if p.components
        },
        "runtime": list(notes),
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        },
        "origins": dict(recipe.origins),
    }
