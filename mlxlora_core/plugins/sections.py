"""What a component's section of a recipe holds beside its own options: the keys that belong to core.

In a recipe these keys stand beside ``use``; on the command line ``--set adapter.layers=4`` sets them
like an option.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxlora_core.errors import UsageError, listing
from mlxlora_core.options import NoOptions, divide, explain, option, parse, plain
from mlxlora_core.plugins.plugin import Choice, Component


@dataclass(frozen=True)
class AdapterConfig:
    """Where an adapter goes, and where its options differ.

    Raises:
        ValueError: no layers, or an invalid override.
    """

    targets: tuple[str, ...] = option(
        (),
        help="what to adapt: names here or in other libraries (wq, q_proj), paths, or patterns with *; "
        "all-linear for every linear in a layer; empty for the defaults of the adapter or the "
        "architecture",
    )
    layers: int = option(16, help="how many of the top layers are adapted; -1 is all", minimum=-1)
    overrides: tuple[str, ...] = option(
        (),
        help="options that differ at some targets, each 'PATTERN: KEY=VALUE, KEY=VALUE'; "
        "if several match, the last one holds",
    )

    def __post_init__(self) -> None:
        if self.layers == 0:
            raise ValueError("layers must be -1 or at least 1, got 0: nothing would be trained")
        object.__setattr__(self, "overrides", tuple(map(str, self.parsed_overrides)))

    @property
    def parsed_overrides(self) -> list[Override]:
        """The texts in ``overrides``, parsed.

        A text without a pattern continues the one before it, since the command line splits lists at
        their commas.
        """
        joined: list[str] = []
        for text in self.overrides:
            if ":" in text or not joined:
                joined.append(text)
            else:
                joined[-1] += f", {text}"
        return [_override(text) for text in joined]


@dataclass(frozen=True)
class Override:
    """Options of an adapter that differ at some of its targets.

    Attributes:
        pattern: of the paths, as targets are written.
        values: option -> text of its value.
    """

    pattern: str
    values: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.pattern}: " + ", ".join(f"{key}={value}" for key, value in self.values.items())


def _override(text: str) -> Override:
    """An override from its text.

    Raises:
        ValueError: the text does not have the form ``PATTERN: KEY=VALUE, KEY=VALUE``.
    """
    pattern, _, said = text.partition(":")
    pairs = [[part.strip() for part in pair.partition("=")[::2]] for pair in said.split(",")]
    if not pattern.strip() or not all(key and value for key, value in pairs):
        raise ValueError(f"overrides must be 'PATTERN: KEY=VALUE, KEY=VALUE', got {text!r}")
    return Override(pattern.strip(), dict(pairs))


def overridden(choice: Choice, overrides: Iterable[Override]) -> Any:
    """The options of an adapter with some overrides applied, in order.

    Raises:
        UsageError: options that the adapter does not have, or values that they cannot have.
    """
    found = list(overrides)
    if not found:
        return choice.options
    values = plain(choice.options)
    for override in found:
        values |= override.values
    where = listing(dict.fromkeys(f"'{override.pattern}'" for override in found), 3)
    owner = f"adapter '{choice.component.spec.name}' at {where}"
    return parse(choice.component.spec.options, values, owner=owner)


@dataclass(frozen=True)
class QuantizeConfig:
    """Which linears are quantized."""

    head: bool = option(False, help="quantize the output head too")


@dataclass(frozen=True)
class Quantization:
    """How a model is to be quantized.

    Attributes:
        choice: the quantizer with its options.
        config: which linears it is asked about.
    """

    choice: Choice
    config: QuantizeConfig = field(default_factory=QuantizeConfig)

    def values(self) -> dict[str, Any]:
        """The section of a recipe that says so."""
        options = plain(self.choice.options)
        return {"use": self.choice.component.id, **plain(self.config), "options": options}


@dataclass(frozen=True)
class SplitConfig:
    """How rows are split and written, and which further rows are trained on."""

    test_set_size: float = option(
        0.1, help="share of rows held out, half for validation and half for test", minimum=0.0, below=1.0
    )
    split_seed: int = option(0, help="seed of the split", minimum=0)
    write_batch_size: int = option(1000, help="rows written at a time", unit="rows", minimum=1)
    extra_rows: Path | None = option(
        None, help="file of further rows to train on, such as general ones, so that less is forgotten"
    )


#: kind of component -> the keys that its section holds beside ``use`` and ``options``, if any
CONFIGS: dict[str, type[Any]] = {
    "adapter": AdapterConfig,
    "quantizer": QuantizeConfig,
    "builder": SplitConfig,
}


def config_of(kind: str) -> type[Any]:
    """The keys that the section of a kind of component holds beside ``use`` and ``options``."""
    return CONFIGS.get(kind, NoOptions)


def configure(component: Component, values: Mapping[str, Any], where: str = "") -> tuple[Choice, Any]:
    """Parse the values of a section into the component's options and core's own keys.

    Args:
        component: the options are its own.
        values: name -> value, for both.
        where: the file that they came from.

    Raises:
        UsageError: all unknown names, wrong types and values out of range; then the first invalid
            override.
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
    choice = Choice(component, options)
    if isinstance(configured, AdapterConfig):
        for override in configured.parsed_overrides:
            overridden(choice, [override])
    return choice, configured
