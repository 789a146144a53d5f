"""The reports of a training while it runs, and its result.

It imports no MLX, so that code that shows or stores them stays light.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from mlxlora_core.files.documents import finite

T = TypeVar("T")


@dataclass(frozen=True)
class TrainReport:
    """A report on the steps since the last one.

    Attributes:
        step: steps made so far.
        loss: nats per counted token over these steps; NaN if none was finite.
        learning_rate: of the last step.
        grad_norm: of the last step, before clipping.
        steps_per_second: counting only the time of training steps; NaN if the clock stood still.
        tokens_per_second: counted tokens.
        trained_tokens: counted tokens since the start.
        peak_memory_bytes: the most that MLX has held.
        clipped: how many of these steps had their gradient clipped.
        skipped: how many of these steps made no update because they were not finite.
        padding: the share of computed positions that were padding.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    steps_per_second: float
    tokens_per_second: float
    trained_tokens: int
    peak_memory_bytes: int
    clipped: int = 0
    skipped: int = 0
    padding: float = 0.0

    @property
    def words(self) -> str:
        """The report in a line, without the step."""
        clipped = f"  {self.clipped} clipped" if self.clipped else ""
        skipped = f"  {self.skipped} skipped, not finite" if self.skipped else ""
        speed = f"{self.steps_per_second:.2f} steps/s  {self.tokens_per_second:.0f} tokens/s"
        padding = f"padding {100 * self.padding:.1f} %"
        peak = f"peak {self.peak_memory_bytes / 1e9:.2f} GB"
        return (
            f"loss {self.loss:.4f}  lr {self.learning_rate:.2e}  {speed}  {padding}  {peak}{clipped}{skipped}"
        )

    def __str__(self) -> str:
        return f"step {self.step}  {self.words}"


@dataclass(frozen=True)
class ValidReport:
    """A validation.

    Attributes:
        step: steps made before it.
        loss: nats per counted token; NaN when the model's loss is not finite.
        tokens: how many counted.
        seconds: how long it took.
        padding: the share of computed positions that were padding.
    """

    step: int
    loss: float
    tokens: int
    seconds: float
    padding: float = 0.0

    @property
    def words(self) -> str:
        """The report in a line, without the step."""
        return f"valid loss {self.loss:.4f}  ({self.tokens} tokens in {self.seconds:.1f} s)"

    def __str__(self) -> str:
        return f"step {self.step}  {self.words}"


@dataclass(frozen=True)
class SpikeReport:
    """A loss far above those before it; training goes on.

    Attributes:
        step: where.
        loss: nats per counted token of that step.
        median: of the steps before it.
    """

    step: int
    loss: float
    median: float

    @property
    def words(self) -> str:
        """The report in a line, without the step."""
        return f"warning: loss {self.loss:.4f}, the median of the steps before is {self.median:.4f}"

    def __str__(self) -> str:
        return f"step {self.step}  {self.words}"


Report = TrainReport | ValidReport | SpikeReport


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was written.

    Attributes:
        step: steps made before it.
        seconds: how long it took.
    """

    step: int
    seconds: float

    @property
    def words(self) -> str:
        """The report in a line, without the step."""
        return f"saved in {self.seconds:.2f} s"

    def __str__(self) -> str:
        return f"step {self.step}  {self.words}"


@dataclass(frozen=True)
class Note:
    """Something that the user should know, in a line."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class TrainingStarted:
    """Steps begin.

    Attributes:
        step: steps made before.
        steps: how many there will be at most.
    """

    step: int
    steps: int

    def __str__(self) -> str:
        return f"training from step {self.step} to {self.steps}"


@dataclass(frozen=True)
class Advanced:
    """The progress of a piece of work, for a progress bar; observers are not told.

    Attributes:
        what: the piece of work, in a word or two.
        done: how much is done; more of it than before.
        count: how much there is to do.
    """

    what: str
    done: int
    count: int

    def __str__(self) -> str:
        return f"{self.what}: {self.done} of {self.count}"


@dataclass(frozen=True)
class TrainResult:
    """The result of a training; the last event.

    Attributes:
        parameters: of base and adapter, with packed weights counted as dense ones.
        trainable_parameters: of the adapter.
        adapted: paths of the linears that it wraps.
        rows: rows trained on.
        rows_cut: how many of them were cut at ``max_seq_length``.
        tokens_cut: tokens lost by cutting.
        rows_empty: rows left out because none of their tokens counts.
        max_seq_length: the longest length, in tokens.
        steps: steps made.
        steps_skipped: how many of them made no update because they were not finite.
        adapter_step: the step whose adapter the model holds now: with patience that of the best
            validation, otherwise the last.
        train_loss: nats per counted token, as last reported; None if never reported, or not finite.
        valid_loss: the same of the last validation.
    """

    parameters: int
    trainable_parameters: int
    adapted: tuple[str, ...]
    rows: int
    rows_cut: int
    tokens_cut: int
    rows_empty: int
    max_seq_length: int
    steps: int
    steps_skipped: int
    adapter_step: int
    train_loss: float | None
    valid_loss: float | None

    def __str__(self) -> str:
        losses = {"train": self.train_loss, "valid": self.valid_loss}
        said = "".join(f", {name} loss {loss:.4f}" for name, loss in losses.items() if loss is not None)
        return f"{self.steps} steps on {self.rows} rows{said}"


TrainEvent = Note | TrainingStarted | Advanced | Report | CheckpointSaved | TrainResult


def report_line(report: Report) -> dict[str, Any]:
    """One line of metrics.jsonl; a number that is not finite is null, with a word for it beside it."""
    kind = type(report).__name__.removesuffix("Report").lower()
    line: dict[str, Any] = finite({"kind": kind, **asdict(report)})
    return line


def value_of(work: Generator[Any, None, T]) -> T:
    """The value of a piece of work, for those who do not show how far it is."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            value: T = end.value
            return value
