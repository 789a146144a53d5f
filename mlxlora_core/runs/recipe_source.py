"""recipe.toml + overrides -> one frozen Recipe.

A recipe is read in three passes, each of which tells all that it finds: the
layout, the components, the values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxlora_core.errors import PluginError, UsageError, listing, nearest
from mlxlora_core.files.documents import parse_toml
from mlxlora_core.files.input_file import read_whole
from mlxlora_core.model.located import is_path
from mlxlora_core.options import convert, explain, parse
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.plugins.sections import config_of, configure
from mlxlora_core.runs import samplers
from mlxlora_core.runs.recipe import (
    CHAINS,
    CHOICES,
    COMMAND_LINE,
    DEFAULT,
    NONE,
    PLAIN,
    SECTIONS,
    Recipe,
    check_sections,
    overrides,
)
from mlxlora_core.runs.requirements import check_libraries, check_requirements

RECIPE_BYTES = 1 << 20


def find_recipe(name: str, registry: Registry) -> Path:
    """The recipe file that a path or a name stands for.

    Raises:
        UsageError: no plugin brings a recipe of that name.
        PluginError: two plugins do.
    """
    path = Path(name)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return path
    known = [component.spec.name for component in registry.of("recipe")]
    if name in known or ":" in name:
        shipped: Path = registry.find("recipe", name).spec.path
        return shipped
    raise UsageError(
        f"no recipe '{name}' ({nearest(name, known)}there is {listing(known)}, or name a .toml file)"
    )


def read(path: Path, sets: Iterable[str], registry: Registry) -> Recipe:
    """Read a recipe and put the command line's values over it.

    Args:
        path: recipe.toml; relative paths in it are relative to its folder.
        sets: ``section.key=value``.
        registry: where components are looked up.

    Raises:
        UsageError: no such file, broken TOML, an unknown section or key (the
            nearest one is suggested), a value of a wrong type or range.
        PluginError: a plugin that the recipe requires, or a component, that is not there.
    """
    source = _Source(path, overrides(sets))
    source.check_layout(registry)
    source.check_requirements(registry)
    sections = source.values(source.components(registry))
    name = path.stem if path.stem != "recipe" else path.absolute().parent.name
    return Recipe(name=name or "recipe", **sections, origins=source.origins)


class _Source:
    """One recipe file and what the command line puts over it.

    Attributes:
        origins: ``section.key`` -> where its value came from, filled by :meth:`values`.
    """

    def __init__(self, path: Path, sets: Mapping[str, dict[str, Any]]) -> None:
        self.path, self._sets = path, sets
        if not path.exists():
            raise UsageError("there is no such recipe", where=path)
        document, self._text = parse_toml(read_whole(path, RECIPE_BYTES, UsageError), path, UsageError)
        self._document = _raised(document)
        self.origins: dict[str, str] = {}

    # --- the layout ---

    def check_layout(self, registry: Registry) -> None:
        """Refuse unknown sections and keys, and a recipe that leaves out a part that a run needs."""
        check_sections(self._sets, SECTIONS)
        faults = [*self._unknown_sections()]
        if not faults:
            faults += [fault for section in CHOICES for fault in self._choice_faults(section, registry)]
        if faults:
            where = faults[0][0] if len({place for place, _ in faults}) == 1 else str(self.path)
            raise UsageError("; ".join(what for _, what in faults), where=where)

    def _unknown_sections(self) -> Iterator[tuple[str, str]]:
        """(place, fault) of each."""
        for name, value in self._document.items():
            if name not in SECTIONS:
                there_is = f"{nearest(name, SECTIONS)}there is {listing(SECTIONS, 20)}"
                yield self._place(name), f"no section '{name}' ({there_is})"
            elif not isinstance(value, dict):
                yield self._place(name), f"'{name}' must be a table"

    def _choice_faults(self, section: str, registry: Registry) -> Iterator[tuple[str, str]]:
        """(place, fault) of each in a section that names a component."""
        place = self._where(section)
        table = self._document.get(section, {})
        keys = ("use", *_own_keys(section), "options")
        for key in sorted(table.keys() - set(keys)):
            hint = nearest(key, keys) or "options go under options, "
            yield place, f"[{section}] has no key '{key}' ({hint}it has {listing(keys)})"
        use = table.get("use", "")
        several = section in CHAINS and isinstance(use, list) and all(isinstance(item, str) for item in use)
        if not isinstance(use, str) and not several:
            wanted = "text or a list of texts" if section in CHAINS else "text"
            yield place, f"[{section}] use: wanted {wanted}, got {use!r}"
        elif not isinstance(table.get("options", {}), dict):
            yield place, f"[{section}] options must be a table, got {table['options']!r}"
        elif twice := [key for key in _own_keys(section) if key in table.get("options", {})]:
            yield place, f"[{section}] has {listing(twice)} twice, beside use and under options"
        elif not self._uses(section):
            yield from ((place, fault) for fault in self._absence_faults(section, registry))

    def _absence_faults(self, section: str, registry: Registry) -> Iterator[str]:
        """What is wrong with a section that names no component."""
        kind, _, required = CHOICES[section]
        sets = self._sets.get(section, {})
        if required:
            there_is = listing(sorted({c.spec.name for c in registry.of(kind)}), 20)
            yield f"[{section}] use is required: the {kind} (there is {there_is})"
        table = {} if "use" in sets else self._document.get(section, {})
        written = [key for key in table if key in _own_keys(section)]
        orphans = [*written, *table.get("options", {}), *(key for key in sets if key != "use")]
        if orphans and not required:
            yield f"[{section}] has {listing(orphans)} but names no component; add use ="

    def check_requirements(self, registry: Registry) -> None:
        """Refuse plugins that are not there, before a component of theirs is missed."""
        check_requirements(self._plain("plugins").require, registry, self._where("plugins"))

    # --- the components ---

    def components(self, registry: Registry) -> dict[str, list[Component]]:
        """section -> the components that it names, for those that name one.

        Raises:
            PluginError: all that are not there.
        """
        wanted = [(section, CHOICES[section][0], use) for section in CHOICES for use in self._uses(section)]
        named: dict[str, list[Component]] = {section: [] for section, _, _ in wanted}
        try:
            found = registry.find_all([(kind, use) for _, kind, use in wanted])
        except PluginError as fault:
            away = {section for section, kind, use in wanted if not _is_there(registry, kind, use)}
            where = self._where(away.pop()) if len(away) == 1 else str(self.path)
            raise PluginError(fault.what, where=where, fix=fault.fix) from fault
        for (section, _, _), component in zip(wanted, found, strict=True):
            named[section].append(component)
        return named

    def _uses(self, section: str) -> list[str]:
        """What a section names; nothing for ``none``."""
        return self._names(section, self._sets.get(section, {}).get("use"))

    def _names(self, section: str, use: str | None = None) -> list[str]:
        """What ``use``, or else the file, names for a section."""
        use = self._document.get(section, {}).get("use", CHOICES[section][1]) if use is None else use
        found = samplers.names(use) if section in CHAINS else [str(use).strip()]
        return [name for name in found if name not in ("", NONE)]

    # --- the values ---

    def values(self, components: Mapping[str, Sequence[Component]]) -> dict[str, Any]:
        """section -> its checked value.

        Raises:
            UsageError: all values that are of a wrong type or range, and all unknown names.
        """
        sections: dict[str, Any] = {}
        faults: list[UsageError] = []
        for section in SECTIONS:
            try:
                if section in PLAIN:
                    sections[section] = self._plain(section)
                else:
                    sections |= self._choice(section, components.get(section, ()))
            except UsageError as fault:
                faults.append(fault)
        if len(faults) > 1:
            raise UsageError("; ".join(fault.what for fault in faults), where=self.path)
        if faults:
            raise faults[0]
        self._refuse_idle_parts(sections)
        return sections

    def _refuse_idle_parts(self, sections: Mapping[str, Any]) -> None:
        """Refuse a loader where nothing is converted."""
        if sections["loader"] is not None and sections["model"].torch_path is None:
            raise UsageError(
                "[loader] has nothing to do: the model of mlx_path is used as it is",
                where=self._where("loader"),
                fix="leave [loader] out, or name a torch_path to convert",
            )

    def _plain(self, section: str) -> Any:
        """The value of a section that names no component."""
        table, sets = self._document.get(section, {}), self._sets.get(section, {})
        rows = self._rows(section, [PLAIN[section]], table, sets)
        return parse(PLAIN[section], rows, owner=f"[{section}]", where=self._where(section))

    def _choice(self, section: str, components: Sequence[Component]) -> dict[str, Any]:
        """What a section that may name components gives to the recipe."""
        table, sets = self._document.get(section, {}), self._sets.get(section, {})
        self.origins[f"{section}.use"] = self._origin("use", table, sets)
        config = config_of(CHOICES[section][0])
        written = {key: value for key, value in table.items() if key in _own_keys(section)}
        named = self._names(section)
        if len(named) == len(components) and all(map(Component.answers_to, components, named)):
            # Else the options belong to what the command line replaced.
            written |= table.get("options", {})
        if section in CHAINS:
            return {section: self._chain(section, components, written)}
        made: tuple[Any, Any] = None, config()
        for component in components:
            rows = self._rows(section, [config, component.spec.options], written, sets)
            made = configure(component, rows, self._where(section))
        return {section: made[0]} | ({f"{section}_config": made[1]} if _own_keys(section) else {})

    def _chain(
        self, section: str, components: Sequence[Component], table: Mapping[str, Any]
    ) -> tuple[Choice, ...]:
        """The components of a section that may name several."""
        where = self._where(section)
        sets = {key: value for key, value in self._sets.get(section, {}).items() if key != "use"}
        tables = samplers.deal(samplers.flat(table), components, where)
        over = samplers.deal(sets, components, where)
        prefixes = [f"{label}." if len(components) > 1 else "" for label in samplers.labels(components)]
        rows = [
            self._rows(section, [component.spec.options], written, said, prefix)
            for component, written, said, prefix in zip(components, tables, over, prefixes, strict=True)
        ]
        if section == "sampler":
            samplers.cool_others(rows, components)
        for component in components:
            check_libraries(component)
        return tuple(configure(c, row, where)[0] for c, row in zip(components, rows, strict=True))

    def _rows(
        self,
        section: str,
        kinds: Sequence[type[Any]],
        table: Mapping[str, Any],
        sets: Mapping[str, Any],
        prefix: str = "",
    ) -> dict[str, Any]:
        """The file's values with the command line's over them; notes where each came from."""
        known = {option.name: option.type for kind in kinds for option in explain(kind)}
        for name in known:
            self.origins[f"{section}.{prefix}{name}"] = self._origin(name, table, sets)
        said = {name: value for name, value in sets.items() if name != "use"}
        return {
            name: _rooted(value, known.get(name), root, named=section == "model")
            for values, root in ((table, self.path.parent), (said, Path()))
            for name, value in values.items()
        }

    def _origin(self, name: str, table: Mapping[str, Any], sets: Mapping[str, Any]) -> str:
        if name in sets:
            return COMMAND_LINE
        return self.path.name if name in table else DEFAULT

    # --- places ---

    def _where(self, section: str) -> str:
        """Where the values of a section come from."""
        there = self._place(section) if section in self._document else str(self.path)
        return f"{there} with --set" if section in self._sets else there

    def _place(self, name: str) -> str:
        """``file:line`` of the line that opens a table, or else sets a key, of that name."""
        opens = rf"^[ \t]*\[+[ \t]*[\"']?{re.escape(name)}[\"']?[ \t]*[.\]]"
        sets = rf"^[ \t]*[\"']?{re.escape(name)}[\"']?[ \t]*[.=]"
        match = re.search(opens, self._text, re.MULTILINE) or re.search(sets, self._text, re.MULTILINE)
        return f"{self.path}:{self._text[: match.start()].count(chr(10)) + 1}" if match else str(self.path)


def _own_keys(section: str) -> list[str]:
    """What a section that names a component holds beside ``use`` and ``options``."""
    return [known.name for known in explain(config_of(CHOICES[section][0]))]


def _raised(document: dict[str, Any]) -> dict[str, Any]:
    """A document whose sections hold their own keys; in run folders of before, options hold them."""
    for section in CHOICES:
        table = document.get(section)
        options = table.get("options") if isinstance(table, dict) else None
        if isinstance(table, dict) and isinstance(options, dict):
            moved = [key for key in _own_keys(section) if key in options and key not in table]
            table |= {key: options.pop(key) for key in moved}
    return document


def _is_there(registry: Registry, kind: str, name: str) -> bool:
    return sum(component.answers_to(name) for component in registry.of(kind)) == 1


def _rooted(value: Any, kind: Any, root: Path, *, named: bool = False) -> Any:
    """A value of a path option made absolute, relative to ``root``; any other value as it is.

    So that the recipe that a run writes down means the same wherever it is read.

    Args:
        value: as it is written.
        kind: of the option.
        root: the folder that it is relative to.
        named: whether it is a model's, which may be named by more than a path.
    """
    try:
        path = convert(value, kind)
    except (ValueError, TypeError):  # another type, or a fault that the parser tells
        return value
    if isinstance(path, Path):
        if named and not is_path(str(value), root):  # as it is written: ./a/b is a path, and a/b none
            return path
        return Path(os.path.abspath(root / path))
    if isinstance(path, tuple) and any(isinstance(item, Path) for item in path):
        return tuple(Path(os.path.abspath(root / item)) for item in path)
    return value
