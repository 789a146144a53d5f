"""What a component's section of a recipe holds beside its own options: the keys that belong to core.

In a recipe these keys stand beside ``use``; on the command line ``--set
adapter.layers=4`` sets them as it sets an option.
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
        ValueError: no layer at all, or an override that is none.
    """

    targets: tuple[str, ...] = option(
        (),
        help="what to adapt, by its name here or elsewhere (wq, q_proj), a path or a pattern with *; "
        "all-linear for every linear in a layer; left empty, those that the adapter or the "
        "architecture names",
    )
    layers: int = option(16, help="the top so many layers are adapted; -1 is all", minimum=-1)
    overrides: tuple[str, ...] = option(
        (),
        help="options that differ at some targets, each 'PATTERN: KEY=VALUE, KEY=VALUE'; "
        "of several that match, the last holds",
    )

    def __post_init__(self) -> None:
        if self.layers == 0:
            raise ValueError("layers must be -1 or at least 1, got 0: nothing would be trained")
        object.__setattr__(self, "overrides", tuple(map(str, self.parsed_overrides)))

    @property
    def parsed_overrides(self) -> list[Override]:
        """What the texts in ``overrides`` say.

        A text without a pattern goes on with the one before it, for a list on the command line
        is cut at its commas.
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
    """What a text says.

    Raises:
        ValueError: it is not of the form.
    """
    pattern, _, said = text.partition(":")
    pairs = [[part.strip() for part in pair.partition("=")[::2]] for pair in said.split(",")]
    if not pattern.strip() or not all(key and value for key, value in pairs):
        raise ValueError(f"overrides must be 'PATTERN: KEY=VALUE, KEY=VALUE', got {text!r}")
    return Override(pattern.strip(), dict(pairs))


def overridden(choice: Choice, overrides: Iterable[Override]) -> Any:
    """The options of an adapter where some overrides hold, the last of them above those before.

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
        UsageError: unknown names, wrong types, values out of range; all of them, and then the
            first override that cannot be.
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
