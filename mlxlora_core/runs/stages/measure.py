"""What the stages ``before`` and ``after`` share: losses on held-out rows, and answers to the prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mlxlora_core.files.fingerprints import content_digest
from mlxlora_core.options import plain
from mlxlora_core.runs.events import Event, StageDone
from mlxlora_core.runs.folder import DATA
from mlxlora_core.runs.grading import GENERAL, Expected, find_expected, grade
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.samplers import labels
from mlxlora_core.runs.stages.stage import Stage, identity_of, read_by
from mlxlora_core.training.events import Advanced, Note
from mlxlora_core.training.scoring import scoring, words_on

if TYPE_CHECKING:
    from mlxlora_core.model.generate import Segment
    from mlxlora_core.model.loading import Model
    from mlxlora_core.runs.context import Context

HELD_OUT = ("valid", "test")

_PROMPT_LETTERS = 60  # so much of a prompt is told


class MeasureStage(Stage):
    """A model, measured and asked.

    Attributes:
        is_first: whether rows and prompts are new to the run, and there is something to tell of them.
    """

    is_first: ClassVar[bool] = False

    @abstractmethod
    def model(self, context: Context) -> Generator[Event, None, Model]:
        """The model to measure, as the value of the generator."""

    def inputs(self, recipe: Recipe) -> Mapping[str, Any]:
        """How rows are read and prompts are asked."""
        train, evaluate = recipe.train, plain(recipe.evaluate)
        scored = {"score_rows": evaluate.pop("score_rows")}  # which matters to evaluators alone
        scored |= {"evaluator": [[identity_of(each), read_by(each)] for each in recipe.evaluator]}
        return {
            "reading": {"max_seq_length": train.max_seq_length, "mask_prompt": train.mask_prompt},
            "batch_size": train.batch_size,
            "evaluate": evaluate,
            "general": content_digest(recipe.evaluate.general_rows) if recipe.evaluate.general_rows else None,
            "generate": plain(recipe.generate),
            "sampler": [identity_of(sampler) for sampler in recipe.sampler],
            "seed": recipe.run.seed,
        } | (scored if recipe.evaluator else {})

    def work(self, context: Context) -> Iterator[Event]:
        """Measure the loss of each held-out split, ask each prompt, and score the answers to test rows."""
        from mlxlora_core.model.generate import STOP

        rows, words = context.scored_rows()
        model = yield from self.model(context)
        prompts, ask = context.recipe.generate.prompts, context.recipe.generate
        expected = find_expected(context.path / DATA, prompts, model.tokenizer, ask)
        if self.is_first:
            yield from map(Note, (*_words(model, context, expected), *words))
        losses = yield from _losses(model, context)
        answers = []
        for prompt, answer in zip(prompts, _answers(model, context.recipe), strict=True):
            answers.append(grade(prompt, answer.text, answer.finish == STOP, expected.get(prompt)))
            yield Advanced("answering", len(answers), len(prompts))
        result: dict[str, Any] = {"losses": losses, "answers": answers}
        if context.recipe.evaluator:
            result["scores"] = yield from _scores(model, rows, context.recipe, told=self.is_first)
        yield StageDone(self.name, result)

    def assist(self, context: Context) -> Iterator[Event]:
        """Measure a part of the rows."""
        model = yield from self.model(context)
        yield from _losses(model, context)

    def fits(self, result: Mapping[str, Any], recipe: Recipe) -> bool:
        """Whether it has an answer to each prompt, and the score of each evaluator."""
        asked = tuple(answer["prompt"] for answer in result["answers"])
        return asked == recipe.generate.prompts and [*result.get("scores", ())] == _names(recipe)

    def words(self, result: Mapping[str, Any]) -> list[str]:
        """The losses and the scores."""
        losses = [f"{split} loss {loss['loss']:.4f}" for split, loss in result["losses"].items()]
        scores = result.get("scores", {}).items()
        return losses + [
            f"{name} {score['score']:.4f} on {score['rows']} test row{'s'[: score['rows'] - 1]}"
            for name, score in scores
        ]


def _names(recipe: Recipe) -> list[str]:
    """What the evaluators of a recipe are called."""
    return labels([evaluator.component for evaluator in recipe.evaluator])


def _scores(
    model: Model, rows: Sequence[tuple[str, Mapping[str, Any]]], recipe: Recipe, *, told: bool
) -> Generator[Event, None, dict[str, Any]]:
    """What each evaluator says of the answers to test rows, as the value of the generator."""
    scored = yield from scoring(
        "answering test rows",
        model,
        rows,
        recipe.evaluator,
        recipe.sampler,
        num_tokens=recipe.generate.num_tokens,
        seed=recipe.run.seed,
    )
    if told:
        yield from map(Note, words_on(scored))
    means = zip(_names(recipe), scored.means, strict=True)
    return {name: {"score": mean, "rows": scored.rows} for name, mean in means}


def _words(model: Model, context: Context, expected: Mapping[str, Expected]) -> Iterator[str]:
    """A line on what somebody should know of the prompts, and of the rows that no training tells of."""
    from mlxlora_core.model.prompts import words_on

    if context.has_rows("test"):
        yield from context.rows("test", model).words("test")
    ask = context.recipe.generate
    for prompt in ask.prompts:
        words = list(words_on(model.tokenizer, ask.asked(prompt)))
        if prompt in expected and not expected[prompt].told:
            words.append(
                "warning: the prompt ends inside a token of its row, which has other tokens there; "
                "end it where a word ends, without the white space behind"
            )
        yield from (f"{line} ({_shortened(prompt)})" for line in words)


def _shortened(prompt: str) -> str:
    """A prompt, or the end of a long one, between quotes."""
    return repr(prompt if len(prompt) <= _PROMPT_LETTERS else f"...{prompt[-_PROMPT_LETTERS:]}")


def _losses(model: Model, context: Context) -> Generator[Event, None, dict[str, Any]]:
    """The loss on each held-out split, as the value of the generator."""
    losses = {}
    for split in (*HELD_OUT, GENERAL):
        if context.has_rows(split):
            context.watch.phase(f"measuring the {split} loss")
            losses[split] = yield from _loss(model, split, context)
    return losses


def _loss(model: Model, split: str, context: Context) -> Generator[Event, None, dict[str, Any]]:
    """The loss on the rows of a split, as the value of the generator."""
    from mlxlora_core.training.evaluation import evaluating

    rows, recipe = context.rows(split, model), context.recipe
    loss = yield from evaluating(
        f"{split} loss",
        model.language_model,
        rows.examples,
        recipe.train.batch_size,
        recipe.evaluate.test_batches,
        group=context.group,
    )
    return {"loss": loss.mean, "perplexity": loss.perplexity, "tokens": loss.tokens}


def _answers(model: Model, recipe: Recipe) -> Iterator[Segment]:
    """What the model says to each prompt of a recipe."""
    from mlxlora_core.model.generate import fitting_ids
    from mlxlora_core.serving.together import follow_all

    language_model, tokenizer, ask = model.language_model, model.tokenizer, recipe.generate
    return follow_all(
        language_model,
        tokenizer,
        (fitting_ids(language_model, tokenizer, ask.asked(prompt)) for prompt in ask.prompts),
        [(sampler.component, sampler.options) for sampler in recipe.sampler],
        num_tokens=ask.num_tokens,
        seed=recipe.run.seed,
    )
