"""recipe.toml + overrides -> one frozen Recipe; every value knows where it came from.

Precedence: plugin default < recipe < command line. Component sections name a
component and its options::

    [adapter]
    use = "lora"
    options = { rank = 8 }

``--set adapter.rank=16`` is short for ``--set adapter.options.rank=16``. The
section of samplers may name several, see :mod:`mlxlora_core.run.samplers`.

A recipe is read in three passes, each of which tells all that it finds: the
layout, the components, the values.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mlxlora_core.errors import PluginError, UsageError, listing, nearest
from mlxlora_core.files.input_file import read_whole
from mlxlora_core.options import convert, explain, option, parse, plain
from mlxlora_core.registry import Component, Registry
from mlxlora_core.registry.defaults import DEFAULT_ADAPTER
from mlxlora_core.run import samplers
from mlxlora_core.run.requirements import PluginsConfig, check_requirements
from mlxlora_core.training.settings import EvaluateConfig, SaveConfig, TrainConfig

COMMAND_LINE = "command line"
DEFAULT = "default"
NONE = "none"

_RECIPE_BYTES = 1 << 20


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    folder: str = option("", help="run folder to make; left empty, runs/NAME of the recipe")
    seed: int = option(0, help="seed of everything that is random", minimum=0, maximum=2**32 - 1)


@dataclass(frozen=True)
class ModelConfig:
    """Where the base comes from: a checkpoint to convert, or a model folder that is there."""

    torch_path: Path | None = option(None, help="checkpoint to convert")
    mlx_path: Path | None = option(None, help="model folder to use as it is")
    dtype: str = option("float16", help="type of the weights", choices=("float16", "bfloat16", "float32"))
    format: str = option("safetensors", help="format of the weights", choices=("safetensors", "npz"))

    def __post_init__(self) -> None:
        if (self.torch_path is None) == (self.mlx_path is None):
            raise ValueError("wanted either torch_path or mlx_path")


@dataclass(frozen=True)
class AskConfig:
    """What to ask the model before and after it is tuned."""

    prompts: tuple[str, ...] = option((), help="prompts; none asks nothing")
    num_tokens: int = option(100, help="tokens of an answer at most", unit="tokens", minimum=1)


@dataclass(frozen=True)
class Choice:
    """A component and its options.

    Attributes:
        component: None where a recipe leaves the part out.
        options: an instance of the component's options.
    """

    component: Component | None
    options: Any = None


@dataclass(frozen=True)
class Recipe:
    """Everything that a run does, with every default filled in.

    Attributes:
        name: of the recipe file or of the folder it stands in.
        origins: ``section.key`` -> where its value came from.
    """

    name: str
    run: RunConfig
    model: ModelConfig
    loader: Choice
    quantize: Choice
    data: Choice
    adapter: Choice
    train: TrainConfig
    checkpoints: SaveConfig
    evaluate: EvaluateConfig
    sampler: tuple[Choice, ...]
    generate: AskConfig
    export: Choice
    observe: tuple[Choice, ...]
    plugins: PluginsConfig
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.folder or f"runs/{self.name}")

    def values(self) -> dict[str, Any]:
        """What ``recipe.toml`` holds: sections of plain values, without the parts left out."""
        out: dict[str, Any] = {}
        for section in (f.name for f in fields(self) if f.name not in ("name", "origins")):
            value = getattr(self, section)
            if section in _CHAINS and len(value) > 1:
                out[section] = _chain_values(value)
                continue
            if section in _CHAINS:
                value = value[0] if value else Choice(None)
            if not isinstance(value, Choice):
                out[section] = _without_none(plain(value))
            elif value.component is not None:
                out[section] = {"use": value.component.id, "options": _without_none(plain(value.options))}
        return out


#: section -> the dataclass of its values
_PLAIN = {
    "run": RunConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "checkpoints": SaveConfig,
    "evaluate": EvaluateConfig,
    "generate": AskConfig,
    "plugins": PluginsConfig,
}
#: section -> (kind of component, the component when nothing is said, whether a run needs one)
_CHOICES: dict[str, tuple[str, str, bool]] = {
    "loader": ("loader", NONE, False),
    "quantize": ("quantizer", NONE, False),
    "data": ("builder", NONE, True),
    "adapter": ("adapter", DEFAULT_ADAPTER, True),
    "sampler": ("sampler", "greedy", True),
    "export": ("exporter", NONE, False),
    "observe": ("observer", NONE, False),
}
_SECTIONS = (*_PLAIN, *_CHOICES)
#: the sections that may name several components
_CHAINS = ("sampler", "observe")


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


def overrides(sets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``section.key=value`` texts as section -> key -> text; ``options.`` is understood.

    Raises:
        UsageError: a text that is no such thing.
    """
    nested: dict[str, dict[str, Any]] = {}
    for text in sets:
        name, equals, value = text.partition("=")
        section, _, key = (part.strip() for part in name.partition("."))
        key = key.removeprefix("options.") if section in _CHOICES else key
        if not equals or not key or ("." in key and section not in _CHAINS):
            raise UsageError(
                f"--set {text}: wanted section.key=value", fix="for example --set adapter.rank=16"
            )
        nested.setdefault(section, {})[key] = value
    return nested


def choose(
    kind: str, use: str, values: Mapping[str, Any], registry: Registry, where: Path | str = ""
) -> Choice:
    """The component named ``use`` with options made of ``values``.

    Raises:
        PluginError: no such component.
        UsageError: options that it does not have or that are out of range.
    """
    component = registry.find(kind, use)
    owner = f"{kind} '{component.spec.name}'"
    return Choice(component, parse(component.spec.options, values, owner=owner, where=str(where)))


def choose_samplers(use: str, values: Mapping[str, Any], registry: Registry) -> tuple[Choice, ...]:
    """The samplers named in ``"a,b"``, with options made of ``values``.

    Raises:
        PluginError: no such sampler.
        UsageError: none is named, or one twice; options that are out of range or
            that none of them, or several, have.
    """
    components = registry.find_all([("sampler", name) for name in samplers.names(use)])
    if not components:
        raise UsageError(f"wanted a sampler, got {use!r}", fix="see: mlxlora components sampler")
    rows = samplers.deal(values, components)
    samplers.cool_others(rows, components)
    return _parsed(components, rows, "")


def choose_observers(
    names: Sequence[str], values: Mapping[str, Any], registry: Registry
) -> tuple[Choice, ...]:
    """The observers of these names, with options made of ``values``.

    Raises:
        PluginError: no such observer.
        UsageError: one is named twice; options without an observer, or as :func:`choose_samplers`.
    """
    components = registry.find_all([("observer", name) for name in names])
    if values and not components:
        raise UsageError(f"options of an observer ({listing(values)}), but none is named", fix="name it")
    return _parsed(components, samplers.deal(values, components), "")


def _parsed(
    components: Sequence[Component], rows: Sequence[Mapping[str, Any]], where: str
) -> tuple[Choice, ...]:
    """Components with the options that their rows of values make."""
    return tuple(
        Choice(c, parse(c.spec.options, values, owner=f"{c.kind} '{c.spec.name}'", where=where))
        for c, values in zip(components, rows, strict=True)
    )


def check_sections(sets: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse ``--set`` for a section that a verb does not have.

    Raises:
        UsageError: with the nearest one.
    """
    known = list(known)
    for section in sets:
        if section not in known:
            raise UsageError(
                f"--set {section}: no such section ({nearest(section, known)}there is {listing(known)})"
            )


class _Source:
    """One recipe file and what the command line puts over it.

    Attributes:
        origins: ``section.key`` -> where its value came from, filled by :meth:`values`.
    """

    def __init__(self, path: Path, sets: Mapping[str, dict[str, Any]]) -> None:
        self.path, self._sets = path, sets
        self._text = _text(path)
        self._document = _document(path, self._text)
        self.origins: dict[str, str] = {}

    # --- the layout ---

    def check_layout(self, registry: Registry) -> None:
        """Refuse unknown sections and keys, and a recipe that leaves out a part that a run needs."""
        check_sections(self._sets, _SECTIONS)
        faults = [*self._unknown_sections()]
        if not faults:
            faults += [fault for section in _CHOICES for fault in self._choice_faults(section, registry)]
        if faults:
            where = faults[0][0] if len({place for place, _ in faults}) == 1 else str(self.path)
            raise UsageError("; ".join(what for _, what in faults), where=where)

    def _unknown_sections(self) -> Iterator[tuple[str, str]]:
        """(place, fault) of each."""
        for name, value in self._document.items():
            if name not in _SECTIONS:
                there_is = f"{nearest(name, _SECTIONS)}there is {listing(_SECTIONS, 20)}"
                yield self._place(name), f"no section '{name}' ({there_is})"
            elif not isinstance(value, dict):
                yield self._place(name), f"'{name}' must be a table"

    def _choice_faults(self, section: str, registry: Registry) -> Iterator[tuple[str, str]]:
        """(place, fault) of each in a section that names a component."""
        place = self._where(section)
        table = self._document.get(section, {})
        for key in sorted(table.keys() - {"use", "options"}):
            hint = nearest(key, ("use", "options")) or "options go under options, "
            yield place, f"[{section}] has no key '{key}' ({hint}it has use and options)"
        use = table.get("use", "")
        several = section in _CHAINS and isinstance(use, list) and all(isinstance(item, str) for item in use)
        if not isinstance(use, str) and not several:
            wanted = "text or a list of texts" if section in _CHAINS else "text"
            yield place, f"[{section}] use: wanted {wanted}, got {use!r}"
        elif not isinstance(table.get("options", {}), dict):
            yield place, f"[{section}] options must be a table, got {table['options']!r}"
        elif not self._uses(section):
            yield from ((place, fault) for fault in self._absence_faults(section, registry))

    def _absence_faults(self, section: str, registry: Registry) -> Iterator[str]:
        """What is wrong with a section that names no component."""
        kind, _, required = _CHOICES[section]
        sets = self._sets.get(section, {})
        if required:
            there_is = listing(sorted({c.spec.name for c in registry.of(kind)}), 20)
            yield f"[{section}] use is required: the {kind} (there is {there_is})"
        written = () if "use" in sets else self._document.get(section, {}).get("options", {})
        orphans = [*written, *(key for key in sets if key != "use")]
        if orphans and not required:
            yield f"[{section}] has {listing(orphans)} but names no component; add use ="

    def check_requirements(self, registry: Registry) -> None:
        """Refuse plugins that are not there, before a component of theirs is missed."""
        check_requirements(self._value("plugins", ()).require, registry, self._where("plugins"))

    # --- the components ---

    def components(self, registry: Registry) -> dict[str, list[Component]]:
        """section -> the components that it names, for those that name one.

        Raises:
            PluginError: all that are not there.
        """
        wanted = [(section, _CHOICES[section][0], use) for section in _CHOICES for use in self._uses(section)]
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
        use = self._document.get(section, {}).get("use", _CHOICES[section][1]) if use is None else use
        found = samplers.names(use) if section in _CHAINS else [str(use).strip()]
        return [name for name in found if name not in ("", NONE)]

    # --- the values ---

    def values(self, components: Mapping[str, Sequence[Component]]) -> dict[str, Any]:
        """section -> its checked value.

        Raises:
            UsageError: all values that are of a wrong type or range, and all unknown names.
        """
        sections: dict[str, Any] = {}
        faults: list[UsageError] = []
        for section in _SECTIONS:
            try:
                sections[section] = self._value(section, components.get(section, ()))
            except UsageError as fault:
                faults.append(fault)
        if len(faults) > 1:
            raise UsageError("; ".join(fault.what for fault in faults), where=self.path)
        if faults:
            raise faults[0]
        self._refuse_idle_parts(sections)
        return sections

    def _refuse_idle_parts(self, sections: Mapping[str, Any]) -> None:
        """Refuse a loader or a quantizer where nothing is converted."""
        idle = [s for s in ("loader", "quantize") if sections[s].component is not None]
        if idle and sections["model"].torch_path is None:
            raise UsageError(
                f"[{idle[0]}] has nothing to do: the model folder of mlx_path is used as it is",
                where=self._where(idle[0]),
                fix=f"leave [{idle[0]}] out, or name a torch_path to convert",
            )

    def _value(self, section: str, components: Sequence[Component]) -> Any:
        if section in _PLAIN:
            kind, table = _PLAIN[section], self._document.get(section, {})
            return parse(
                kind, self._rows(section, kind, table), owner=f"[{section}]", where=self._where(section)
            )
        sets = self._sets.get(section, {})
        self.origins[f"{section}.use"] = self._origin("use", self._document.get(section, {}), sets)
        if not components:
            return () if section in _CHAINS else Choice(None)
        options = self._document.get(section, {}).get("options", {})
        written = self._names(section)
        if len(written) != len(components) or not all(map(Component.answers_to, components, written)):
            options = {}  # they belong to what the command line replaced
        if section in _CHAINS:
            return self._chain(section, components, options)
        (component,) = components
        rows = self._rows(section, component.spec.options, options)
        return _parsed(components, [rows], self._where(section))[0]

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
            self._rows(section, component.spec.options, written, said, prefix)
            for component, written, said, prefix in zip(components, tables, over, prefixes, strict=True)
        ]
        if section == "sampler":
            samplers.cool_others(rows, components)
        return _parsed(components, rows, where)

    def _rows(
        self,
        section: str,
        kind: type[Any],
        table: Mapping[str, Any],
        sets: Mapping[str, Any] | None = None,
        prefix: str = "",
    ) -> dict[str, Any]:
        """The file's values with the command line's over them; notes where each came from."""
        known = {option.name: option.type for option in explain(kind)}
        sets = self._sets.get(section, {}) if sets is None else sets
        for name in known:
            self.origins[f"{section}.{prefix}{name}"] = self._origin(name, table, sets)
        sets = {name: value for name, value in sets.items() if name != "use"}
        rooted = {name: _rooted(value, known.get(name), self.path.parent) for name, value in table.items()}
        return rooted | {name: _rooted(value, known.get(name), Path()) for name, value in sets.items()}

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


def _text(path: Path) -> str:
    if not path.exists():
        raise UsageError("there is no such recipe", where=path)
    data = read_whole(path, _RECIPE_BYTES, UsageError)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        raise UsageError("is not UTF-8", where=f"{path}:{line}") from fault


def _document(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as fault:  # a number with thousands of digits is no TOMLDecodeError
        what, _, place = str(fault).partition(" (at line ")
        where = ":".join([str(path), *re.findall("[0-9]+", place)])
        raise UsageError(f"is no TOML: {what}", where=where) from fault


def _is_there(registry: Registry, kind: str, name: str) -> bool:
    return sum(component.answers_to(name) for component in registry.of(kind)) == 1


def _rooted(value: Any, kind: Any, root: Path) -> Any:
    """A value of a path option made absolute, relative to ``root``; any other value as it is.

    So that the recipe that a run writes down means the same wherever it is read.
    """
    try:
        path = convert(value, kind)
    except (ValueError, TypeError):  # another type, or a fault that the parser tells
        return value
    if isinstance(path, Path):
        return Path(os.path.abspath(root / path))
    if isinstance(path, tuple) and any(isinstance(item, Path) for item in path):
        return tuple(Path(os.path.abspath(root / item)) for item in path)
    return value


def _chain_values(choices: Sequence[Choice]) -> dict[str, Any]:
    """Several components as a section holds them: each option is written COMPONENT.OPTION."""
    components = [choice.component for choice in choices if choice.component is not None]
    options = {
        f"{label}.{name}": value
        for label, choice in zip(samplers.labels(components), choices, strict=True)
        for name, value in _without_none(plain(choice.options)).items()
    }
    return {"use": [component.id for component in components], "options": options}


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no none: what is not set is not written."""
    return {key: value for key, value in values.items() if value is not None}
