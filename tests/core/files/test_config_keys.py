"""What a config says of rotary positions, in both spellings, and keys that nobody knows."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mlxlora_core.files import KnownKeys, stated_rope

OLD = {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
NEW = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}
STATED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
KEYS = KnownKeys({"bent": (True,), "moe_count": (2,)}, re.compile("note"))


BESIDE = {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}}


@pytest.mark.parametrize("raw", [OLD, NEW, {**OLD, **NEW}, {**NEW, "rope_scaling": None}, BESIDE])
def test_both_spellings_are_one(raw: dict[str, Any]) -> None:
    assert stated_rope(raw) == (STATED, [])


def test_spellings_that_differ_are_told() -> None:
    assert stated_rope({**NEW, "rope_theta": 6.0})[1] == ["rope_theta: got both 5.0 and 6.0"]
    twice = {"rope_scaling": {"rope_type": "yarn", "type": "linear"}}
    assert stated_rope(twice)[1] == ["rope_type: got both 'yarn' and 'linear'"]


@pytest.mark.parametrize("table", [5, [1], {"full_attention": {"rope_theta": 5.0}}])
def test_what_is_no_one_table_is_told(table: Any) -> None:
    (told,) = stated_rope({"rope_parameters": table})[1]
    assert told.startswith("rope_parameters: got ") and told.endswith("wanted one table for all layers")


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"bent": True, "NOTE": 3, "width": 7, "moe_experts": 0, "other": None}, []),
        ({"bent": 1}, ["bent: got 1, but only True is built here"]),
        (
            {"moe_experts": 4},
            ["moe_experts: got 4, which asks for a mixture of experts"],
        ),
        (
            {"widht": 7},
            ["unknown: widht 7 (did you mean 'width'?); a key may"],
        ),
    ],
)
def test_keys_that_may_change_what_is_computed_are_told(raw: dict[str, Any], told: list[str]) -> None:
    found = KEYS.faults(raw, {"width"})
    assert len(found) == len(told) and all(a.startswith(b) for a, b in zip(found, told, strict=True))
