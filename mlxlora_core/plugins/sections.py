"""What the section of a component holds beside the component's own options: what core itself decides.

In a recipe these keys stand beside ``use``; on the command line ``--set
adapter.layers=4`` sets them as it sets an option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxlora_core.errors import UsageError
from mlxlora_core.options import NoOptions, divide, explain, option, parse, plain
from mlxlora_core.plugins.plugin import Choice, Component


@dataclass(frozen=True)
class AdapterConfig:
    """Where an adapter goes."""

    targets: tuple[str, ...] = option(
        (),
        help="names of the linears to adapt, or all-linear for every one in a layer; "
        "left empty, those that the architecture names",
    )
    layers: int = option(16, help="the top so many layers are adapted; -1 is all", minimum=-1)

    def __post_init__(self) -> None:
        if self.layers == 0:
            raise ValueError("layers must be -1 or at least 1, got 0: nothing would be trained")


@dataclass(frozen=True)
class QuantizeConfig:
    """Which linears are quantized."""

    head: bool = option(False, help="quantize the output head too")


@dataclass(frozen=True)
class Quantization:
    """How a model is to be quantized.

    Attributes:
        choice: the quantizer with its options.
        config: which of the linears it is asked about.
    """

    choice: Choice
    config: QuantizeConfig = field(default_factory=QuantizeConfig)

    def values(self) -> dict[str, Any]:
        """What a recipe's section says of it."""
        options = plain(self.choice.options)
        return {"use": self.choice.component.id, **plain(self.config), "options": options}


@dataclass(frozen=True)
class SplitConfig:
    """How rows are split and written, and what is trained on beside them."""

    test_set_size: float = option(
        0.1, help="share held out; half of it validation, half test", minimum=0.0, below=1.0
    )
    split_seed: int = option(0, help="seed of the split", minimum=0)
    write_batch_size: int = option(1000, help="rows written at a time", unit="rows", minimum=1)
    extra_rows: Path | None = option(
        None, help="file of rows to train on beside those, such as general ones, so that less is forgotten"
    )


#: kind of component -> what its section holds beside ``use`` and ``options``, where it holds anything
CONFIGS: dict[str, type[Any]] = {
    "adapter": AdapterConfig,
    "quantizer": QuantizeConfig,
    "builder": SplitConfig,
}


def config_of(kind: str) -> type[Any]:
    """What the section of a kind of component holds beside ``use`` and ``options``."""
    return CONFIGS.get(kind, NoOptions)


def configure(component: Component, values: Mapping[str, Any], where: str = "") -> tuple[Choice, Any]:
    """The values of a section: a component's options, and what the section itself holds.

    Args:
        component: whom the options belong to.
        values: name -> value, of both.
        where: the file that they came from.

    Raises:
        UsageError: unknown names, wrong types, values out of range; all of them.
    """
    config = config_of(component.kind)
    ours, others = divide(values, config)
    owner = f"{component.kind} '{component.spec.name}'"
    beside = [known.name for known in explain(config)]
    faults = []
    made: list[Any] = []
    for kind, given in ((component.spec.options, others), (config, ours)):
        try:
            made.append(parse(kind, given, owner=owner, where=where, beside=beside))
        except UsageError as fault:
            faults.append(fault)
    if faults:
        raise UsageError("; ".join(fault.what for fault in faults), where=where)
    options, configured = made
    return Choice(component, options), configured
