"""What is kept of prompts: found by all ids before, bounded, and the same as what was read."""

from __future__ import annotations

import mlx.core as mx
from serving_steps import Served

from mlxlora_core.model.cache import KVCache
from mlxlora_core.model.generate import forward
from mlxlora_core.serving.prefixes import Prefixes


def read(served: Served, prefixes: Prefixes, prompt: list[int], adapter: str | None = None) -> int:
    """Read a prompt in parts, keeping them, and tell how many tokens were known."""
    cache = served.model.make_cache()
    known = prefixes.begin(adapter, prompt, cache)
    for start in range(known, len(prompt), prefixes.part):
        part = prompt[start : start + prefixes.part]
        forward(served.model, part, cache)
        prefixes.keep(adapter, prompt, cache, start + len(part))
    fresh = served.model.make_cache()
    for start in range(0, len(prompt), prefixes.part):
        forward(served.model, prompt[start : start + prefixes.part], fresh)
    for one, two in zip(cache, fresh, strict=True):
        assert isinstance(one, KVCache) and isinstance(two, KVCache)
        for a, b in zip(one.held(), two.held(), strict=True):
            assert mx.array_equal(a, b)
    return known


def test_prompts_that_begin_alike_share_whole_parts(served: Served) -> None:
    assert served.adapters is not None
    served.adapters.select(None)
    prefixes = Prefixes(8, 1 << 24)
    prompt = list(range(10, 40))
    assert read(served, prefixes, prompt) == 0
    assert read(served, prefixes, prompt) == 24
    assert read(served, prefixes, prompt[:25]) == 24
    assert read(served, prefixes, prompt[:24]) == 16, "the last token is read, for what follows it"
    assert read(served, prefixes, [*prompt[:20], 9, 9, 9, 9]) == 16
    assert read(served, prefixes, [9, *prompt]) == 0
    assert read(served, prefixes, prompt, "small") == 0


def test_the_least_recently_used_parts_go_first(served: Served) -> None:
    assert served.adapters is not None
    served.adapters.select(None)
    prefixes = Prefixes(8, 1 << 24)
    first, second, third = ([n] * 9 for n in (10, 11, 12))
    read(served, prefixes, first)
    one = prefixes.held_bytes
    prefixes = Prefixes(8, 2 * one)
    for prompt in (first, second, first, third):
        read(served, prefixes, prompt)
        assert prefixes.held_bytes <= 2 * one
    assert len(prefixes) == 2 and prefixes.held_bytes == 2 * one
    assert (read(served, prefixes, first), read(served, prefixes, second)) == (8, 0)
