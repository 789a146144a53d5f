"""What a request does to the logits of its own text."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from serving_steps import Served, Steps, greedy, ids_of, told

from mlxlora_core.plugins import Registry
from mlxlora_core.serving.request import Request


def test_a_change_sees_what_was_drawn_and_what_is_left(served: Served, registry: Registry) -> None:
    seen: list[tuple[list[int], int]] = []

    def count_up(logits: mx.array, drawn: Sequence[int], left: int) -> mx.array:
        seen.append((list(drawn), left))
        return mx.where(mx.arange(logits.shape[-1]) == 50 + len(drawn), logits, -mx.inf)

    steps = Steps(served)
    asked = {"samplers": greedy(registry), "max_tokens": 4, "logprobs": 1}
    job = steps.submit(Request([5, 6, 7], **asked, change=count_up))
    beside = steps.submit(Request([5, 6, 7], **asked))
    steps.run()
    parts, others = told(job), told(beside)
    assert ids_of(parts) == [50, 51, 52, 53]
    assert seen == [([], 4), ([50], 3), ([50, 51], 2), ([50, 51, 52], 1)]
    assert ids_of(others) != ids_of(parts), "it is of one text alone"
    # Log-probabilities are those of the model, whatever was changed.
    assert parts[0].tokens[0].top == others[0].tokens[0].top
