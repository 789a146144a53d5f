"""The conformance suite over every adapter that is registered."""

from __future__ import annotations

from mlxlora_core import registry
from mlxlora_core.testing.adapter import AdapterSuite

ADAPTERS = {c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("adapter")}


class TestLoRA(AdapterSuite):
    spec = ADAPTERS["lora"]
    option_sets = ({}, {"rank": 1, "scale": -0.5}, {"rank": 32, "scale": 10.0})


def test_every_adapter_is_covered() -> None:
    assert {TestLoRA.spec.name} == set(ADAPTERS)
