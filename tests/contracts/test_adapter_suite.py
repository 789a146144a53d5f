"""The conformance suite over every adapter that is registered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxlora_core import plugins as registry
from mlxlora_core.errors import UsageError
from mlxlora_core.testing.adapter import INPUTS, LINEARS, OUTPUTS, AdapterSuite
from mlxlora_core.values import Place

ADAPTERS = {c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("adapter")}


class TestLoRA(AdapterSuite):
    spec = ADAPTERS["lora"]
    option_sets = ({}, {"rank": 1, "scale": -0.5}, {"rank": 32, "scale": 10.0})
    embeds = True


class TestRSLoRA(AdapterSuite):
    spec = ADAPTERS["rslora"]
    option_sets = ({}, {"rank": 1, "alpha": -0.5}, {"rank": 32, "alpha": 50.0})
    embeds = True


class TestLoRAPlus(AdapterSuite):
    spec = ADAPTERS["lora-plus"]
    option_sets = ({}, {"rank": 2, "ratio": 0.5})
    embeds = True


class TestDoRA(AdapterSuite):
    spec = ADAPTERS["dora"]
    option_sets = ({}, {"rank": 1, "scale": -0.5}, {"rank": 32, "scale": 3.0})
    bent = ("lora_a", "lora_b")  # whose gradient does not go through the norm


class TestPiSSA(AdapterSuite):
    spec = ADAPTERS["pissa"]
    option_sets = ({}, {"rank": 1, "scale": 0.5}, {"rank": 32}, {"iterations": 4})
    frozen = ("lora_a0", "lora_b0")


class TestIA3(AdapterSuite):
    spec = ADAPTERS["ia3"]
    option_sets = ({}, {"scales": "inputs"})


class TestVeRA(AdapterSuite):
    spec = ADAPTERS["vera"]
    option_sets = ({}, {"rank": 3, "d_initial": -0.5, "projection_seed": 7})
    frozen = ("vera_a", "vera_b")


SUITES = (TestLoRA, TestRSLoRA, TestLoRAPlus, TestDoRA, TestPiSSA, TestIA3, TestVeRA)


def test_every_adapter_is_covered() -> None:
    assert {suite.spec.name for suite in SUITES} == set(ADAPTERS)


# --- an adapter that breaks the contract is caught ------------------------------

LORA = ADAPTERS["lora"]
OPTIONS = LORA.options()


def changed(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """``wrap`` of lora, and then a change of what it gives."""

    def wrap(linear: nn.Module, place: Place, options: Any) -> nn.Module | None:
        module = LORA.wrap(linear, place, options)
        change(module)
        return module

    return wrap


def starts_elsewhere(module: Any) -> None:
    module.lora_b = module.lora_b + 0.1


def thaws(module: Any) -> None:
    module.linear.unfreeze()


def freezes_half(module: Any) -> None:
    module.freeze(keys="lora_a")


def hides(module: Any) -> None:
    module.inner = module.linear
    module.linear = nn.Linear(INPUTS, OUTPUTS)
    module.linear.freeze()


def refuses(linear: nn.Module, place: Place, options: Any) -> nn.Module | None:
    raise UsageError("no") if min(place.shape) == 1 else ZeroDivisionError


BROKEN: dict[str, tuple[dict[str, Any], Callable[[TestLoRA], None]]] = {
    "it starts elsewhere": (
        {"wrap": changed(starts_elsewhere)},
        lambda suite: suite.test_starts_as_the_linear(LINEARS["dense"](), OPTIONS),
    ),
    "the linear trains": (
        {"wrap": changed(thaws)},
        lambda suite: suite.test_keeps_the_linear_frozen(LINEARS["dense"](), OPTIONS),
    ),
    "a parameter does not train": (
        {"wrap": changed(freezes_half)},
        lambda suite: suite.test_keeps_the_linear_frozen(LINEARS["dense"](), OPTIONS),
    ),
    "the child is another linear": (
        {"wrap": changed(hides)},
        lambda suite: suite.test_keeps_the_linear_frozen(LINEARS["dense"](), OPTIONS),
    ),
    "it leaves everything alone": (
        {"wrap": lambda linear, place, options: None},
        lambda suite: suite.test_starts_as_the_linear(LINEARS["dense"](), OPTIONS),
    ),
    "nothing is fused": (
        {"fuse": lambda module, weight: weight},
        lambda suite: suite.test_fuses_to_what_it_does(LINEARS["dense"](), OPTIONS),
    ),
    "half of it is fused, over half precision": (
        {"fuse": lambda module, weight: (weight + LORA.fuse(module, weight)) / 2},
        lambda suite: suite.test_fuses_to_what_it_does(LINEARS["dense float16"](), OPTIONS),
    ),
    "half of it is fused, over a quantized linear": (
        {"fuse": lambda module, weight: (weight + LORA.fuse(module, weight)) / 2},
        lambda suite: suite.test_fuses_to_what_it_does(LINEARS["of a quantizer"](), OPTIONS),
    ),
    "the transpose is fused": (
        {"fuse": lambda module, weight: LORA.fuse(module, weight).T},
        lambda suite: suite.test_fuses_to_what_it_does(LINEARS["dense"](), OPTIONS),
    ),
    "it refuses a shape without naming it": (
        {"wrap": refuses},
        lambda suite: suite.test_linears_of_odd_shapes(OPTIONS, (1, 64)),
    ),
    "a row is fused": (
        {"fuse": lambda module, weight: weight[0]},
        lambda suite: suite.test_linears_of_odd_shapes(LORA.options(rank=1), (33, 7)),
    ),
}


@pytest.mark.parametrize(("functions", "check"), BROKEN.values(), ids=BROKEN)
def test_a_broken_adapter_fails_the_suite(
    functions: dict[str, Any], check: Callable[[TestLoRA], None]
) -> None:
    mx.random.seed(0)
    suite = TestLoRA()
    check(suite)
    suite.spec = dataclasses.replace(LORA, **functions)
    with pytest.raises(AssertionError):
        check(suite)
