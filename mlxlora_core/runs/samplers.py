"""Samplers in a row, observers and evaluators side by side: how they are named, and to whom an option goes.

An option goes to the sampler that has it. Where several have it, it is written
``SAMPLER.OPTION``, but for ``temp``: logits are heated once, by the first sampler
that has a temperature; that of the others is 1 unless it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mlxlora_core.errors import UsageError, listing, nearest
from mlxlora_core.options import explain
from mlxlora_core.plugins import Choice, Component, asks_for, transform_of
from mlxlora_core.plugins.defaults import DEFAULT_SAMPLER
from mlxlora_core.values import Tokenizer

TEMPERATURE = "temp"

#: of the answers that evaluators score: the same each time, where nobody says how they are drawn
ANSWER_SAMPLER = "greedy"

#: a setting of its own -> the sampler that it asks for and the option of it that it sets, in the order in
#: which they work: penalties before a temperature, and what leaves tokens out from the widest to the finest
SETTINGS = {
    "repetition_penalty": ("repetition-penalty", "penalty"),
    "presence_penalty": ("presence-penalty", "penalty"),
    "frequency_penalty": ("frequency-penalty", "penalty"),
    "top_k": ("top-k", "k"),
    "top_p": ("top-p", "p"),
    "min_p": ("min-p", "p"),
}
_PENALTIES = frozenset(name for name in SETTINGS if name.endswith("_penalty"))


def chain(
    use: str | None, settings: Mapping[str, Any], spell: Callable[[str], str] = str
) -> tuple[str, dict[str, Any]]:
    """The names of the samplers that are asked for, and the options that settings give them.

    Args:
        use: names as of ``--sampler``; None is the samplers of the settings, in the order of
            :data:`SETTINGS`, with :data:`DEFAULT_SAMPLER` where none of them has a temperature.
        settings: name of :data:`SETTINGS` -> value; None is not set.
        spell: a setting as the user wrote it, for messages.

    Raises:
        UsageError: a setting of a sampler that is not among those named.
    """
    given = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    values = {".".join(SETTINGS[name]): value for name, value in given.items()}
    if use is None:
        last = [] if given.keys() - _PENALTIES else [DEFAULT_SAMPLER]
        return ",".join([*(SETTINGS[name][0] for name in given), *last]), values
    for name in given:
        sampler = SETTINGS[name][0]
        if sampler not in [each.rpartition(":")[2] for each in names(use)]:
            raise UsageError(
                f"{spell(name)} belongs to the sampler {sampler}, but {spell('sampler')} names {use}",
                fix=f"leave {spell('sampler')} out, or name {sampler} in it",
            )
    return use, values


def names(use: str | Iterable[str]) -> list[str]:
    """The names in ``"a,b"`` or ``["a", "b"]``."""
    items = use.split(",") if isinstance(use, str) else use
    return [item.strip() for item in items if item.strip()]


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with tables of their own (``[sampler.options.top-p]``) as ``top-p.p``."""
    return {
        name: value
        for key, table in options.items()
        for name, value in (
            [(f"{key}.{inner}", value) for inner, value in table.items()]
            if isinstance(table, Mapping)
            else [(key, table)]
        )
    }


def labels(components: Sequence[Component]) -> list[str]:
    """What stands before the dot for each: its name, or its full id where two have that name."""
    known = [component.spec.name for component in components]
    return [c.id if known.count(c.spec.name) > 1 else c.spec.name for c in components]


def deal(values: Mapping[str, Any], components: Sequence[Component], where: str = "") -> list[dict[str, Any]]:
    """The values that go to each of the components.

    Args:
        values: ``OPTION`` or ``SAMPLER.OPTION`` -> value.
        components: one at least.
        where: what the values came from.

    Raises:
        UsageError: a component comes twice; all options that no sampler has, or several.
    """
    ids = [component.id for component in components]
    for component in components:
        if ids.count(component.id) > 1:
            raise UsageError(f"{component.kind} '{component.spec.name}' is named twice", where=where)
    dealt: list[dict[str, Any]] = [{} for _ in components]
    faults = []
    for key, value in values.items():
        takers = _takers(key, components)
        if len(takers) == 1:
            dealt[takers[0]][key.rpartition(".")[2]] = value
        else:
            faults.append(_fault(key, takers, components))
    if faults:
        raise UsageError("; ".join(faults), where=where)
    return dealt


def cool_others(dealt: Sequence[dict[str, Any]], components: Sequence[Component]) -> None:
    """Set the temperature of all but the first that has one to 1, where nothing is said of it."""
    for index in _having(TEMPERATURE, components)[1:]:
        dealt[index].setdefault(TEMPERATURE, 1.0)


def _takers(key: str, components: Sequence[Component]) -> list[int]:
    """The components that ``OPTION`` or ``SAMPLER.OPTION`` may mean."""
    label, _, name = key.rpartition(".")
    if label:
        return [index for index, component in enumerate(components) if component.answers_to(label)]
    if len(components) == 1:
        return [0]  # whose own check tells what is wrong
    having = _having(name, components)
    return having[:1] if name == TEMPERATURE else having


def _having(name: str, components: Sequence[Component]) -> list[int]:
    """The components with an option of that name."""
    return [i for i, c in enumerate(components) if name in _options(c)]


def _options(component: Component) -> list[str]:
    return [option.name for option in explain(component.spec.options)]


def _fault(key: str, takers: Sequence[int], components: Sequence[Component]) -> str:
    """Why an option goes to none of the components, or to none of ``takers`` alone."""
    called, kind = labels(components), components[0].kind
    label, _, name = key.rpartition(".")
    if takers:
        forms = " or ".join(f"{called[taker]}.{name}" for taker in takers)
        return f"several {kind}s have an option '{name}'; write {forms}"
    if label:
        return f"no {kind} '{label}' here ({nearest(label, called)}there is {listing(called)})"
    known = sorted({option for component in components for option in _options(component)})
    there_is = f"{nearest(name, known)}they have {listing(known, 20)}"
    return f"{kind}s {listing(called)} have no option '{name}' ({there_is})"


def check_samplers(choices: Iterable[Choice], tokenizer: Tokenizer | None = None) -> None:
    """Build the samplers of others once, so that what they refuse is told before the work and not after it.

    The options of those that come along are known to be good, and they need MLX.

    Args:
        choices: samplers and their options.
        tokenizer: of the model, once it is open: those that ask for it are built then, the others before.

    Raises:
        UsageError: an option that a sampler refuses.
        PluginError: one that builds no function of logits and ids.
    """
    for component, options in ((choice.component, choice.options) for choice in choices):
        asks = asks_for("tokenizer", component.spec.build)
        if component.plugin.origin != "built-in" and asks == (tokenizer is not None):
            transform_of(component, options, tokenizer)


def prepare_evaluators(choices: Iterable[Choice]) -> None:
    """Let evaluators refuse before the work what they know to fail.

    Raises:
        UsageError: an option that an evaluator refuses.
        MlxloraError: as it raises.
    """
    for choice in choices:
        if choice.component.spec.prepare is not None:
            choice.component.spec.prepare(choice.options)
