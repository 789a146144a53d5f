"""What an engine has done and is doing, in plain numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlxlora_core.serving.job import Job
from mlxlora_core.serving.request import FINISH_REASONS


@dataclass
class Metrics:
    """Counts since the engine began.

    Attributes:
        requests: that were taken.
        finished: finish reason -> requests.
        steps: that were made.
        rows: of all steps together, that belonged to a request.
        prompt_tokens: that were read.
        cached_tokens: of prompts, that need not be read.
        completion_tokens: that were drawn.
        first_token_seconds: from submission to first token, of all requests that had one, together.
        first_tokens: how many had one.
        request_seconds: from submission to the end, of all that ended, together.
    """

    requests: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float = 0.0
    first_tokens: int = 0
    request_seconds: float = 0.0

    def ended(self, job: Job, now: float) -> None:
        """Count a request that has ended."""
        self.finished[job.finish or ""] += 1
        self.completion_tokens += job.drawn
        self.request_seconds += now - job.submitted
        if job.first:
            self.first_tokens += 1
            self.first_token_seconds += job.first - job.submitted

    def plain(self) -> Mapping[str, float]:
        """Each by its name; ``finished_stop`` and so on for those that ended so."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, (int, float))}
        return numbers | {f"finished_{reason}": self.finished[reason] for reason in FINISH_REASONS}
