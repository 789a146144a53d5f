"""The plugins that a recipe needs, held against those that are there before anything else is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxlora_core.errors import PluginError, UsageError, nearest
from mlxlora_core.options import option
from mlxlora_core.plugins import Component, Plugin, Registry

if TYPE_CHECKING:
    from packaging.requirements import Requirement


@dataclass(frozen=True)
class PluginsConfig:
    """Which plugins a recipe cannot do without."""

    require: tuple[str, ...] = option(
        (), help="plugins or distributions that must be there, such as name or name>=1.2"
    )


@dataclass(frozen=True)
class _Unmet:
    """A requirement that nothing meets: why, and what pip would have to be told (nothing: pip is no help)."""

    why: str
    install: str


def check_requirements(require: Sequence[str], registry: Registry, where: str = "") -> None:
    """Refuse a recipe whose plugins are not all there.

    Args:
        require: ``NAME``, or ``NAME`` with versions as pip writes them.
        registry: what is there.
        where: the place in the recipe.

    Raises:
        UsageError: a requirement that is none.
        PluginError: all plugins that are absent, not active or of another version.
    """
    if not require:
        return
    asked = _requirements(require, where)
    unmet = [fault for requirement in asked if (fault := _unmet(requirement, registry)) is not None]
    if unmet:
        missing = " ".join(f"'{fault.install}'" for fault in unmet if fault.install)
        raise PluginError(
            "the recipe needs plugins that are not there: " + "; ".join(fault.why for fault in unmet),
            where=where,
            fix=f"pip install {missing}" if missing else "see: mlxlora plugins",
        )


def check_libraries(component: Component) -> None:
    """Refuse an observer or evaluator whose library is not installed; nothing is imported.

    Raises:
        PluginError: with what pip is to be told.
    """
    needs: Mapping[str, str] = getattr(component.spec, "needs", {})
    for module, install in needs.items():
        if importlib.util.find_spec(module) is None:
            raise PluginError(
                f"the {component.kind} {component.spec.name} needs {module}, which is not installed",
                fix=f"pip install '{install}'",
            )


def _requirements(texts: Sequence[str], where: str) -> list[Requirement]:
    from packaging.requirements import InvalidRequirement, Requirement

    requirements, faults = [], []
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as fault:
            faults.append(f"{text!r} is no requirement ({str(fault).splitlines()[0]})")
            continue
        if requirement.url or requirement.extras or requirement.marker:
            faults.append(f"{text!r} says more than a name and versions")
        requirements.append(requirement)
    if faults:
        raise UsageError(
            "[plugins] require: " + "; ".join(faults), where=where, fix="write name, or name>=1.2"
        )
    return requirements


def _unmet(requirement: Requirement, registry: Registry) -> _Unmet | None:
    """Why no plugin meets a requirement, or None when one does."""
    found = [plugin for plugin in registry.plugins if plugin.answers_to(requirement.name)]
    if not found:
        known = sorted({name for plugin in registry.plugins for name in (plugin.name, plugin.distribution)})
        hint = nearest(requirement.name, known).rstrip()
        return _Unmet(f"'{requirement}' is not installed{f' ({hint})' if hint else ''}", str(requirement))
    active = [plugin for plugin in found if plugin.status == "active"]
    if not active:
        return _Unmet(f"plugin {found[0]} {_status(found[0])}", "")
    if any(_meets(plugin, requirement) for plugin in active):
        return None
    there = [f"{plugin.distribution} {plugin.version or 'of no version'}" for plugin in active]
    distribution = active[0].distribution if active[0].origin == "installed" else ""
    return _Unmet(
        f"'{requirement}' is asked for, there is {', '.join(dict.fromkeys(there))}",
        f"{distribution}{requirement.specifier}" if distribution else "",
    )


def _status(plugin: Plugin) -> str:
    if plugin.status == "error":
        return f"failed to load: {plugin.reason}"
    return f"is {plugin.status} ({plugin.reason})"


def _meets(plugin: Plugin, requirement: Requirement) -> bool:
    from packaging.version import InvalidVersion

    if not requirement.specifier:
        return True
    try:
        return requirement.specifier.contains(plugin.version, prereleases=True)
    except InvalidVersion:
        return False
