"""What a section holds beside the options of its component."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mlxlora_core.errors import UsageError
from mlxlora_core.options import NoOptions, option
from mlxlora_core.plugins import Choice, Component, Plugin
from mlxlora_core.plugins.sections import AdapterConfig, config_of, configure
from mlxlora_core.specs import Adapter, Sampler


@dataclass(frozen=True)
class RankOptions:
    """A rank."""

    rank: int = option(8, help="rank", minimum=1)


BOX = Plugin("box", "box", "1", "installed", "box")
ADAPTER = Component(
    "adapter",
    Adapter(
        name="low",
        summary="s",
        options=RankOptions,
        wrap=lambda linear, place, options: None,
        fuse=lambda module, weight: weight,
    ),
    BOX,
)


def test_values_go_to_the_component_and_to_the_section() -> None:
    got = configure(ADAPTER, {"rank": "2", "layers": "-1", "targets": "wq,wv"})
    assert got == (Choice(ADAPTER, RankOptions(2)), AdapterConfig(("wq", "wv"), -1))
    assert configure(ADAPTER, {}) == (Choice(ADAPTER, RankOptions()), AdapterConfig((), 16))


def test_a_kind_whose_section_holds_nothing_else() -> None:
    sampler = Component("sampler", Sampler(name="any", summary="s", build=lambda options: None), BOX)
    assert config_of("sampler") is NoOptions
    assert configure(sampler, {}) == (Choice(sampler, NoOptions()), NoOptions())
    with pytest.raises(UsageError, match="sampler 'any' has no option 'layers'"):
        configure(sampler, {"layers": 1})


def test_all_faults_are_told_at_once_with_both_places_in_mind() -> None:
    with pytest.raises(UsageError) as caught:
        configure(ADAPTER, {"rank": 0, "layers": "x", "layres": 1}, "here.toml:3")
    message = str(caught.value)
    assert message.startswith("here.toml:3: adapter 'low' option 'rank': must be at least 1, got 0")
    assert "option 'layers': wanted a whole number, got 'x'" in message
    assert "no option 'layres' (did you mean 'layers'? it has rank, targets, layers, overrides)" in message


@pytest.mark.parametrize("layers", [0, -2])
def test_layers_that_would_train_nothing(layers: int) -> None:
    with pytest.raises(UsageError, match="layers"):
        configure(ADAPTER, {"layers": layers})
