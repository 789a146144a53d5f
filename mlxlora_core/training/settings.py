"""How to train, evaluate and generate: the values, with their help and their ranges.

Command-line options, recipe tables and docs are made from it, so it imports nothing heavy. The
options of the Python interface are repeated as ``TypedDict``, for type checkers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from mlxlora_core.machine.device import PRECISIONS
from mlxlora_core.options import option


@dataclass(frozen=True)
class BatchConfig:
    """How rows become batches, in training and evaluation."""

    batch_size: int = option(4, help="rows per batch", unit="rows", minimum=1)
    max_seq_length: int = option(2048, help="longer rows are cut, and counted", unit="tokens", minimum=2)
    mask_prompt: bool = option(False, help="count only completions and answers in the loss")


@dataclass(frozen=True)
class TrainConfig(BatchConfig):
    """The settings of the training loop."""

    iters: int = option(1000, help="optimizer updates", unit="steps", minimum=1)
    grad_accumulation: int = option(1, help="batches per step", minimum=1)
    packing: str = option(
        "auto",
        help="pack the rows of a batch into one sequence, without padding; auto does so only on a CPU",
        choices=("auto", "on", "off"),
    )
    group_by_length: bool = option(
        False, help="put rows of similar length into a step: less padding, but steps are less mixed"
    )
    optimizer: str = option("adam", help="the optimizer", choices=("adam", "adamw", "muon"))
    learning_rate: float = option(1e-5, help="peak learning rate", above=0)
    weight_decay: float = option(
        0.01, help="decoupled weight decay, for adamw and muon", minimum=0, maximum=100
    )
    schedule: str = option("constant", help="learning rate after the warm-up", choices=("constant", "cosine"))
    warmup: int = option(0, help="steps over which the learning rate rises from 0", unit="steps", minimum=0)
    min_learning_rate: float = option(0.0, help="where the cosine schedule ends", minimum=0)
    grad_clip: float | None = option(None, help="clip the gradient to this norm; none does not clip", above=0)
    val_batches: int = option(25, help="batches per validation; -1 is all rows", minimum=-1)
    steps_per_report: int = option(10, help="steps between training reports", unit="steps", minimum=1)
    steps_per_eval: int = option(200, help="steps between validations", unit="steps", minimum=1)
    patience: int | None = option(
        None, help="stop after this many validations without a better one, and keep the best", minimum=1
    )
    compute: str = option(
        "float32",
        help="precision of large matrix products; less than float32 needs a CPU with AMX",
        choices=PRECISIONS,
    )
    on_nonfinite: str = option(
        "stop", help="what to do when a loss or gradient is not finite", choices=("stop", "skip")
    )
    compile: str = option(
        "auto", help="compile the training step; auto does so only on a GPU", choices=("auto", "on", "off")
    )
    grad_checkpoint: str = option(
        "auto",
        help="recompute layers in the backward pass to save memory; auto does so if a step would not fit",
        choices=("auto", "on", "off"),
    )
    reuse_prefix: str = option(
        "auto",
        help="compute the frozen layers below the adapter only once per row; auto does so where it pays",
        choices=("auto", "on", "off"),
    )
    prefix_type: str = option(
        "compute",
        help="type in which the output of these layers is kept",
        choices=("compute", "float16", "bfloat16"),
    )
    prefix_memory_mb: int | None = option(
        None,
        help="memory for this output, the rest goes to files; none is a quarter of what is free",
        unit="MB",
        minimum=0,
    )

    def __post_init__(self) -> None:
        if self.val_batches == 0:
            raise ValueError("val_batches must be -1 or at least 1, got 0")
        if self.warmup >= self.iters:
            raise ValueError(f"warmup must be less than iters ({self.iters}), got {self.warmup}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate must be at most learning_rate ({self.learning_rate:g}), "
                f"got {self.min_learning_rate:g}"
            )

    @property
    def rows_a_step(self) -> int:
        """Rows in one update."""
        return self.batch_size * self.grad_accumulation


@dataclass(frozen=True)
class SaveConfig:
    """When a training is saved, and how many of its checkpoints are kept."""

    save_every: int = option(100, help="steps between checkpoints", unit="steps", minimum=1)
    save_minutes: float = option(10.0, help="longest time between checkpoints", unit="minutes", above=0)
    keep: int = option(2, help="newest checkpoints to keep, besides the best", minimum=1)


@dataclass(frozen=True)
class EvaluateConfig:
    """How a loss is measured."""

    test_batches: int = option(500, help="batches of the test set; -1 is all", minimum=-1)

    def __post_init__(self) -> None:
        if self.test_batches == 0:
            raise ValueError("test_batches must be -1 or at least 1, got 0")


@dataclass(frozen=True)
class ScoreConfig:
    """Which test rows are answered for evaluators."""

    score_rows: int | None = option(
        None, help="test rows that evaluators score, evenly spaced; none is all", unit="rows", minimum=1
    )


@dataclass(frozen=True)
class AnswerConfig(ScoreConfig):
    """How test rows are answered for evaluators."""

    num_tokens: int = option(100, help="most tokens in an answer", unit="tokens", minimum=1, letter="n")


@dataclass(frozen=True)
class ChatConfig:
    """Whether a prompt is a text to continue, or what a user says to a model that chats."""

    chat: bool = option(False, help="send the prompt as a user's message, in the chat format of the model")
    system: str = option("", help="system message before it; none if empty")

    def __post_init__(self) -> None:
        if self.system and not self.chat:
            raise ValueError("system needs chat: a text to continue has no system message")

    def asked(self, text: str) -> str | list[dict[str, str]]:
        """The prompt for a text: the text itself, or a conversation of this one question."""
        if not self.chat:
            return text
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, {"role": "user", "content": text}]


@dataclass(frozen=True)
class GenerateConfig(ChatConfig):
    """How text is generated."""

    num_tokens: int = option(100, help="most tokens to generate", unit="tokens", minimum=1, letter="n")
    write_every: int = option(1, help="show text after every this many tokens", unit="tokens", minimum=1)


class BatchOptions(TypedDict, total=False):
    """The keys of :class:`BatchConfig` as keyword arguments."""

    batch_size: int
    max_seq_length: int
    mask_prompt: bool


class TrainOptions(BatchOptions, total=False):
    """The keys of :class:`TrainConfig` and :class:`SaveConfig` as keyword arguments."""

    iters: int
    grad_accumulation: int
    packing: str
    group_by_length: bool
    optimizer: str
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup: int
    min_learning_rate: float
    grad_clip: float | None
    val_batches: int
    steps_per_report: int
    steps_per_eval: int
    patience: int | None
    compute: str
    on_nonfinite: str
    compile: str
    grad_checkpoint: str
    reuse_prefix: str
    prefix_type: str
    prefix_memory_mb: int | None
    save_every: int
    save_minutes: float
    keep: int
