"""All plugins that were found, and the components of those that are active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlxlora_core.errors import PluginError, listing, nearest
from mlxlora_core.plugins.plugin import Component, Plugin


class Registry:
    """All plugins that were found, and the components of those that are active.

    Attributes:
        plugins: every plugin found, built-in ones first.
        components: of the active plugins, in the order of the plugins.
        warnings: what is wrong with the choice of plugins and was let pass.
    """

    def __init__(
        self, plugins: Sequence[Plugin], components: Sequence[Component], warnings: Sequence[str] = ()
    ) -> None:
        self.plugins, self.warnings = tuple(plugins), tuple(warnings)
        self.components = tuple(replace(c, owner=_owner(c, components)) for c in components)

    @property
    def failed(self) -> list[Plugin]:
        """The plugins that could not be loaded."""
        return [plugin for plugin in self.plugins if plugin.status == "error"]

    def of(self, kind: str) -> list[Component]:
        """The components of one kind."""
        return [component for component in self.components if component.kind == kind]

    def find(self, kind: str, name: str) -> Component:
        """The component that ``name`` or ``plugin:name`` stands for.

        Raises:
            PluginError: nothing has that name (the message tells what there is
                and which plugins failed to load), or several plugins give it.
        """
        return self.find_all([(kind, name)])[0]

    def find_all(self, wanted: Sequence[tuple[str, str]]) -> list[Component]:
        """The components that (kind, name) pairs stand for.

        Raises:
            PluginError: as :meth:`find`, for all of them at once.
        """
        found = [[c for c in self.of(kind) if c.answers_to(name)] for kind, name in wanted]
        faults = [
            self._fault(kind, name, several)
            for (kind, name), several in zip(wanted, found, strict=True)
            if len(several) != 1
        ]
        if not faults:
            return [component for (component,) in found]
        fixes = {fix for _, fix in faults}
        missing = [name for (_, name), several in zip(wanted, found, strict=True) if not several]
        raise PluginError(
            "; ".join(what for what, _ in faults) + self._away(missing),
            fix=fixes.pop() if len(fixes) == 1 else "install what is missing, or see: mlxlora components",
        )

    def _fault(self, kind: str, name: str, found: Sequence[Component]) -> tuple[str, str]:
        """What is wrong with a name that stands for no component or for several, and what to do."""
        if found:
            givers = listing(f"{c.plugin} as {c.id}" for c in found)
            return f"{kind} '{name}' is given by {givers}", "write " + " or ".join(c.id for c in found)
        known = sorted({component.spec.name for component in self.of(kind)})
        bare = name.rpartition(":")[2]
        return (
            f"no {kind} '{name}' ({nearest(bare, known)}there is {listing(known, 20)})",
            f"install the plugin that gives it, or see: mlxlora components {kind}",
        )

    def _away(self, missing: Sequence[str]) -> str:
        """The plugins that may give what is missing and are not there, and why, for a message."""
        owners = [name.rpartition(":")[0] for name in missing]
        away = [
            plugin
            for plugin in self.plugins
            if plugin.status != "active" and any(not owner or plugin.answers_to(owner) for owner in owners)
        ]
        return "".join(
            f"; plugin {p} failed to load: {p.reason}"
            if p.status == "error"
            else f"; plugin {p} is {p.status} ({p.reason})"
            for p in away
        )


def _owner(component: Component, among: Sequence[Component]) -> str:
    """The shortest owner that no other component of ``among`` with the same kind and name answers to."""
    others = [
        c.plugin
        for c in among
        if c is not component and (c.kind, c.spec.name) == (component.kind, component.spec.name)
    ]
    owners = component.plugin.owners
    return next((o for o in owners if not any(plugin.answers_to(o) for plugin in others)), owners[-1])
