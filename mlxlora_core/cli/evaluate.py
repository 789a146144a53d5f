"""``mlxlora evaluate``: loss and perplexity on held-out rows, and scores of the answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.model import (
    asked_adapter,
    asked_quantization,
    chosen_samplers,
    load_adapted,
    measure,
    read_test,
)
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, start, verb
from mlxlora_core.errors import UsageError, listing
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.runs.recipe import check_sections, choose_beside, overrides
from mlxlora_core.runs.samplers import ANSWER_SAMPLER, check_samplers, labels, prepare_evaluators
from mlxlora_core.training.scoring import asking, scoring, words_on
from mlxlora_core.training.settings import AnswerConfig, BatchConfig, EvaluateConfig
from mlxlora_core.training.sources import SplitRows, read_data

if TYPE_CHECKING:
    from mlxlora_core.model.loading import Model


@verb(
    declare.MODEL,
    declare.quantize,
    declare.data("test.jsonl"),
    declare.COLUMNS,
    declare.ADAPTER_FILE,
    declare.NO_ADAPTER,
    declare.ADAPTER,
    declare.BASE_MISMATCH,
    declare.flags(BatchConfig),
    declare.flags(EvaluateConfig),
    declare.section(
        "Scores of answers",
        click.option(
            "--evaluator",
            "evaluators",
            multiple=True,
            metavar="NAME",
            help="Let the model answer the test set and an evaluator score it, such as exact-match. "
            "Its options are keys of `evaluator` for --set. May be repeated.",
        ),
        declare.flags(AnswerConfig),
        click.option(
            "--sampler",
            help=f"Samplers of the answers, in order: NAME or NAME,NAME. [default: {ANSWER_SAMPLER}]",
        ),
        declare.SEED,
    ),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    model: str,
    data: Path,
    columns: tuple[str, ...],
    adapter_file: Path | None,
    no_adapter: bool,
    adapter: str | None,
    base_mismatch: str,
    evaluators: tuple[str, ...],
    sampler: str | None,
    seed: int,
    sets: tuple[str, ...],
    as_json: bool,
    **arguments: Any,
) -> None:
    """Measure loss and perplexity on the test set.

    The loss is the sum of nats over the sum of counted tokens, whatever the
    batch size. With --evaluator, the model also answers each row of prompt and
    completion or of messages, and the mean of the scores is told.
    """
    batches = declare.config_from(BatchConfig, arguments)
    config = declare.config_from(EvaluateConfig, arguments)
    given = overrides(sets)
    any_base = base_mismatch == "allow"
    asked = asked_adapter(adapter_file, no_adapter, adapter, given.get("adapter", {}), any_base)
    check_sections(given, ("adapter", "quantize", "evaluator", "sampler"))
    quantization = asked_quantization(registry, arguments, given)
    scoring = _asked_scoring(registry, evaluators, {**arguments, "sampler": sampler}, given, seed)
    rows = read_data(data, ("test",), columns=declare.columns_from(columns))["test"]
    start(registry)
    if scoring is not None:
        scoring.prepare(rows)
    base, said = load_adapted(model, asked, registry, quantization)
    result = measure(base, read_test(base, rows, batches), batches, config, quiet=as_json)
    if scoring is not None:
        result |= scoring.scores(base, quiet=as_json)
    show.progress(said)
    if as_json:
        show.as_json({"adapter_file": asked and str(asked.path), **result})


def _asked_scoring(
    registry: Registry,
    names: tuple[str, ...],
    given: Mapping[str, Any],
    sets: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> _Scoring | None:
    """How the command line asks for scores, or None.

    Raises:
        PluginError: no such evaluator or sampler.
        UsageError: options of answers, and no evaluator; or out of range.
    """
    evaluators = choose_beside("evaluator", names, sets.get("evaluator", {}), registry)
    if not evaluators:
        said = ("num_tokens", "score_rows", "sampler")
        idle = [declare.flag_name(name) for name in said if given[name] is not None]
        if idle or "sampler" in sets:
            idle += ["--set sampler"] if "sampler" in sets else []
            raise UsageError(f"{listing(idle)} given without --evaluator", fix="add --evaluator")
        return None
    samplers = chosen_samplers(registry, given["sampler"] or ANSWER_SAMPLER, None, sets.get("sampler", {}))
    return _Scoring(evaluators, samplers, declare.config_from(AnswerConfig, given), seed)


@dataclass
class _Scoring:
    """Answers to the test set, and what evaluators say of them.

    Attributes:
        rows: (place, content) of those to answer, once :meth:`prepare` has found them.
    """

    evaluators: tuple[Choice, ...]
    samplers: tuple[Choice, ...]
    config: AnswerConfig
    seed: int
    rows: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def prepare(self, rows: SplitRows) -> None:
        """Find the rows to answer, and refuse before the work what would fail in it."""
        prepare_evaluators(self.evaluators)
        check_samplers(self.samplers)
        found, words = asking(rows, self.config)
        for text in words:
            show.progress(text)
        self.rows = tuple(found)

    def scores(self, model: Model, *, quiet: bool) -> dict[str, Any]:
        """The mean score of each evaluator, printed unless ``quiet``, and the answers with theirs."""
        work = scoring(
            "answering test rows",
            model,
            self.rows,
            self.evaluators,
            self.samplers,
            num_tokens=self.config.num_tokens,
            seed=self.seed,
        )
        scored = show.to_its_end(work)
        for text in words_on(scored):
            show.progress(text)
        names = labels([evaluator.component for evaluator in self.evaluators])
        count = f"{scored.rows} test row{'s'[: scored.rows - 1]}"
        means = dict(zip(names, scored.means, strict=True))
        for name, mean in () if quiet else means.items():
            show.result(f"{name} {mean:.4f} on {count}")
        return {
            "scores": {name: {"score": mean, "rows": scored.rows} for name, mean in means.items()},
            "answers": [
                {
                    "prompt": answer.prompt,
                    "expected": answer.expected,
                    "text": answer.text,
                    "ended": answer.ended,
                    "scores": dict(zip(names, each, strict=True)),
                }
                for answer, each in scored.answers
            ],
        }
