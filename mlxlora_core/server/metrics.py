"""Numbers of the engine in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: what goes up and down; all others only grow
GAUGES = {
    "waiting": "requests without a place",
    "reading": "requests whose prompts are read",
    "aside": "requests that have a place, and wait for memory",
    "running": "requests that have a place",
    "places": "requests that may have a place",
    "reserved_bytes": "of keys and values that are kept free for requests",
    "cache_bytes": "that keys and values may take",
    "prefix_bytes": "of keys and values of beginnings of prompts that are kept",
    "active_bytes": "of arrays",
}
COUNTERS = {
    "requests": "that were taken",
    "refused": "requests, for want of a place in the queue",
    "steps": "of the engine",
    "rows": "of all steps together, that belonged to a request",
    "prompt_tokens": "that were read",
    "cached_tokens": "of prompts, that need not be read",
    "completion_tokens": "that were drawn",
    "first_token_seconds": "from submission to first token, of all requests together",
    "first_tokens": "requests that had one",
    "request_seconds": "from submission to the end, of all requests together",
}
_FINISHED = "finished_"


def in_words(numbers: Mapping[str, float], statuses: Mapping[int, int], inside: int) -> str:
    """All of it.

    Args:
        numbers: as :meth:`mlxlora_core.serving.engine.Engine.metrics` gives them.
        statuses: status -> responses.
        inside: requests of clients that are being read or answered.
    """
    lines: list[str] = []
    for name, words in GAUGES.items():
        lines += _block(name, "gauge", words, [("", numbers.get(name, 0))])
    for name, words in COUNTERS.items():
        lines += _block(f"{name}_total", "counter", words, [("", numbers.get(name, 0))])
    reasons = {name: count for name, count in numbers.items() if name.startswith(_FINISHED)}
    ended = [
        (f'{{reason="{name.removeprefix(_FINISHED)}"}}', count) for name, count in sorted(reasons.items())
    ]
    lines += _block("finished_total", "counter", "requests that have ended", ended)
    lines += _block("http_requests", "gauge", "that are read or answered", [("", inside)])
    told = [(f'{{status="{status}"}}', count) for status, count in sorted(statuses.items())]
    lines += _block("http_responses_total", "counter", "by status", told)
    known = {*GAUGES, *COUNTERS, *reasons}
    for name in sorted(numbers.keys() - known):
        lines += _block(name, "untyped", name.replace("_", " "), [("", numbers[name])])
    return "\n".join(lines) + "\n"


def _block(name: str, kind: str, words: str, values: Sequence[tuple[str, float]]) -> list[str]:
    full = f"mlxlora_{name}"
    return [
        f"# HELP {full} {words}",
        f"# TYPE {full} {kind}",
        *(f"{full}{label} {value!r}" for label, value in values),
    ]
