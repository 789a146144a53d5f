"""What the model says to the run's prompts on its way, for whoever watches the run.

Nothing of the training depends on it: each step seeds its own random numbers, and
a text is a function of the model, the prompt and the seed. It costs a hundredth of
the training's time at most.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.errors import DataError, MlxloraError
from mlxlora_core.files import durable
from mlxlora_core.files.input_file import open_regular
from mlxlora_core.runs.folder import SAMPLES
from mlxlora_core.training import metrics

if TYPE_CHECKING:
    from mlxlora_core.model.loading import Model
    from mlxlora_core.runs.context import Context

SHARE = 0.01  # of the time since training began that samples may take
TOKENS = 48  # of a sample at most

_HEAD = b'{"kind": "sample", '  # how each line begins
_PROMPTS = 8  # that are asked in turn


class Samples:
    """Asks the prompts of a run now and then, and keeps the answers in ``samples.jsonl``.

    Args:
        context: of the run; without watchers nothing is asked.
        model: with the adapter that is being trained on it.
    """

    def __init__(self, context: Context, model: Model) -> None:
        self._context, self._model, self._path = context, model, context.path / SAMPLES
        self._prompts = context.recipe.generate.prompts[:_PROMPTS] if context.watched else ()
        if self._path.exists() and not _is_ours(self._path):
            self._prompts = ()
        self._began, self._spent, self._next = time.monotonic(), 0.0, 0

    def begin(self, step: int) -> None:
        """A training begins at a step; what an earlier one has said behind it does not count."""
        self._began = time.monotonic()
        if self._path.exists() and _is_ours(self._path):
            with suppress(MlxloraError, OSError):
                metrics.trim(self._path, step)

    def ask(self, step: int) -> None:
        """Ask as many prompts as there is time for, each validation going on with the next."""
        for _ in self._prompts:
            began = time.monotonic()
            if self._spent > SHARE * (began - self._began):
                return
            prompt = self._prompts[self._next % len(self._prompts)]
            self._next += 1
            with suppress(MlxloraError):  # such as logits that are not finite; the training itself will tell
                line = {"kind": "sample", "step": step, "prompt": prompt, "text": self._said(prompt)}
                durable.append_line(self._path, json.dumps(line))
            self._spent += time.monotonic() - began

    def _said(self, prompt: str) -> str:
        from mlxlora_core.model.generate import generate, whole

        recipe = self._context.recipe
        samplers: list[Any] = [(sampler.component, sampler.options) for sampler in recipe.sampler]
        told = generate(
            self._model.language_model,
            self._model.tokenizer,
            recipe.generate.asked(prompt),
            samplers,
            num_tokens=min(TOKENS, recipe.generate.num_tokens),
            seed=recipe.run.seed,
        )
        return whole(told).text


def _is_ours(path: Path) -> bool:
    """Whether a file begins as one of samples does."""
    try:
        with open_regular(path, DataError) as file:
            return file.read(len(_HEAD)) in (_HEAD, b"")
    except (MlxloraError, OSError):
        return False
