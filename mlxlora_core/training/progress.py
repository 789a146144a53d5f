"""Where a training stands, without its tensors: what ``state.json`` of a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from mlxlora_core.files.forms import Items, Map, Number, Option, Table, Text, Whole, form_of

if TYPE_CHECKING:
    from mlxlora_core.training.loss import Loss

SPIKE_STEPS = 20  # last losses that one is held against


@dataclass(frozen=True)
class Window:
    """Sums over the steps since the last report.

    Attributes:
        nats: of the counted tokens.
        tokens: how many counted.
        steps: how many there were.
        seconds: how long they took.
        clipped: how many had their gradient clipped.
        skipped: how many made no update.
        positions: that were computed.
        padding: how many of these were padding.
    """

    nats: float = 0.0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    clipped: int = 0
    skipped: int = 0
    positions: int = 0
    padding: int = 0

    def after_step(self, loss: Loss, seconds: float, *, sound: bool, clipped: bool) -> Window:
        """The sums with one more step in them; see :meth:`Progress.after_step`."""
        return Window(
            nats=self.nats + (loss.nats if sound else 0.0),
            tokens=self.tokens + (loss.tokens if sound else 0),
            steps=self.steps + 1,
            seconds=self.seconds + seconds,
            clipped=self.clipped + (sound and clipped),
            skipped=self.skipped + (not sound),
            positions=self.positions + loss.positions,
            padding=self.padding + loss.padding,
        )


@dataclass(frozen=True)
class Progress:
    """Where a training stands: all of its state that is no tensor.

    Attributes:
        step: steps made, which is the place in the order of rows too.
        trained_tokens: counted tokens of all updates.
        skipped: steps that made no update, being not finite.
        recent: the last finite losses, at most :data:`SPIKE_STEPS`.
        first_loss: that of the validation before the first step, or None.
        best_loss: the lowest loss of a validation after a step, or None.
        best_step: the step of that validation.
        worse: validations since then.
        train_loss: that of the last report; None where there was none, or it was not finite.
        valid_loss: the same of the last validation.
        window: what the next report will be made of.
    """

    step: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    recent: tuple[float, ...] = ()
    first_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    worse: int = 0
    train_loss: float | None = None
    valid_loss: float | None = None
    window: Window = field(default_factory=Window)

    def after_step(self, loss: Loss, seconds: float, *, sound: bool, clipped: bool) -> Progress:
        """Where the training stands one step later.

        Args:
            loss: of the step.
            seconds: how long it took.
            sound: whether its loss and gradient are finite; if not, it made no update.
            clipped: whether its gradient was clipped.
        """
        return replace(
            self,
            step=self.step + 1,
            trained_tokens=self.trained_tokens + (loss.tokens if sound else 0),
            skipped=self.skipped + (not sound),
            recent=(*self.recent, loss.mean)[-SPIKE_STEPS:] if sound else self.recent,
            window=self.window.after_step(loss, seconds, sound=sound, clipped=clipped),
        )

    def after_validation(self, loss: float) -> Progress:
        """Where it stands after a validation; a loss of NaN is never the best."""
        found = finite_or_none(loss)
        if found is not None and (self.best_loss is None or found < self.best_loss):
            return replace(self, valid_loss=found, best_loss=found, best_step=self.step, worse=0)
        return replace(self, valid_loss=found, worse=self.worse + 1)


_PROGRESS, _WINDOW = form_of(Progress), form_of(Window)
#: what a state of before does not tell
_LATER = {name: Option(_WINDOW.keys[name]) for name in ("positions", "padding")}
_RESUMED = Table({"step": Whole(), "versions": Map(Text())})

#: what state.json is held against
STATE_FORM = Table(
    {
        **_PROGRESS.keys,
        # a state of before says nothing of these
        **{name: Option(_PROGRESS.keys[name]) for name in ("first_loss", "train_loss", "valid_loss")},
        "window": Table({**_WINDOW.keys, **_LATER}),
        "recent": Items(Number(), most=SPIKE_STEPS),
        "seed": Whole(),
        "resumed": Items(_RESUMED),
    }
)


def finite_or_none(loss: float) -> float | None:
    """A loss as progress holds it."""
    return loss if math.isfinite(loss) else None


def read_progress(state: Mapping[str, Any]) -> Progress:
    """What a state that agrees with :data:`STATE_FORM` says."""
    values = {field.name: state[field.name] for field in fields(Progress) if field.name in state}
    window = Window(**{field.name: state["window"].get(field.name, 0) for field in fields(Window)})
    return Progress(**values | {"recent": tuple(state["recent"]), "window": window})
